"""`report_to`: what TensorBoard, trackio and wandb hold after a training. TensorBoard and trackio are real."""

import importlib.machinery
import json
import math
import os
import sys
import types

import pytest

from recipe.__main__ import run
from recipe.guards import Finding, RegressionCallback
from recipe.guards.trackers import describe, numbers_of
from recipe.guards.trajectory import Point, Reference
from tests.test_callback import unshifted
from tests.test_own_run import make_trainer

NUMBERS = {"tokens_per_second", "ngram_floor", "expected_loss", "expected_loss_low", "expected_loss_high"}
FACTS = {"vocab_size": 200}


@pytest.fixture
def reference(tmp_path):
    """Of every run with this vocabulary, over all its tokens."""
    path = tmp_path / "reference.json"
    points = [{"tokens": 1, "loss": 5.0, "low": 0.0, "high": 9.0}, {"tokens": 10**6, "loss": 5.0, "low": 0, "high": 9}]
    path.write_text(json.dumps({"name": "r", "description": "", "belongs_to": FACTS, "points": points}))
    return str(path)


def train(tmp_path, reference, tracker: str, steps=6, **changes):
    """Four findings' worth of a broken run: its labels are not shifted. Logged at every step."""
    watched = make_trainer(tmp_path / "run", steps, logging_steps=1, report_to=[tracker], disable_tqdm=True, **changes)
    watched.model.loss_function = unshifted
    guards = RegressionCallback(trajectory=reference)
    watched.add_callback(guards)
    watched.train()
    return watched, guards


def assert_complete(series: dict, guards: RegressionCallback) -> None:
    """`series`: name -> step -> value. Every step's own numbers, the last one's too."""
    records = {record["step"]: record for record in guards.history}
    assert set(records) == set(range(1, 7))
    for name in NUMBERS:
        assert set(series[f"train/{name}"]) == set(records), name
    for step, record in records.items():
        assert math.isclose(series["train/ngram_floor"][step], record["floor"], rel_tol=1e-6)
        assert math.isclose(series["train/tokens_per_second"][step], record["tokens_per_second"], rel_tol=1e-6)
        assert math.isclose(series["train/loss"][step], record["loss"], rel_tol=1e-6)
        assert (series["train/expected_loss"][step], series["train/expected_loss_high"][step]) == (5.0, 9.0)


def by_step(rows) -> dict:
    series: dict = {}
    for row in rows:
        for name, value in row.items():
            series.setdefault(name, {})[row.get("train/global_step")] = value
    return series


def test_tensorboard(tmp_path, reference):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, guards = train(tmp_path, reference, "tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    assert_complete({name: {each.step: each.value for each in events.Scalars(name)} for name in names}, guards)
    texts = [text for each in events.Tensors("train/finding/text_summary") for text in each.tensor_proto.string_val]
    assert [text.decode() for text in texts] == [describe(finding) for finding in guards.findings]
    assert [each.step for each in events.Tensors("train/finding/text_summary")] == [f.step for f in guards.findings]


def test_trackio(tmp_path, reference, capsys):
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_project_db_path("p").is_relative_to(os.environ["TRACKIO_DIR"])
    _, guards = train(tmp_path, reference, "trackio", project="p", run_name="r")
    (found,) = trackio.Api().runs("p")
    rows = SQLiteStorage.get_logs("p", found.name)
    assert_complete(by_step(rows), guards)
    assert [row["train/finding"] for row in rows if "train/finding" in row] == [*map(describe, guards.findings)]
    alarms = [finding for finding in guards.findings if finding.severity != "info"]
    alerts = {(alert["title"], alert["level"], alert["text"]) for alert in trackio.Api().alerts("p")}
    levels = {"warning": "warn", "error": "error"}
    assert alerts == {(f"{f.severity}: {f.id}", levels[f.severity], describe(f)) for f in alarms}
    assert "[TRACKIO" not in capsys.readouterr().out  # the log has the finding already


# --- wandb: a stand-in


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def wandb(monkeypatch):
    """What transformers and the guards call of it. `logged`, `alerts`: what it was given."""

    def module(name: str, **values):
        made = types.ModuleType(name)
        made.__dict__.update(values, __spec__=importlib.machinery.ModuleSpec(name, None), __path__=[])
        monkeypatch.setitem(sys.modules, name, made)
        return made

    logged, alerts = [], []
    current = types.SimpleNamespace(summary={}, _label=lambda code: None)
    made = module(
        "wandb",
        run=current,
        config=Config(),
        logged=logged,
        alerts=alerts,
        log=logged.append,
        init=lambda **values: current,
        alert=lambda **values: alerts.append(values),
        AlertLevel=types.SimpleNamespace(WARN="WARN", ERROR="ERROR"),
    )
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        module(name)
    module("wandb.sdk.lib.config_util", ConfigError=type("ConfigError", (Exception,), {}))
    return made


def test_wandb(tmp_path, reference, wandb):
    _, guards = train(tmp_path, reference, "wandb")
    series = by_step(wandb.logged)
    assert_complete(series, guards)
    texts = [row["train/finding"] for row in wandb.logged if "train/finding" in row]
    assert texts == [*map(describe, guards.findings)]
    alarms = [finding for finding in guards.findings if finding.severity != "info"]
    assert [(each["title"], each["level"]) for each in wandb.alerts] == [
        (f"{f.severity}: {f.id}", {"warning": "WARN", "error": "ERROR"}[f.severity]) for f in alarms
    ]
    assert series["train/findings"][alarms[-1].step] == len(alarms)


def test_what_was_found_before_a_resume_is_not_sent_again(tmp_path, reference, wandb):
    train(tmp_path, reference, "wandb", save_strategy="steps", save_steps=4)
    known = [row["train/finding"] for row in wandb.logged if "train/finding" in row]
    wandb.logged.clear()
    again = make_trainer(tmp_path / "run", 8, logging_steps=1, report_to=["wandb"], disable_tqdm=True)
    again.model.loss_function = unshifted
    again.add_callback(RegressionCallback(trajectory=reference))
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    resumed = [row["train/finding"] for row in wandb.logged if "train/finding" in row]
    assert not set(known[:1]) & set(resumed)
    assert [row["train/global_step"] for row in wandb.logged if "train/ngram_floor" in row] == [5, 6, 7, 8]


# --- a tracker that raises


def test_numbers_of_the_guards_that_a_tracker_refuses_cost_the_tracker_alone(tmp_path, reference, wandb, caplog):
    def refuse(row):
        if "train/tokens_per_second" in row:
            raise ConnectionError("no network\nat all")
        wandb.logged.append(row)

    wandb.log = refuse
    watched, guards = train(tmp_path, reference, "wandb")
    assert watched.state.global_step == 6 and guards.failure is None
    (line,) = [record.getMessage() for record in caplog.records if "gets nothing any more" in record.getMessage()]
    assert line == "Wandb gets nothing any more, the training goes on: ConnectionError: no network at all"
    assert {"train/loss"} <= wandb.logged[-2].keys()  # Trainer's own calls are its own


@pytest.mark.parametrize("method", ["__init__", "add_scalar"])
def test_in_the_recipes_run_no_fault_of_a_tracker_ends_it(write_config, monkeypatch, caplog, capsys, method):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    def fail(*arguments, **values):
        print("printed by a tracker")
        raise ConnectionError("no network")

    monkeypatch.setattr(SummaryWriter, method, fail)
    assert run(["train", write_config(report_to="tensorboard", logging_steps=1), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["exit_code"] == 0 and "printed" not in out  # stdout is the JSON alone
    assert caplog.text.count("gets nothing any more") == 1


# --- plain values


def test_numbers_are_means_and_the_reference_at_the_last_step():
    records = [
        {"step": 1, "tokens_seen": 10, "tokens_per_second": 1.0, "floor": 3.0},
        {"step": 2, "tokens_seen": 100, "tokens_per_second": 3.0},
    ]
    assert numbers_of(records, None) == {"tokens_per_second": 2.0, "ngram_floor": 3.0}
    reference = Reference("r", "", {}, (Point(10, 4.0, 3.0, 5.0), Point(1000, 2.0, 1.0, 3.0)))
    expected = {"expected_loss": 3.0, "expected_loss_low": 2.0, "expected_loss_high": 4.0}
    assert numbers_of(records, reference).items() >= expected.items()
    assert "expected_loss" not in numbers_of([{**records[0], "tokens_seen": 5}], reference)


def test_a_finding_in_words():
    finding = Finding("loss_spike", "warning", 3, 288, "a jump", "none", ("a bad batch", "x"), "wait")
    assert describe(finding) == (
        "warning: loss_spike at step 3: found a jump; expected none; likely: a bad batch; to do: wait"
    )
