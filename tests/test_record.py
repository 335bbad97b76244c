"""A reference comes from finished, healthy, clean runs of one config, and its band from their noise."""

import json
import subprocess

import numpy as np
import pytest

from recipe import rundir
from recipe.__main__ import run
from recipe.guards.off_reference import LossOffReference
from recipe.guards.trajectory import load_reference
from recipe.record import ARGUMENTS, DEVIATIONS, MIN_HALF_WIDTH, choose_steps, point_at


def write_run(path, seed=0, noise=0.1, **changes):
    """300 steps of a falling loss with a seeded, made-up noise."""
    path.mkdir()
    values = {
        "config_path": "demo.json",
        "finished": "2026-01-01",
        "is_dirty": False,
        "commit": "abc",
        "versions": {},
        "device": {},
        "model": {"parameters": 1000, "vocab_size": 100, "block_size": 8},
        "source": {"content_hash": "x"},
        "arguments": {**dict.fromkeys([*ARGUMENTS, "seed", "model_config"], 1), "optim": "adamw_torch"},
        "result": {"verdict": "healthy", "eval_loss": 3.0, "train_seconds": 1.0},
    }
    (path / "run.json").write_text(json.dumps({**values, **changes}))
    losses = [8 - i / 60 + noise * ((i * 7919 + seed * 104729) % 11 - 5) / 5 for i in range(300)]
    lines = [{"step": i + 1, "tokens_seen": 64 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return losses


def test_recorded_runs_and_new_ones_like_them_are_inside_a_broken_one_is_not(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"run{seed}", seed)
    assert (
        run(["trajectory", "record", str(tmp_path / "new.json"), str(tmp_path / "run0"), str(tmp_path / "run1")]) == 0
    )
    reference = load_reference(tmp_path / "new.json")
    assert reference.name == "new" and reference.belongs_to["tokens_per_step"] == 64
    assert reference.belongs_to["optimizer"] == "adamw"
    assert "this run has muon" in reference.mismatch({**reference.belongs_to, "optimizer": "muon"})
    steps, tokens = list(range(1, 301)), [64 * step for step in range(1, 301)]
    healthy = write_run(tmp_path / "run2", seed=2)
    broken = [loss * 0.8 for loss in healthy]

    def findings(losses):
        return [LossOffReference.judge(reference, now, tokens[:now], losses[:now]) for now in steps]

    assert not any(findings(healthy))
    assert any(findings(broken))


def test_the_band_is_recomputed_from_the_losses():
    curve = {"loss": np.array([5.0, 4.0] * 20), "tokens_seen": 64.0 * np.arange(1, 41)}
    point = point_at(20, [curve])
    deviation = 0.5270462766947299 * 1.25 / 10**0.5  # of ten losses 5, 4, 5, 4 ...; see record.py
    assert point["loss"] == 4.5 and point["tokens"] == 64 * 20
    assert point["high"] - point["loss"] == pytest.approx(DEVIATIONS * deviation, abs=1e-3)


def test_a_run_without_noise_still_has_a_band():
    curve = {"loss": np.full(40, 5.0), "tokens_seen": 64.0 * np.arange(1, 41)}
    assert point_at(20, [curve])["low"] == 5.0 - MIN_HALF_WIDTH


def test_steps_reach_from_the_first_window_to_the_end():
    steps = choose_steps(1000)
    assert steps[0] == 10 and steps[-1] == 1000 and steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result": {"verdict": "not to be trusted: x"}}, "verdict is not to be trusted"),
        ({"finished": None}, "finished, healthy runs"),
        ({"is_dirty": True}, "changed and not committed"),
        ({"model": {"parameters": 2000, "vocab_size": 100, "block_size": 8}}, "parameters differ"),
    ],
)
def test_other_runs_are_refused(tmp_path, capsys, changes, message):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", **changes)
    assert run(["trajectory", "record", str(tmp_path / "x.json"), str(tmp_path / "good"), str(tmp_path / "bad")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_code_that_is_not_that_of_the_commit(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(rundir, "ROOT", tmp_path)
    put = {"recipe/a.py": "1", "docs/b.md": "b"}
    for name, text in put.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    for name in ("recipe/configs/my.json", "tutorial/broken.py", "tutorial/my.txt", "runs/x/run.json", "my.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert rundir.describe_environment()["is_dirty"] is False
    for name in ("recipe/guards/new.py", "torch.py", "numpy/__init__.py", "recipe/a.py"):
        before = (tmp_path / name).read_text() if (tmp_path / name).exists() else None
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("2")
        assert rundir.changed_code() == [name] and rundir.describe_environment()["is_dirty"]
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_text(before)


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert run(["trajectory", "record", str(tmp_path / "x.json"), str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
