"""Real ranks (gloo) under torchrun: the same run as one rank, one checkpoint for both, the right exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipe.__main__ import run
from recipe.guards.records import read_lines
from recipe.rundir import write_exit
from recipe.verdict import NOTHING_LEARNED

ROOT = Path(__file__).resolve().parent.parent


def launch(tmp_path, *words, num_ranks=2) -> dict:
    """Run the train command on several ranks; returns what rank 0 left in the exit file."""
    exit_file = tmp_path / "exit-file.json"
    environment = {**os.environ, "RECIPE_EXIT_FILE": str(exit_file), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["-m", "recipe"]
    done = subprocess.run([*command, "train", *words], env=environment, capture_output=True, text=True, timeout=300)
    assert exit_file.exists(), done.stderr[-3000:]
    return json.loads(exit_file.read_text())


def state_of(run_dir: Path) -> dict:
    """The last checkpoint's position in the stream and settings, without those that differ with ranks and workers."""
    state = json.loads((run_dir / "checkpoint-6/stream_state.json").read_text())
    return {name: value for name, value in state.items() if name != "free"}


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_two_ranks_are_the_same_run_as_one(write_config, tmp_path, num_workers):
    path = write_config()
    assert run(["train", path, "--output_dir", str(tmp_path / "one")]) == 0
    words = ["--per_device_train_batch_size", "2", "--dataloader_num_workers", str(num_workers)]
    ended = launch(tmp_path, path, "--output_dir", str(tmp_path / "two"), *words)
    assert ended["code"] == 0 and ended["reason"].startswith(NOTHING_LEARNED)  # six steps
    one, two = (read_lines(tmp_path / name / "steps.jsonl") for name in ("one", "two"))
    assert [record["tokens_seen"] for record in one] == [record["tokens_seen"] for record in two]
    # The same tokens summed in another order: fp32 rounds at 1e-7, Adam's first steps amplify it
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in two], abs=1e-4)
    evals = [read_lines(tmp_path / name / "evals.jsonl")[-1]["eval_loss"] for name in ("one", "two")]
    assert evals[0] == pytest.approx(evals[1], abs=1e-4)
    assert state_of(tmp_path / "one") == state_of(tmp_path / "two")

    # and one rank goes on from the two ranks' checkpoint
    more = ["--output_dir", str(tmp_path / "two"), "--resume_from_checkpoint", str(tmp_path / "two/checkpoint-3")]
    assert run(["train", path, *more]) == 0
    resumed = [record["loss"] for record in read_lines(tmp_path / "two/steps.jsonl")]
    assert resumed == pytest.approx([record["loss"] for record in one], abs=1e-4)


def test_a_guard_that_stops_two_ranks_gives_3(write_config, tmp_path):
    reference = {
        "name": "low",
        "description": "",
        "belongs_to": {},
        "window": 1,
        "points": [{"tokens": tokens, "loss": 1.0, "low": 0.9, "high": 1.1} for tokens in (1, 10**6)],
    }
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    words = ["--trajectory", str(tmp_path / "reference.json"), "--on_regression", "stop"]
    found = launch(tmp_path, write_config(), "--per_device_train_batch_size", "2", *words)
    assert found["code"] == 3 and "loss_off_reference" in found["reason"]
    assert list((tmp_path / "run").glob("checkpoint-*/stream_state.json"))


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


def test_a_users_mistake_on_two_ranks_gives_2(write_config, tmp_path):
    found = launch(tmp_path, write_config(), "--eval_skip", "5000")
    assert found["code"] == 2 and "has 300 documents" in found["reason"]
