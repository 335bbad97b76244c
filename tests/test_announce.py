"""What a run says before its first logged loss."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipe import announce, threads
from recipe.announce import FirstStepsCallback, announce_run, announce_training
from recipe.arguments import parse_config
from recipe.train import open_run


def test_a_run_that_moves_and_a_trial_are_announced(write_config, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    path = Path(write_config(output_dir="runs/config", warmup_steps=5))
    values = json.loads(path.read_text())
    del values["output_dir"]
    path.write_text(json.dumps(values))
    (tmp_path / "runs/config").mkdir(parents=True)
    (tmp_path / "runs/config/run.json").write_text("{}")
    config = parse_config(path, ["--max_steps", "2"])
    assert open_run(config) == Path("runs/config-2") and not caplog.text  # what refuses the run comes first
    announce_run(config, Path("runs/config-2"))
    assert "runs/config holds a run already; this one is in runs/config-2" in caplog.text
    assert "its 2 steps end within the warm-up of 5, at 0.4 of the rate" in caplog.text


@pytest.mark.parametrize("compiles", [False, True])
def test_the_wait_before_step_1_is_announced(compiles, caplog):
    caplog.set_level("INFO")
    announce_training(SimpleNamespace(training=SimpleNamespace(torch_compile=compiles)))
    assert "before step 1" in caplog.text and ("compiles the model" in caplog.text) == compiles


def test_steps_are_told_while_no_loss_is(monkeypatch, caplog):
    """A second each: a line every 5 s, in an evaluation ever more seldom, none once a loss was logged, none on a
    terminal or on another rank."""
    caplog.set_level("INFO")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(announce.time, "perf_counter", lambda: clock.now)

    def run(is_terminal=False, is_main=True, logged_at=13):
        caplog.clear()
        monkeypatch.setattr(announce.sys.stderr, "isatty", lambda: is_terminal, raising=False)
        state = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=is_main)
        callback, args = FirstStepsCallback(), SimpleNamespace(logging_steps=13)
        callback.on_train_begin(args, state, None)
        for step in range(1, 30):
            clock.now, state.global_step = clock.now + 1, step
            callback.on_step_end(args, state, None)
            if step == logged_at:
                callback.on_log(args, state, None)
        for _ in range(2):
            for _ in range(25):
                clock.now += 1
                callback.on_prediction_step(args, state, None)
            callback.on_evaluate(args, state, None)
        return [record.getMessage().split(";")[0] for record in caplog.records]

    assert run() == ["step 6 of 100", "step 12 of 100", "step 29 of 100", "step 29 of 100"]
    assert run(is_terminal=True) == run(is_main=False) == []


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_the_users_own_waiting_wins(own, monkeypatch):
    environment = dict(own)
    monkeypatch.setattr(threads, "os", SimpleNamespace(environ=environment))
    threads.choose_waiting()
    assert environment == (own or threads.WAITING)
