"""Used wrongly, failing or lacking something, the guards say why, blame the right one, and end no training."""

import logging
import threading

import numpy as np
import pytest
import torch
from transformers import Trainer

from recipe.guards import InitialLoss, LearningRate, RegressionCallback
from recipe.guards.checkpoint import read_session
from recipe.guards.guard import is_like
from recipe.guards.recording import record
from recipe.guards.run import was_trained
from recipe.guards.sandbox import loss_of, twin_of
from recipe.verdict import verdict
from test_callback import make_trainer, rows
from test_guards_on_runs import make_model


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "recipe.guards")

    def lines(level=logging.WARNING):
        own = [each for each in caplog.records if each.name == "recipe.guards" and each.levelno >= level]
        assert all(len(f"{each.levelname} recipe.guards | {each.getMessage()}") <= 160 for each in own)
        return [each.getMessage() for each in own]

    return lines


def train(trainer: Trainer, *callbacks: RegressionCallback) -> None:
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 6


def test_what_is_no_trainer_is_refused_at_once():
    with pytest.raises(TypeError, match="trainer is a transformers.Trainer, not 3"):
        RegressionCallback(trainer=3)


def test_another_trainer_than_the_one_that_trains(tiny_model, tmp_path, said):
    guards = RegressionCallback(trainer=make_trainer(tiny_model, tmp_path / "other"))
    train(make_trainer(tiny_model, tmp_path), guards)
    (line,) = said()
    assert "was given another Trainer" in line and "was given another Trainer" in guards.failure


def test_the_second_of_two_callbacks_is_no_clean_pass(tiny_model, tmp_path, said):
    guards = [RegressionCallback(), RegressionCallback()]
    train(make_trainer(tiny_model, tmp_path), *guards)
    assert guards[0].failure is None and "another RegressionCallback" in guards[1].failure
    assert len(said()) == 1 and verdict(guards[1], None).text.startswith("not judged: another RegressionCallback")


@pytest.mark.parametrize("place", ["recipe.guards.callback.find_trainer", "recipe.guards.callback.prepare_files"])
def test_a_fault_at_the_beginning_ends_no_training(tiny_model, tmp_path, monkeypatch, said, place):
    def fails(*arguments):
        raise OSError("a fault")

    monkeypatch.setattr(place, fails)
    guards = RegressionCallback()
    train(make_trainer(tiny_model, tmp_path), guards)
    assert guards.failure == "the guards failed with OSError: a fault" and "training goes on" in said()[0]


@pytest.mark.parametrize("method", ["probe", "close"])
def test_a_guard_that_fails_in_its_probe_or_at_the_end_says_so(tiny_model, tmp_path, monkeypatch, said, method):
    def fails(self, *arguments):
        raise RuntimeError("boom " * 60)

    monkeypatch.setattr(LearningRate, method, fails)
    guards = RegressionCallback()
    train(make_trainer(tiny_model, tmp_path), guards)
    (line,) = said()
    assert line.startswith("guard learning_rate_off failed") and "RuntimeError in test_honest_reasons.py:" in line
    assert ("learning_rate_off" in guards.cannot_judge) == (method == "probe") and guards.failure is None


def test_a_model_that_fails_in_a_probe_is_not_the_guards_fault(tiny_model, tmp_path, monkeypatch, said):
    def probe(self, batch):
        batch.model(input_ids=batch.inputs["input_ids"], labels=torch.zeros(3, dtype=torch.long))
        yield self.clear()

    monkeypatch.setattr(InitialLoss, "probe", probe)
    guards = RegressionCallback()
    train(make_trainer(tiny_model, tmp_path), guards)
    assert not said() and "way of this probe" in guards.not_applicable["init_loss_off"]


def test_a_model_that_was_trained_is_known_without_its_name(tmp_path, said):
    model = make_model(vocab_size=257)
    assert not was_trained(model)
    trainer = make_trainer(model, tmp_path, learning_rate=1e-2)
    guards = RegressionCallback()
    train(trainer, guards)
    again = make_model(vocab_size=257)
    again.load_state_dict(model.state_dict())
    assert was_trained(model) and was_trained(again)
    trainer.train()
    assert guards.findings == [] and "trained before" in guards.not_applicable["init_loss_off"]


def test_another_thread_is_not_given_the_recorded_embeddings(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path)
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in ("input_ids", "labels")}
    base = record(tiny_model, loss_of(twin_of(trainer), tiny_model, batch, None))
    other, outputs = make_model(1, vocab_size=257), []
    ids = batch["input_ids"].flip(0)
    expected = other(ids).logits

    def compute_loss():
        thread = threading.Thread(target=lambda: outputs.append(other(ids).logits))
        thread.start()
        thread.join()
        return tiny_model(**batch).loss

    record(tiny_model, compute_loss, base)
    assert torch.equal(outputs[0], expected)


def test_a_missing_file_beside_another_is_said(tmp_path, said):
    assert read_session(tmp_path) is None and not said()
    np.savez(tmp_path / "guards.npz")
    assert read_session(tmp_path) is None and "guards.json is missing" in said()[0]


@pytest.mark.parametrize(
    ("value", "fresh", "fits"),
    [
        *((3.5, 0, True), ("x", 0, False), (None, 0, False), (True, 0, False), (1, False, False)),
        *(([1.0, None], [], True), (["x"], [], False), ([], [0, 0], False), ([4, 5], [0, 0], True)),
        *(([], {}, False), ({"a": 1}, {}, True), ({}, {"a": 0}, False), ([1], None, True), ([], None, False)),
        *(
            (np.ones(2, bool), np.zeros(2, bool), True),
            (np.ones(2), np.zeros(2, bool), False),
            ([], np.ones(2), False),
        ),
    ],
)
def test_the_fresh_state_is_the_model_of_the_restored(value, fresh, fits):
    assert is_like(value, fresh) is fits
