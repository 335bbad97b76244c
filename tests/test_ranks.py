"""Real ranks (gloo), one, two and four, forked from a process that has imported everything: the same run as one rank,
resumed on other numbers, sharded, ended by a guard or by signals. tests/test_lost_ranks.py has those of torchrun."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recipe.checkpoints import list_checkpoints, problems_of
from recipe.guards.records import read_lines
from recipe.rundir import write_exit
from recipe.verdict import NOTHING_LEARNED
from tests.benchmarks.fault_run import parts_of, write_setting
from tests.forked_ranks import run_jobs

EACH = {1: "4", 2: "2", 4: "1"}  # rows of a rank
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


REFERENCE = {
    "name": "low",
    "description": "",
    "belongs_to": {},
    "window": 1,
    "points": [{"tokens": tokens, "loss": 1.0, "low": 0.9, "high": 1.1} for tokens in (1, 10**6)],
}
EVAL = ("--eval_strategy", "steps", "--eval_steps", "4")
# Ranks, fault, words, exit code
SIGNALS = {
    "to rank 0": (2, {"phase": "backward", "step": 3, "action": "SIGTERM"}, (), 143),
    "to all of rank 1": (
        2,
        {"phase": "backward", "step": 3, "rank": 1, "action": "group SIGTERM SIGTERM"},
        ("--dataloader_num_workers", "2"),
        143,
    ),
    "twice in a step": (1, {"phase": "backward", "step": 5, "action": "SIGTERM later SIGTERM"}, (), -15),
    "twice in an evaluation": (
        1,
        {"phase": "evaluation", "step": 5, "action": "SIGTERM later SIGTERM"},
        ("--eval_strategy", "steps", "--eval_steps", "5"),
        -15,
    ),
}


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Path:
    """The folder of these runs, each in `NAME`, with `NAME.log` and the rows of its parts in `NAME-PART-RANK`."""
    folder = tmp_path_factory.mktemp("forked")
    config, jobs = str(write_setting(folder, lr_scheduler_type="constant", eval_strategy="no", eval_steps=None)), []

    def add(name, ranks, steps, *words, each=None, run_dir=None, **more):
        given = [config, "--output_dir", str(folder / (run_dir or name)), "--resume_from_checkpoint", "auto"]
        given += ["--max_steps", str(steps), "--per_device_train_batch_size", each or EACH[ranks], *words]
        known = {"log": str(folder / f"{name}.log"), "rows": str(folder / f"{name}-{len(jobs)}")}
        jobs.append({"words": given, "ranks": ranks, **known, **more})

    add("one", 1, 8)
    for ranks, steps in ((1, 2), (2, 4), (4, 6), (2, 8)):
        add("parts", ranks, steps)
    add("odd", 1, 1, "--save_steps", "1", each="3")
    add("odd", 2, 3, "--save_steps", "1", each="1")
    add("at once", 1, 1, "--save_steps", "1", each="7")
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        words = ["--fsdp", "true", "--fsdp_config", json.dumps(FSDP | {"state_dict_type": kind})]
        for name, steps in (("whole", 4), ("part", 2), ("part", 4)):
            add(f"{kind} {name}", 2, steps, *words, is_sharded=True)
    add("at the end", 2, 4, *words, is_sharded=True, run_dir=f"{kind} part")
    nan = {"phase": "forward", "step": 3, "rank": 1, "action": "nan"}
    add("not finite", 2, 4, *words, is_sharded=True, fault=nan)
    add("alone", 1, 8, *EVAL)
    words = [*EVAL, "--dataloader_num_workers", "2"]
    add("together", 2, 8, *words, environment={"RECIPE_EXIT_FILE": str(folder / "together.json")})
    (folder / "reference.json").write_text(json.dumps(REFERENCE))
    words = ["--trajectory", str(folder / "reference.json"), "--on_regression", "stop"]
    add("stopped", 2, 8, *words, environment={"RECIPE_EXIT_FILE": str(folder / "stopped.json")})
    for name, (ranks, fault, words, _) in SIGNALS.items():
        add(name, ranks, 8, *words, fault=fault)
    codes = {}
    for job, found in zip(jobs, run_jobs(jobs), strict=True):
        codes.setdefault(Path(job["log"]).stem, []).extend(found)
    (folder / "codes.json").write_text(json.dumps(codes))
    return folder


def check_ended(forked: Path, name: str, code: int = 0) -> Path:
    """All ranks of all parts with this code. Returns the run directory."""
    codes = json.loads((forked / "codes.json").read_text())[name]
    assert set(codes) == {code}, f"{codes}\n{(forked / f'{name}.log').read_text()[-3000:]}"
    return forked / name


def losses_in(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run_dir / "steps.jsonl")]


def position_in(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "stream_state.json").read_text())["position"]


def test_two_ranks_are_the_same_run_as_one(forked):
    ended = json.loads((forked / "together.json").read_text())
    assert ended["code"] == 0 and ended["reason"].startswith(NOTHING_LEARNED)  # eight steps
    alone, together = check_ended(forked, "alone"), check_ended(forked, "together")
    one, two = (read_lines(run_dir / "steps.jsonl") for run_dir in (alone, together))
    assert [record["tokens_seen"] for record in one] == [record["tokens_seen"] for record in two]
    # The same tokens summed in another order: fp32 rounds at 1e-7, Adam's first steps amplify it
    assert losses_in(alone) == pytest.approx(losses_in(together), abs=1e-4)
    evals = [read_lines(run_dir / "evals.jsonl")[-1]["eval_loss"] for run_dir in (alone, together)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)
    states = [json.loads((each / "checkpoint-8/stream_state.json").read_text()) for each in (alone, together)]
    free = [state.pop("free") for state in states]  # ranks and workers
    assert states[0] == states[1] and free[0] != free[1]


def test_one_rank_then_two_then_four_then_two_are_one_run(forked):
    """Resumed three times, each time on another number of ranks: the same rows, losses and position."""
    one, parts = check_ended(forked, "one"), check_ended(forked, "parts")
    assert losses_in(parts) == pytest.approx(losses_in(one), abs=1e-4)
    assert position_in(parts / "checkpoint-8") == position_in(one / "checkpoint-8")
    read = {}
    for path in forked.glob("parts-*-*"):
        ((begin, rows),) = parts_of(path)
        read.setdefault(begin, []).append(rows)
    assert sorted(read) == [0, 8, 16, 24] and [len(read[begin]) for begin in sorted(read)] == [1, 2, 4, 2]
    for begin, ranks in read.items():
        assert sorted(row for rows in ranks for row in rows) == list(range(begin, begin + 8))


def test_two_ranks_go_on_after_an_odd_number_of_rows(forked):
    """Which rank reads which lane then differs from a run that began on two ranks; the position must not."""
    odd = position_in(check_ended(forked, "odd") / "checkpoint-3")
    at_once = position_in(check_ended(forked, "at once") / "checkpoint-1")
    assert odd["rows"] == 7 and odd == at_once


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_saves_commits_and_resumes(forked, kind):
    """Parameters are DTensors on two ranks: both kinds of files are committed whole and resumed from."""
    whole, part = check_ended(forked, f"{kind} whole"), check_ended(forked, f"{kind} part")
    checkpoint = part / "checkpoint-2"
    assert (
        problems_of(checkpoint, is_deep=True) == []
        and f"resuming from {checkpoint}" in Path(f"{part}.log").read_text()
    )
    assert losses_in(part) == losses_in(whole) and len(losses_in(part)) == 4
    assert losses_in(part) == pytest.approx(losses_in(forked / "one")[:4], abs=1e-4)
    assert (part / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


def test_a_step_of_a_sharded_model_that_is_not_finite_is_not_applied(forked):
    run_dir = check_ended(forked, "not finite")
    assert json.loads((run_dir / "run.json").read_text())["result"]["skipped_steps"] == 1
    assert all(parameter.isfinite().all() for parameter in load_file(run_dir / "final/model.safetensors").values())


def test_a_sharded_model_with_nothing_left_to_train_is_refused_in_one_line(forked):
    check_ended(forked, "at the end", 2)
    log = (forked / "at the end.log").read_text()
    assert log.count("error: ") == 1 and "is at the last step, and a sharded model" in log and "Traceback" not in log


@pytest.mark.parametrize("name", ["to rank 0", "to all of rank 1"])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(forked, name):
    """Also where it ends no data worker although all processes of the rank get it, as from torchrun, and get it twice,
    as from a scheduler too."""
    run_dir = check_ended(forked, name, SIGNALS[name][-1])
    newest = list_checkpoints(run_dir)[0]
    assert newest.name == "checkpoint-4"  # sent at the end of step 3, received at the end of step 4
    assert problems_of(newest, is_deep=True) == [] and (newest / "rng_state_1.pth").is_file()
    assert position_in(newest)["rows"] == 16
    assert not (run_dir / "final").exists()


@pytest.mark.parametrize("name", ["twice in a step", "twice in an evaluation"])
def test_a_second_one_ends_at_once_and_leaves_what_was_committed(forked, name):
    saved = list_checkpoints(check_ended(forked, name, SIGNALS[name][-1]))
    assert (forked / f"{name}.log").read_text().count("saving a checkpoint after this step") == 1
    assert [path.name for path in saved] == ["checkpoint-4", "checkpoint-2"]
    assert all(problems_of(path, is_deep=True) == [] for path in saved)


def test_a_guard_that_stops_two_ranks_gives_3(forked):
    ended = json.loads((forked / "stopped.json").read_text())
    assert ended["code"] == 3 and "loss_off_reference" in ended["reason"]
    assert list(check_ended(forked, "stopped", 3).glob("checkpoint-*/stream_state.json"))


# --- exit codes


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([(1, 4, "truncated file"), (0, 143, "interrupted")], 4),  # torchrun ended rank 0 for rank 1's failure
        ([(1, 4, "truncated file"), (0, 1, "connection closed")], 4),  # and so did a collective that lost its peer
        ([(1, 1, "unexpected error"), (0, 2, "no such file")], 2),
        ([(0, 3, "stopped"), (1, 143, "interrupted")], 3),
        ([(0, 143, "SIGTERM"), (0, 143, "interrupted while not training")], 143),
    ],
)
def test_the_rank_that_failed_first_says_why(monkeypatch, tmp_path, words, kept):
    monkeypatch.setenv("RECIPE_EXIT_FILE", str(tmp_path / "asked.json"))
    (tmp_path / "asked.json").touch()  # as mktemp leaves it
    for rank, code, reason in words:
        monkeypatch.setenv("RANK", str(rank))
        write_exit(code, reason, tmp_path)
    for name in ("asked.json", "exit.json"):
        found = json.loads((tmp_path / name).read_text())
        last = [reason for _, code, reason in words if code == kept][-1]
        assert (found["code"], found["reason"]) == (kept, last)
