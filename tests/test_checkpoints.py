"""Checkpoints: committed whole or not at all, verified before they are loaded, on the lineage of the run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from recipe import checkpoints
from recipe.__main__ import run
from recipe.checkpoints import choose, clean, commit, list_checkpoints, problems_of, read_manifest, rotate
from recipe.errors import UserError
from recipe.guards.records import read_lines
from recipe.rundir import choose_output_dir
from tests.benchmarks.fault_run import write_setting

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "stream_state.json",
)
LINEAGE = [{"part": "a", "began_from": None, "step": 0}]


def write_files(output_dir: Path, step: int) -> Path:
    staged = checkpoints.staging_of(output_dir, step)
    (staged / "folder").mkdir(parents=True)
    for number, name in enumerate((*FILES, "folder/shard.bin")):
        (staged / name).write_bytes(bytes([step, number]) * 50)
    return staged


def make(output_dir: Path, step: int, lineage=LINEAGE) -> Path:
    return commit(write_files(output_dir, step), lineage, {"torch": "2"})


# --- committing


def test_every_file_is_on_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.rename

    def traced_sync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def traced_rename(source, target):
        calls.append("rename")
        rename(source, target)

    staged = write_files(tmp_path, 3)
    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(os, "rename", traced_rename)
    target = commit(staged, LINEAGE, {})
    *files, manifest, folder, top, renamed, parent = calls
    assert sorted(files) == sorted(str(staged / name) for name in (*FILES, "folder/shard.bin"))
    assert manifest == str(staged / "manifest.json")
    assert (folder, top, renamed, parent) == (str(staged / "folder"), str(staged), "rename", str(tmp_path))
    assert target == tmp_path / "checkpoint-3" and problems_of(target, is_deep=True) == []


def test_a_name_is_never_written_twice(tmp_path):
    target = make(tmp_path, 3)
    before = read_manifest(target)
    with pytest.raises(FileExistsError):
        make(tmp_path, 3, [{"part": "b", "began_from": None, "step": 0}])
    assert read_manifest(target) == before and problems_of(target, is_deep=True) == []


DELETED = ["deleted-checkpoint-1"]
PHASES = {  # where the process ends -> whether checkpoint-3 is there afterwards, and what is left
    "files": ("checkpoints._sync_and_hash = die", False, ["checkpoint-3"]),
    "manifest": ("checkpoints._render = die", False, ["checkpoint-3"]),
    "before rename": ("checkpoints.os.rename = die", False, ["checkpoint-3"]),
    "after rename": ("rename = os.rename; checkpoints.os.rename = lambda *a: (rename(*a), die())", True, []),
    "before deleting": ("checkpoints.rotate = die", True, []),
    "deleting": ("checkpoints.shutil.rmtree = lambda p: (os.remove(p / 'optimizer.pt'), die())", True, DELETED),
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase_a_whole_checkpoint_is_found(tmp_path, phase):
    how, is_committed, left = PHASES[phase]
    for step in (1, 2):
        make(tmp_path, step)
    staged = write_files(tmp_path, 3)
    script = f"""
import os, pathlib, signal
from recipe import checkpoints
def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)
{how}
checkpoints.commit(pathlib.Path({str(staged)!r}), {LINEAGE!r}, {{}})
checkpoints.rotate(pathlib.Path({str(tmp_path)!r}), 2, None, {LINEAGE!r}, 3)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -9
    assert choose("latest", tmp_path).name == ("checkpoint-3" if is_committed else "checkpoint-2")
    assert get_last_checkpoint(str(tmp_path)) == str(choose("latest", tmp_path))  # a stock Trainer takes the same
    assert clean(tmp_path) == left and not (tmp_path / ".unfinished").exists()
    assert all(problems_of(path, is_deep=True) == [] for path in list_checkpoints(tmp_path))
    make(tmp_path, 4)


# --- rotating


def names_in(output_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(output_dir)][::-1]


def test_the_oldest_go_but_never_the_newest_or_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    rotate(tmp_path, None, None, LINEAGE, 4)
    assert len(names_in(tmp_path)) == 4
    assert not rotate(tmp_path, 3, str(tmp_path / "checkpoint-1"), LINEAGE, 4)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert rotate(tmp_path, 1, str(tmp_path / "checkpoint-1"), LINEAGE, 5)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert not rotate(tmp_path, 1, None, LINEAGE, 5)
    assert names_in(tmp_path) == ["checkpoint-4"]


def test_the_last_one_after_which_a_step_was_finite_stays(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    assert rotate(tmp_path, 1, None, LINEAGE, 2)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    assert checkpoints.abandon_unproven(tmp_path, 2, LINEAGE) == (
        tmp_path / "checkpoint-1",
        ["abandoned/checkpoint-4"],
    )
    assert checkpoints.abandon_unproven(tmp_path, 1, LINEAGE) == (None, [])
    assert names_in(tmp_path) == ["checkpoint-1"]


def test_what_is_not_whole_does_not_count(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-3/optimizer.pt").unlink()
    (tmp_path / "checkpoint-9").mkdir()  # of another tool
    rotate(tmp_path, 2, None, LINEAGE, 4)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-9"]
    rotate(tmp_path, 1, None, LINEAGE, 4)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-9"]


def test_what_is_not_of_the_run_is_never_deleted(tmp_path):
    make(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-best-5")
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-005")
    for name in ("checkpoint-", "checkpoint-\u00b2", "checkpoint--5", "checkpoint-5 (copy)"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    make(tmp_path / "elsewhere", 6)
    (tmp_path / "checkpoint-6").symlink_to(tmp_path / "elsewhere/checkpoint-6")
    make(tmp_path, 7, [{"part": "of another run", "began_from": None, "step": 0}])
    assert names_in(tmp_path) == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
    before = {path.name for path in tmp_path.iterdir()}
    make(tmp_path, 8)
    rotate(tmp_path, 1, None, LINEAGE, 9)
    assert {path.name for path in tmp_path.iterdir()} == before - {"checkpoint-5"} | {"checkpoint-8"}
    assert (tmp_path / "elsewhere/checkpoint-6").is_dir()


def test_checkpoints_without_optimizer_are_rotated_too(tmp_path):
    make(tmp_path, 1)
    for step in (2, 3):
        staged = write_files(tmp_path, step)
        (staged / "optimizer.pt").unlink()
        commit(staged, LINEAGE, {})
    rotate(tmp_path, 1, None, LINEAGE, 9)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-3"]  # the last one to resume from
    (tmp_path / "checkpoint-1").rename(tmp_path / "away")
    with pytest.raises(
        UserError, match=r"none to resume from \(checkpoint-3: optimizer was not saved.*model_name_or_path"
    ):
        choose("auto", tmp_path)


# --- verifying


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": (lambda path: flip(path, 333), "is damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b" "), "bytes of"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "missing": (Path.unlink, "missing"),
    "renamed": (lambda path: path.rename(path.with_suffix(".x")), "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_of_each_file_is_found_and_the_older_one_taken(tmp_path, damage, caplog):
    action, words = DAMAGES[damage]
    whole, newest = make(tmp_path, 1), make(tmp_path, 2)
    shutil.copytree(newest, tmp_path / "copy")
    for name in (*FILES, "folder/shard.bin", "manifest.json"):
        action(newest / name)
        problems = problems_of(newest, is_deep=True)
        expected = words if name != "manifest.json" or words == "missing" else "is damaged"
        assert problems and any(name in problem and expected in problem for problem in problems)
        caplog.clear()
        assert choose("latest", tmp_path) == choose("auto", tmp_path) == whole
        assert f"passed over {newest}" in caplog.text and name in caplog.text
        with pytest.raises(UserError, match=name) as refused:
            choose(str(newest), tmp_path)
        assert len(str(refused.value).splitlines()) == 1
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "copy", newest)
    assert problems_of(newest, is_deep=True) == []


def test_every_byte_of_the_manifest_counts(tmp_path):
    manifest = make(tmp_path, 1) / "manifest.json"
    text = manifest.read_bytes()
    for byte in range(len(text)):
        flip(manifest, 8 * byte + byte % 8)
        assert read_manifest(manifest.parent) is None
        manifest.write_bytes(text)
    assert read_manifest(manifest.parent)["step"] == 1


def test_foreign_files_another_name_and_no_manifest(tmp_path):
    path = make(tmp_path, 1)
    (path / "folder/more.bin").write_bytes(b"x")
    assert problems_of(path) == ["folder/more.bin is foreign"]
    (path / "folder/more.bin").unlink()
    for name in (".DS_Store", "folder/._shard.bin", "Thumbs.db", ".ipynb_checkpoints/x"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
    assert problems_of(path, is_deep=True) == []
    path.rename(tmp_path / "checkpoint-5")
    assert problems_of(tmp_path / "checkpoint-5") == ["manifest.json is of step 1: its name was checkpoint-1"]
    assert problems_of(tmp_path) == ["manifest.json missing: the recipe did not commit it"]
    assert problems_of(tmp_path / "nowhere") == ["no such folder"]


UNREADABLE = {
    "dangling link": lambda file: file.symlink_to("/nowhere/optimizer.pt"),
    "link to itself": lambda file: file.symlink_to(file.name),
    "folder": Path.mkdir,
    "none": lambda file: None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["optimizer.pt", "manifest.json"])
def test_a_file_that_cannot_be_read_is_a_damage(tmp_path, kind, name, caplog):
    whole, newest = make(tmp_path, 1), make(tmp_path, 2)
    (newest / name).unlink()
    UNREADABLE[kind](newest / name)
    assert choose("auto", tmp_path) == whole
    assert f"passed over {newest}: {name}" in caplog.text


@pytest.mark.parametrize("place", ["checkpoints._hash_of", "Path.stat", "Path.is_dir", "Path.rglob"])
def test_a_disk_that_fails_while_it_is_read_is_a_damage(tmp_path, monkeypatch, place):
    whole, newest = make(tmp_path, 1), make(tmp_path, 2)
    owner, method = (checkpoints, "_hash_of") if place == "checkpoints._hash_of" else (Path, place.split(".")[1])
    real = getattr(owner, method)

    def fail(path, *arguments, **known):
        if newest in (path, *path.parents) and path.name != "manifest.json":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **known)

    monkeypatch.setattr(owner, method, fail)
    assert "Input/output error" in problems_of(newest, is_deep=True)[0]
    assert choose("auto", tmp_path) == whole


OTHER_FORMS = [{"files": None}, {"files": {"a": 1}}, {"files": {"a": {}}}, {"lineage": None}, {"lineage": []}]
OTHER_FORMS += [{"lineage": [{}]}, {"lineage": [1]}, {"step": "1"}, {"step": None}]


@pytest.mark.parametrize("change", OTHER_FORMS, ids=str)
def test_a_manifest_of_another_form_is_damaged(tmp_path, change):
    path = make(tmp_path, 1)
    known = {name: value for name, value in {**read_manifest(path), **change}.items() if value is not None}
    (path / "manifest.json").write_text(checkpoints._render(known))
    assert problems_of(path) == ["manifest.json is damaged"]
    (path / "manifest.json").write_text(checkpoints._render(change))
    assert problems_of(path) == ["manifest.json is damaged"]


def test_what_was_saved_without_the_optimizer_cannot_be_resumed(tmp_path):
    staged = write_files(tmp_path, 1)
    (staged / "optimizer.pt").unlink()
    assert "optimizer was not saved" in problems_of(commit(staged, LINEAGE, {}))[0]


# --- choosing


def test_auto_begins_where_there_is_nothing_and_refuses_where_all_is_damaged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert choose("auto", tmp_path / "new") is None and choose(None, tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        choose("latest", tmp_path)
    path = make(tmp_path, 1)
    assert choose("auto", tmp_path) == path and f"resuming from {path}, step 1" in caplog.text
    (path / "scheduler.pt").unlink()
    with pytest.raises(
        UserError, match=r"holds 1 checkpoint, none to resume from \(checkpoint-1: scheduler.pt missing\)"
    ):
        choose("auto", tmp_path)


def test_a_part_knows_those_before_it(tmp_path):
    def begin(checkpoint):
        lineage = checkpoints.begin_part(checkpoint)
        (tmp_path / "run.json").write_text(json.dumps({"lineage": lineage}))
        return lineage

    first = begin(None)
    for step in (8, 16, 24):
        make(tmp_path, step, first)
    second = begin(tmp_path / "checkpoint-16")  # rolled back; killed before it could move 24 aside
    assert [(each["began_from"], each["step"]) for each in second] == [(None, 0), ("checkpoint-16", 16)]
    assert choose("latest", tmp_path).name == "checkpoint-16"
    assert checkpoints.abandon(tmp_path, 16) == ["abandoned/checkpoint-24"]
    make(tmp_path, 24, second)
    third = begin(tmp_path / "checkpoint-24")
    make(tmp_path, 32, third)
    assert choose("latest", tmp_path).name == "checkpoint-32"
    make(tmp_path, 40, checkpoints.begin_part(None))  # copied here from another run
    assert choose("latest", tmp_path).name == "checkpoint-32"
    begin(tmp_path / "checkpoint-8")
    assert choose("latest", tmp_path).name == "checkpoint-8"
    assert checkpoints.abandon(tmp_path, 8)[-1] == "abandoned/checkpoint-16"
    assert sorted(path.name for path in (tmp_path / "abandoned").iterdir()) == [
        "2", "checkpoint-16", "checkpoint-24", "checkpoint-32", "checkpoint-40",
    ]  # fmt: skip
    shutil.move(tmp_path / "abandoned/2/checkpoint-24", tmp_path)
    assert choose(str(tmp_path / "checkpoint-24"), tmp_path) == tmp_path / "checkpoint-24"


BROKEN = ['{"lineage": [{}]}', '{"lineage": [1]}', '{"lineage": 5}', '{"lineage": null}', '{"lineage": []}', "[]", "{"]
BROKEN += ["[" * 100_000, "\udcff", "", None]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: str(text)[:20])
def test_without_run_json_the_manifests_say_which_is_the_line(tmp_path, text, caplog):
    first = checkpoints.begin_part(None)
    for step in (8, 16):
        make(tmp_path, step, first)
    second = checkpoints.begin_part(tmp_path / "checkpoint-8")
    if text is not None:
        (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    assert choose("latest", tmp_path).name == "checkpoint-16"
    assert f"{tmp_path}/run.json" in caplog.text and "the lineage is taken from checkpoint-16" in caplog.text
    make(tmp_path, 24, second)  # 16 is of the branch that was left
    for wanted in ("latest", "auto"):
        with pytest.raises(UserError, match=r"of several branches; name .*/checkpoint-24"):
            choose(wanted, tmp_path)
    assert choose(str(tmp_path / "checkpoint-16"), tmp_path).name == "checkpoint-16"


def test_one_of_another_run_is_named_as_such(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"lineage": LINEAGE}))
    path = make(tmp_path, 8, checkpoints.begin_part(None))
    with pytest.raises(UserError, match=f"the run does not come from it.*--resume_from_checkpoint {path}"):
        choose("auto", tmp_path)


def test_one_that_was_moved_aside_is_to_be_moved_back(tmp_path):
    for name in ("checkpoint-8", "2/checkpoint-8"):
        moved = tmp_path / "abandoned" / name
        moved.mkdir(parents=True)
        (tmp_path / "run.json").touch()
        with pytest.raises(UserError, match=f"mv {moved} {tmp_path}/checkpoint-8 .* --output_dir {tmp_path} "):
            choose_output_dir(str(tmp_path), False, str(moved))


# --- whole runs


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, in `run`, and of its `config.json`."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_setting(folder, max_steps=6, save_steps=1, eval_strategy="no", eval_steps=None)
    assert run(["train", str(config), "--output_dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def words(finished, tmp_path) -> list[str]:
    """The command of the same run in another place."""
    return ["train", str(finished / "config.json"), "--output_dir", str(tmp_path / "run")]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run_dir / "steps.jsonl")]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final/model.safetensors").read_bytes()


def test_rolled_back_and_killed_it_goes_on_from_where_it_was_rolled_back_to(
    words, finished, tmp_path, monkeypatch, caplog
):
    shutil.copytree(finished / "run", tmp_path / "run")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recipe.checkpoints.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            run([*words, "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-2")])
    assert names_in(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]
    assert run([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert "removed what a killed run left half written or half deleted: checkpoint-3" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["resumed_from"].endswith("checkpoint-2")
    assert losses(tmp_path / "run") == losses(finished / "run")
    assert weights(tmp_path / "run") == weights(finished / "run")
    assert (tmp_path / "run/abandoned/checkpoint-6").is_dir()
    lineage = read_manifest(tmp_path / "run/checkpoint-6")["lineage"]
    assert [each["began_from"] for each in lineage] == [None, "checkpoint-2"]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


STATES = {
    "trainer_state.json": [b"[]", b'{"global_step": 4}', b'{"global_step": "3"}', b'{"global_step": 3, "epoch": []}'],
    "stream_state.json": [b"5", b"{}", "position"],
    "optimizer.pt": [b"text", Payload(), {"state": 1}],
    "scheduler.pt": [Payload(), [1]],
    "rng_state.pth": [Payload(), {}],
    "pytorch_model.bin": [Payload()],
}  # fmt: skip
CASES = [(name, content) for name, contents in STATES.items() for content in contents]


@pytest.mark.parametrize(("name", "content"), CASES, ids=lambda each: str(each)[:24])
def test_what_somebody_wrote_under_right_hashes_is_refused(
    words, finished, tmp_path, monkeypatch, capsys, name, content
):
    monkeypatch.chdir(tmp_path)
    staged = checkpoints.staging_of(tmp_path / "run", 3)
    shutil.copytree(finished / "run/checkpoint-3", staged)
    lineage = read_manifest(staged)["lineage"]
    if name == "pytorch_model.bin":
        (staged / "model.safetensors").unlink()
    if content == "position":
        saved = json.loads((staged / name).read_text())
        content = json.dumps({**saved, "position": {**saved["position"], "lanes": [[{}]]}}).encode()
    (staged / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, staged / name)
    checkpoint = commit(staged, lineage, {})
    assert run([*words, "--resume_from_checkpoint", "auto"]) == 2
    error = capsys.readouterr().err.strip()
    what = {"optimizer.pt": "optimizer", "pytorch_model.bin": "the weights"}.get(name, name)
    assert f"{checkpoint}: " in error and f"{what}" in error and "cannot be loaded" in error, error
    assert len(error.splitlines()) <= 3 and "weights_only" not in error
    assert not (tmp_path / "executed").exists()


def test_a_stock_trainer_resumes_from_it(finished, tmp_path):
    checkpoint = finished / "run/checkpoint-3"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 4
    arguments = TrainingArguments(str(tmp_path / "stock"), max_steps=5, use_cpu=True, report_to=[], disable_tqdm=True)
    arguments.ignore_data_skip = True
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 5
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {5}


def test_weights_that_are_not_finite_are_never_committed(words, tmp_path, monkeypatch, caplog):
    from recipe.trainer import StreamCallback

    def break_weights(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = float("nan")

    monkeypatch.setattr(StreamCallback, "on_step_end", break_weights)
    run([*words, "--save_total_limit", "2"])
    assert names_in(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert "step 4 | no checkpoint: weights or optimizer state are not finite" in caplog.text


@pytest.mark.parametrize("place", ["recipe.checkpoints.commit", "recipe.guards.session.write_session"])
def test_a_disk_that_is_full_costs_one_checkpoint(words, tmp_path, monkeypatch, caplog, place):
    from recipe.guards import session

    real = {"recipe.checkpoints.commit": commit, "recipe.guards.session.write_session": session.write_session}[place]

    def full(folder, *facts):
        if folder.name == "checkpoint-3":
            raise OSError(28, "No space left on device")
        return real(folder, *facts)

    monkeypatch.setattr(place, full)
    assert run(words) == 0
    assert "step 3 | no checkpoint, training goes on: [Errno 28] No space left on device" in caplog.text
    assert names_in(tmp_path / "run") == [f"checkpoint-{step}" for step in (1, 2, 4, 5, 6)]
    assert not list((tmp_path / "run/.unfinished").iterdir())


def test_an_old_one_that_cannot_be_deleted_costs_nothing(words, tmp_path, monkeypatch, caplog):
    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("recipe.checkpoints.rotate", read_only)
    assert run([*words, "--save_total_limit", "1"]) == 0
    assert len(names_in(tmp_path / "run")) == 6
    assert "an older checkpoint could not be deleted: [Errno 30]" in caplog.text


def test_one_command_for_jobs_that_are_killed(words, finished, tmp_path, monkeypatch):
    auto = [*words, "--resume_from_checkpoint", "auto"]

    def killed(staged, *facts):
        if staged.name == killed.at:
            raise KeyboardInterrupt
        return commit(staged, *facts)

    monkeypatch.setattr("recipe.checkpoints.commit", killed)
    for killed.at in ("checkpoint-1", "checkpoint-3", "checkpoint-5"):
        with pytest.raises(KeyboardInterrupt):
            run(auto)
    killed.at = None
    assert run(auto) == 0
    assert losses(tmp_path / "run") == losses(finished / "run")
    assert weights(tmp_path / "run") == weights(finished / "run")


def test_killed_after_the_last_step_it_only_writes_its_results(words, finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    assert run([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert weights(tmp_path / "run") == weights(finished / "run")
    results = [json.loads((path / "run.json").read_text())["result"] for path in (tmp_path / "run", finished / "run")]
    names = ("steps", "tokens_seen", "eval_loss", "tokens_by_source", "verdict")
    assert [results[0][name] for name in names] == [results[1][name] for name in names]


def test_a_stop_that_is_heard_while_saving_saves_no_second_time(words, tmp_path, monkeypatch):
    from recipe.guards import RegressionCallback

    committed, begin = [], RegressionCallback.begin_save

    def heard(self, control):
        begin(self, control)
        if self._trainer.state.global_step == 3:
            control.should_save = control.should_training_stop = True

    def count(staged, *facts):
        committed.append(staged.name)
        return commit(staged, *facts)

    monkeypatch.setattr(RegressionCallback, "begin_save", heard)
    monkeypatch.setattr("recipe.checkpoints.commit", count)
    assert run(words) == 0
    assert committed == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_is_named_by_its_final_place(write_config, tmp_path):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--save_total_limit", "1"]
    assert run(["train", write_config(), *best]) == 0
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run/checkpoint-6") and state["best_global_step"] == 6
    assert names_in(tmp_path / "run") == ["checkpoint-6"]
