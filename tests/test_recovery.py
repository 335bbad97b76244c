"""A finding that is still true never recovers: what the log says of a fault that stays, and of a resume."""

import json
import logging

import torch
from transformers import Trainer

from recipe.guards.guard import Guard
from recipe.guards.reporter import PATIENCE, Reporter
from tests.test_guards_on_runs import alarms, as_rows, make_model, make_trainer, shifted, text, watch

STEPS = 48  # past the 20 clear judgments after which a finding recovers, twice


class HoldsOneTwice(Trainer):
    """Its optimizer has one parameter in two groups, so that it makes two steps of it."""

    def create_optimizer(self, *arguments):
        first, *others = self.model.parameters()
        self.optimizer = torch.optim.SGD([{"params": [first, *others]}], lr=self.args.learning_rate)
        self.optimizer.param_groups.append({**self.optimizer.param_groups[0], "params": [first]})
        return self.optimizer


def logged(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "recipe.guards"]


def recovered(caplog) -> list[str]:
    return [line for line in logged(caplog) if "recovered" in line]


def test_a_parameter_that_is_in_the_optimizer_twice(tmp_path, caplog):
    """Found before step 1, also of an optimizer whose steps are not judged."""
    caplog.set_level(logging.INFO, "recipe.guards")
    guards = watch(make_trainer(tmp_path, steps=STEPS, trainer_class=HoldsOneTwice))
    assert alarms(guards) == [("optimizer_off", 0)] and recovered(caplog) == []


def test_and_after_a_resume(tmp_path, caplog):
    caplog.set_level(logging.INFO, "recipe.guards")
    run = dict(trainer_class=HoldsOneTwice, save_strategy="steps", save_steps=4)
    watch(make_trainer(tmp_path, steps=4, **run))
    guards = watch(make_trainer(tmp_path, steps=STEPS, **run), tmp_path / "run/checkpoint-4")
    assert alarms(guards) == [("optimizer_off", 0)] and recovered(caplog) == []


def test_what_only_a_probe_sees_after_a_resume(tmp_path, caplog, monkeypatch):
    """The probe breaks in the resumed run, and the checks of the steps find nothing: they cannot take it back."""
    caplog.set_level(logging.INFO, "recipe.guards")
    run = dict(train=as_rows(text(4 * STEPS)), save_strategy="steps", save_steps=4)
    first = watch(make_trainer(tmp_path, model=with_loss(rolled), steps=4, **run))
    assert alarms(first)[0][0] == "wrong_loss_target"
    caplog.clear()
    broken = "recipe.guards.sandbox.record"
    monkeypatch.setattr(broken, lambda *arguments: 1 / 0)  # a probe that breaks takes nothing back
    watch(make_trainer(tmp_path, model=make_model(), steps=STEPS, **run), tmp_path / "run/checkpoint-4")
    assert recovered(caplog) == []


def test_what_was_fixed_recovers_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "recipe.guards")
    run = dict(train=as_rows(text(4 * STEPS), shifted(text(4 * STEPS))), save_strategy="steps", save_steps=8)
    watch(make_trainer(tmp_path, steps=8, **run))
    assert recovered(caplog) == []
    run |= {"train": as_rows(text(4 * STEPS))}
    watch(make_trainer(tmp_path, steps=STEPS, **run), tmp_path / "run/checkpoint-8")
    assert [line.split(" | ")[0] for line in recovered(caplog)] == ["double_label_shift"]


def rolled(logits, labels, vocab_size, **kwargs):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].roll(1, 0).flatten())


def with_loss(loss):
    model = make_model()
    model.loss_function = loss
    return model


# --- one slot per cause


class Blocked(Guard):
    ids = {"blocked": "Something is blocked."}


def reported(*verdicts) -> list[str]:
    """The first likely cause of each finding that is reported, of verdicts of one step after the other."""
    reporter = Reporter((Blocked,), frozenset(), lambda finding: None)
    for step, verdict in enumerate(verdicts, 1):
        reporter.take([verdict], step, 0)
    return [finding.likely_causes[0] for finding in reporter.findings]


def blocked(likely: str, severity="warning", **more):
    return Blocked.finding(severity, "something", "nothing", (likely,), **more)


def test_another_cause_is_reported_while_the_first_is_open():
    assert reported(blocked("door"), blocked("road"), blocked("door")) == ["door", "road"]
    assert reported(blocked("12 doors"), blocked("3 doors")) == ["12 doors"]  # numbers change while a fault lasts
    assert reported(blocked("door", cause="a"), blocked("road", cause="a")) == ["door"]
    assert reported(blocked("door", "info"), blocked("road"), blocked("door")) == ["door", "road", "door"]  # worse


def test_each_cause_is_over_by_itself_and_is_kept_in_a_checkpoint():
    reporter = Reporter((Blocked,), frozenset(), lambda finding: None)
    reporter.take([blocked("door", check="steps"), blocked("road", check="saves")], 1, 0)
    for step in range(2, 2 + PATIENCE):
        reporter.take([Blocked.clear(check="saves")], step, 0)
    assert [each.finding.likely_causes for each in reporter.open.values()] == [("door",)]
    resumed = Reporter((Blocked,), frozenset(), lambda finding: None)
    resumed.load(json.loads(json.dumps(reporter.save())))
    assert resumed.open.keys() == reporter.open.keys() == {"blocked door"}
