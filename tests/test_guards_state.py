"""What a resumed run reads of the run before it may be damaged: its guards start fresh, or leave the record out."""

import itertools
import json
import logging
import math
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from recipe.guards import Finding, RegressionCallback
from recipe.guards.checkpoint import read_session, write_session
from recipe.guards.records import StepRecord, append_line, read_lines, read_steps
from recipe.guards.session import state_of

STEPS, SAVED_AT, ROWS, LENGTH = 8, 6, 4, 24
FINDING = Finding("loss_spike", "warning", 3, 288, "a jump", "none", ("a bad batch",), "wait", {"losses": [1.0]})


def rows(count: int, seed: int) -> list[dict]:
    ids = torch.randint(0, 257, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def run(config: dict, output_dir, checkpoint=None) -> RegressionCallback:
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=SAVED_AT,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    data = dict(train_dataset=rows(ROWS * STEPS, seed=1), eval_dataset=rows(ROWS, seed=2))
    guards = RegressionCallback()
    trainer = Trainer(model=LlamaForCausalLM(LlamaConfig(**config)), args=args, callbacks=[guards], **data)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    assert trainer.state.global_step == STEPS
    return guards


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    guards = run(tiny_config, path)
    assert guards.findings == []
    return guards, path


@pytest.fixture
def resume(finished, tiny_config, tmp_path, caplog):
    """Goes on from the copy in `tmp_path`; gives the guards and the warnings that were said."""
    shutil.copytree(finished[1], tmp_path / "run")

    def resume():
        with caplog.at_level(logging.INFO, "recipe.guards"):
            guards = run(tiny_config, tmp_path / "run", tmp_path / f"run/checkpoint-{SAVED_AT}")
        own = [record for record in caplog.records if record.name == "recipe.guards"]
        return guards, [record.getMessage() for record in own if record.levelno >= logging.WARNING]

    return resume


# --- whole


def test_a_healthy_state_restores_exactly(finished, resume):
    """What the resumed run saves at its end is what the uninterrupted one has."""
    whole, (resumed, warnings) = finished[0].session, resume()
    assert warnings == []
    numbers, arrays = whole.runner.save(whole.run)
    numbers_again, arrays_again = resumed.session.runner.save(resumed.session.run)
    assert json.dumps(numbers_again) == json.dumps(numbers) and arrays_again.keys() == arrays.keys()
    for name, array in arrays.items():
        if not re.match("Repetition._?(resumed|was|replay)", name):  # of the resume itself
            assert np.array_equal(arrays_again[name], array), name
    for name, state in whole.taps.save().items():
        again = resumed.session.taps.save()[name]
        for key, value in state.items():
            assert np.array_equal(again[key], value), (name, key)


def test_numbers_that_are_not_finite_survive_in_every_state(finished, tmp_path):
    """As one step with a NaN leaves them in windows and sums. As null, the guard would fail at its next look."""
    session = finished[0].session
    own, arrays, taps = state_of(session)
    rotation = itertools.cycle([math.nan, math.inf, -math.inf])

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [spoil(each) for each in value] + [next(rotation)]
        return next(rotation) if isinstance(value, float) else value

    spoiled = spoil(own)
    write_session(tmp_path, spoiled, arrays, taps)
    read = read_session(tmp_path).numbers
    assert repr({name: read[name] for name in own}) == repr(json_keys(spoiled)) and "nan" in repr(read["guards"])
    json.loads((tmp_path / "guards.json").read_text(), parse_constant=pytest.fail)


def json_keys(value):
    if isinstance(value, dict):
        return {str(key): json_keys(each) for key, each in value.items()}
    return [json_keys(each) for each in value] if isinstance(value, list) else value


def test_healthy_files_are_read_whole(finished, resume, tmp_path):
    (tmp_path / "run/_recipe/findings.jsonl").write_text(FINDING.to_json() + "\n")
    change(tmp_path, "reporter.open", {"loss_spike": {"finding": asdict(FINDING), "checks": {"step": 0}}})
    guards, warnings = resume()
    assert warnings == [] and guards.findings == [FINDING]
    assert guards.reporter.open["loss_spike"].finding == FINDING
    assert {"resume_jump", "eval_not_repeatable"} <= guards.judged
    assert guards.judged_steps["loss_not_finite"] == finished[0].judged_steps["loss_not_finite"] == STEPS
    losses = [[record["loss"] for record in each.history] for each in (guards, finished[0])]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS and guards.tokens_seen == finished[0].tokens_seen


# --- the state in a checkpoint


def change(tmp_path, path: str, value) -> None:
    """`path`: names of guards.json, dots between them. `value` ... takes the name out."""
    file = tmp_path / f"run/checkpoint-{SAVED_AT}/guards.json"
    numbers = json.loads(file.read_text())
    *parents, name = path.split(".")
    inner = numbers
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    if value is ...:
        del inner[name]
    file.write_text(json.dumps(numbers))


def change_array(tmp_path, name: str, array) -> None:
    file = tmp_path / f"run/checkpoint-{SAVED_AT}/guards.npz"
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, name: array})


DAMAGED = {
    "reporter": [None, [], {"open": {"a": 1}}, ...],
    "reporter.open": [[1], {"loss_spike": {"finding": 1, "checks": {}}}, None],
    "reporter.judged_steps": [{"x": "y"}, ["loss_spike"]],
    "passes": ["two", None, ...],
    "learning_rate_sum": ["x", None],
    "taps": [None, [], {"ngrams": {}}],
    "guards": [None, [1], ...],
}


CASES = [
    pytest.param(path, value, id=path, marks=[pytest.mark.slow] if number else [])
    for path, values in DAMAGED.items()
    for number, value in enumerate(values)
]


@pytest.mark.parametrize(("path", "value"), CASES)
def test_a_value_of_another_type_is_logged_once_and_ends_nothing(resume, tmp_path, path, value):
    change(tmp_path, path, value)
    check_started_fresh(*resume())


@pytest.mark.parametrize("text", ["[1]", "1", '"x"', "null", "[" * 100_000, "\ufffd"], ids=lambda text: text[:6])
def test_no_object_is_logged_once_and_ends_nothing(resume, tmp_path, text):
    (tmp_path / f"run/checkpoint-{SAVED_AT}/guards.json").write_text(text)
    check_started_fresh(*resume())


@pytest.mark.parametrize("name", ["ngrams.tokens", "ngrams.lengths"])
@pytest.mark.parametrize("array", [np.array("x"), np.zeros((2, 2))], ids=["text", "2D"])
def test_an_array_of_another_kind_is_logged_once_and_ends_nothing(resume, tmp_path, name, array):
    change_array(tmp_path, name, array)
    check_started_fresh(*resume())


def check_started_fresh(guards: RegressionCallback, warnings: list[str]) -> None:
    assert len(warnings) == 1 and "the guards' state cannot be restored" in warnings[0], warnings
    assert guards.failure is None and guards.findings == [] and "loss_not_finite" in guards.judged


def test_a_damaged_pinned_batch_is_not_judged(resume, tmp_path):
    change_array(tmp_path, "pinned.input_ids", np.array(["x"]))
    guards, warnings = resume()
    assert warnings == [] and "the pinned batch failed" in guards.cannot_judge["resume_jump"]


def test_arrays_of_another_shape_are_no_state(resume, tmp_path):
    """As a write that was cut leaves them: the halved rows of the pinned batch would have another loss."""
    file = tmp_path / f"run/checkpoint-{SAVED_AT}/guards.npz"
    with np.load(file) as arrays:
        halves = {name: array[: len(array) // 2] if array.ndim else array for name, array in arrays.items()}
    np.savez(file, **halves)
    guards, warnings = resume()
    assert guards.findings == [] and guards.failure is None and len(warnings) == 1


def test_an_open_finding_of_another_version_is_left_out(resume, tmp_path):
    other = {"finding": {**asdict(FINDING), "id": "no_such_guard"}, "checks": {"step": 0}}
    change(tmp_path, "reporter.open", {"no_such_guard": other})
    guards, warnings = resume()
    assert warnings == [] and guards.reporter.open == {}


# --- records


NO_RECORDS = ["{}", "[1]", "1", '{"step": "3"}', '{"step": null}', '{"step": true}', '{"step": 3}', '{"ste', "\udcff"]


@pytest.mark.parametrize("name", ["steps.jsonl", "evals.jsonl", "findings.jsonl"])
def test_what_is_no_record_is_left_out(resume, tmp_path, name):
    file = tmp_path / "run/_recipe" / name
    lines = [*NO_RECORDS, file.read_text()]
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    guards, warnings = resume()
    assert warnings == [] and guards.findings == []
    assert [record["step"] for record in guards.history] == list(range(1, STEPS + 1))
    steps = [
        record["step"]
        for record in read_lines(tmp_path / "run/_recipe/steps.jsonl")
        if type(record.get("step")) is int
    ]
    assert steps[-STEPS:] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "change", [{"id": "no_such_guard"}, {"severity": "bad"}, {"likely_causes": 1}, {"evidence": 1}]
)
def test_what_is_no_finding_is_left_out(resume, tmp_path, change):
    lines = [json.dumps({**asdict(FINDING), **change}), json.dumps({**asdict(FINDING), "of_a_later_version": 1})]
    (tmp_path / "run/_recipe/findings.jsonl").write_text("\n".join(lines) + "\n")
    guards, warnings = resume()
    assert warnings == [] and guards.findings == [FINDING]


@pytest.mark.parametrize("change", [{"loss": "x"}, {"loss": []}, {"tokens_seen": "288"}, {"grad_norm": "x"}])
@pytest.mark.parametrize("damaged", [3, SAVED_AT])
def test_steps_count_from_the_last_damaged_one_on(finished, resume, tmp_path, change, damaged):
    file = tmp_path / "run/_recipe/steps.jsonl"
    records = read_lines(file)
    records[damaged - 1].update(change)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    guards, warnings = resume()
    assert warnings == [] and guards.findings == []
    assert [record["step"] for record in guards.history] == list(range(damaged + 1, STEPS + 1))
    assert guards.tokens_seen == finished[0].tokens_seen


def test_a_loss_that_was_not_finite_is_a_record(tmp_path):
    values = dict(tokens_seen=96, grad_norm=None, learning_rate=0.0, tokens_per_second=1.0)
    append_line(tmp_path / "steps.jsonl", StepRecord(step=1, loss=float("inf"), **values))
    assert json.loads((tmp_path / "steps.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None
    (record,) = read_steps(tmp_path / "steps.jsonl", until=1)
    assert math.isnan(record.pop("loss")) and record == {"step": 1, **values}
    assert read_steps(tmp_path / "steps.jsonl", until=2) == []
