"""What a training in someone's own Trainer leaves in `output_dir`, and what it logs."""

import contextlib
import io
import json
import logging
import math
import re
import sys

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, trainer

from recipe import own_run
from recipe.__main__ import run
from recipe.console import BesideBars, LineFormatter, wants_colour
from recipe.guards import MEANINGS, RegressionCallback, callback
from recipe.report import load_run
from tests.test_any_trainer import rows, tiny
from tests.test_callback import unshifted

STEPS = 6


def make_trainer(folder, steps=STEPS, **changes):
    values = dict(max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no")
    args = TrainingArguments(str(folder), **{**values, **changes})
    return Trainer(tiny("llama_tied"), args, train_dataset=rows(40), eval_dataset=rows(4, seed=9))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A training with Trainer's progress bar in a script without logging, evaluated when it had ended; and what it
    wrote to stderr while it trained."""
    folder, stderr = tmp_path_factory.mktemp("own") / "output", io.StringIO()
    root, before = logging.getLogger(), logging.getLogger().handlers
    root.handlers = []
    try:
        with contextlib.redirect_stderr(stderr):
            watched = make_trainer(folder, logging_steps=2)
            watched.add_callback(RegressionCallback())
            watched.train()
    finally:
        root.handlers = before
    watched.evaluate()
    return watched, folder, stderr.getvalue()


def test_one_line_at_the_start_and_one_at_the_end_none_of_them_in_a_bar(ended):
    _, folder, stderr = ended
    lines = [line.split("\r")[-1] for line in stderr.split("\n") if "recipe.guards" in line]
    start, end, where = lines
    numbers = re.fullmatch(r"INFO recipe.guards \| recipe guards: (\d+) watching, (\d+) not applicable", start)
    assert sum(map(int, numbers.groups())) == len(MEANINGS)
    judged = json.loads((folder / "_recipe/run.json").read_text())["result"]["guards"]["judged"]
    assert len(judged) <= int(numbers[1])
    assert end.startswith(
        "INFO recipe.guards | verdict: no fault found, but nothing learned from context yet: too few"
    )
    assert len(end) <= 160 and where == f"INFO recipe.guards | report: {folder}/_recipe/report.html"
    assert f"{STEPS}/{STEPS}" in stderr  # there was a bar


def test_the_files_are_complete_and_in_one_folder(ended):
    _, folder, _ = ended
    files = {"run.json", "report.html", "steps.jsonl", "evals.jsonl", "findings.jsonl"}
    assert {path.name for path in (folder / "_recipe").iterdir()} == files
    stored = json.loads((folder / "_recipe/run.json").read_text())
    assert stored["finished"] and stored["arguments"]["max_steps"] == STEPS
    assert stored["result"]["steps"] == STEPS and stored["result"]["guards"]["judged"]
    assert stored["model"]["block_size"] == 64 and stored["device"]["kernels"].startswith("attention sdpa")
    assert "another config" not in json.dumps(stored) and "cpu_demo" not in json.dumps(stored)
    page = (folder / "_recipe/report.html").read_text()
    assert "Unfinished" not in page and "The run finished." in page and "<title>output</title>" in page
    assert "at step 6" in page and "no evaluation recorded" not in page  # evaluated after the end


def test_the_command_finds_them_from_output_dir(ended, capsys):
    _, folder, _ = ended
    assert run(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "_recipe/report.html")
    assert run(["report", str(folder), "--bundle"]) == 0
    (folder / "_recipe/bundle.zip").unlink()
    assert load_run(folder).num_steps == STEPS


def test_a_push_uploads_none_of_them(ended, monkeypatch):
    """What Trainer itself asks the hub to leave out, applied to the folder by the hub's own function."""
    watched, folder, _ = ended

    class Api:
        def upload_folder(self, folder_path, ignore_patterns, **others):
            names = [str(path.relative_to(folder_path)) for path in folder.rglob("*") if path.is_file()]
            return names, list(filter_repo_objects(names, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(trainer, "hf_api", Api)
    monkeypatch.setattr(watched, "hub_model_id", "someone/model")
    monkeypatch.setattr(watched, "create_model_card", lambda **card: None)
    names, uploaded = watched.push_to_hub()
    assert "_recipe/report.html" in names and "model.safetensors" in uploaded
    assert [name for name in uploaded if "_recipe" in name] == []


def test_a_guard_that_stops_and_a_resumed_training(tmp_path, caplog):
    watched = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    watched.model.loss_function = unshifted
    watched.add_callback(RegressionCallback(on_regression="stop"))
    watched.train()
    stored = json.loads((tmp_path / "_recipe/run.json").read_text())
    assert stored["result"]["verdict"].startswith("not to be trusted: missing_label_shift")
    assert stored["result"]["exit_code"] == 3 and stored["resumed_from"] is None
    assert "A guard stopped the run" in (tmp_path / "_recipe/report.html").read_text()
    again = make_trainer(tmp_path)
    again.add_callback(RegressionCallback())
    again.train(resume_from_checkpoint=True)
    stored = json.loads((tmp_path / "_recipe/run.json").read_text())
    assert stored["resumed_from"] == f"checkpoint-{watched.state.global_step}" and stored["result"]["steps"] == STEPS


@pytest.mark.parametrize("broken", ["describe", "conclude"])
def test_what_fails_beside_the_training_does_not_end_it(tmp_path, monkeypatch, caplog, broken):
    def fail(*arguments):
        raise ValueError("a fault")

    monkeypatch.setattr(own_run, broken, fail)
    watched = make_trainer(tmp_path, steps=2)
    watched.add_callback(RegressionCallback())
    watched.train()
    assert watched.state.global_step == 2
    assert "run.json or the report cannot be written: a fault" in caplog.text
    assert (tmp_path / "_recipe/run.json").exists()


def test_rows_known_by_heart_are_not_a_healthy_run(tmp_path):
    """Rows of random tokens, each seen 20 times: others of their kind are as hard as ever, or harder."""
    texts = torch.randint(4, 200, (24, 32), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in texts]
    watched = make_trainer(tmp_path, 80, learning_rate=2e-2, eval_strategy="steps", eval_steps=40)
    watched.train_dataset, watched.eval_dataset = rows[:16], rows[16:]
    watched.add_callback(RegressionCallback(disabled_guards=["lost_updates"]))
    watched.train()
    result = json.loads((tmp_path / "_recipe/run.json").read_text())["result"]
    assert "its rows were learned by heart" in result["verdict"] and result["exit_code"] == 0


def test_weights_that_are_not_finite_are_named_before_the_first_step(tmp_path):
    watched, guards = make_trainer(tmp_path, 2), RegressionCallback()
    watched.model.model.norm.weight.data[3] = math.nan
    watched.add_callback(guards)
    watched.train()
    (finding,) = [each for each in guards.findings if each.severity != "info"]
    assert (finding.id, finding.step) == ("loss_not_finite", 0)
    assert finding.found == "weights are not finite before step 1 (1 parameters: model.norm.weight)"
    assert not any("objective" in reason for reason in guards.not_applicable.values())


# --- log lines


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_line_clears_the_bar_and_is_printed_once(capsys, monkeypatch, is_configured):
    logger = logging.getLogger("recipe.guards")
    # pytest has put handlers there
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)] if is_configured else [])
    lines = BesideBars(logger)
    BesideBars(logger).attach()  # of a training that raised
    lines.attach()
    with tqdm(total=5, file=sys.stderr, mininterval=0, ncols=40) as bar:
        bar.update(2)
        logger.warning("a line")
    lines.detach()
    assert logger.handlers == [] and logger.propagate and logger.level == logging.NOTSET
    stderr = capsys.readouterr().err
    printed = "a line\n" if is_configured else "WARNING recipe.guards | a line\n"
    assert stderr.count("a line") == 1
    before, after = stderr.split(printed)
    assert before.endswith("\r") and before.rstrip("\r").endswith(" " * 39)  # the bar was wiped
    assert after.startswith("\r") and "2/5" in after  # and drawn again


def test_a_logger_with_a_handler_of_its_own_is_left_alone():
    logger, handler = logging.getLogger("recipe.guards"), logging.NullHandler()
    logger.addHandler(handler)
    lines = BesideBars(logger)
    lines.attach()
    assert logger.handlers == [handler] and logger.propagate
    lines.detach()
    logger.removeHandler(handler)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_is_for_terminals_and_respects_no_color(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert wants_colour(Terminal()) and not wants_colour(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())
    monkeypatch.delenv("TERM")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "")  # no-color.org: not where it is empty
    assert wants_colour(Terminal())


def test_a_line_in_colour_is_the_line():
    def line(level, is_coloured, **extra):
        record = logging.makeLogRecord(
            {"name": "recipe.x", "levelno": level, "levelname": logging.getLevelName(level), "msg": "a | b", **extra}
        )
        return LineFormatter(is_coloured).format(record)

    assert line(logging.WARNING, False) == "WARNING recipe.x | a | b"
    coloured = line(logging.WARNING, True, colour="good")
    assert coloured == "\x1b[33mWARNING\x1b[0m \x1b[2mrecipe.x | \x1b[0m\x1b[32ma | b\x1b[0m"
    assert re.sub(r"\x1b\[\d+m", "", coloured) == line(logging.WARNING, False)
    assert line(logging.INFO, True).startswith("\x1b[2mINFO") and line(logging.ERROR, True).startswith("\x1b[31m")


class FailsAt(TrainerCallback):
    """In the middle of the given step, or at its end."""

    def __init__(self, trainer, step, error, is_at_the_end=False):
        self.error, self.is_at_the_end = error, is_at_the_end
        compute_loss = trainer.compute_loss

        def compute(*args, **kwargs):
            if trainer.state.global_step == step - 1 and not is_at_the_end:
                raise type(error)(*error.args)  # one that is kept would hold its frames
            return compute_loss(*args, **kwargs)

        trainer.compute_loss, self.step = compute, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.is_at_the_end:
            raise self.error


@pytest.mark.parametrize(
    ("error", "is_at_the_end", "code"),
    [(KeyboardInterrupt, False, 130), (ValueError, False, 1), (ValueError, True, 1)],
)
def test_a_training_that_an_exception_ends_is_judged_and_reported(tmp_path, monkeypatch, error, is_at_the_end, code):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(RegressionCallback())
    trainer.add_callback(FailsAt(trainer, 4, error("by hand"), is_at_the_end))
    with pytest.raises(error, match="by hand") as raised:
        trainer.train()
    if is_at_the_end:  # noticed when the process ends
        monkeypatch.setattr(sys, "last_value", raised.value, raising=False)
        callback._end_the_rest()
        callback._end_the_rest()
    result = result_of(tmp_path)
    assert result["verdict"].startswith(f"interrupted by {error.__name__}, ")
    assert (result["exit_code"], result["steps"]) == (code, 4 if is_at_the_end else 3)
    assert len((tmp_path / "_recipe/steps.jsonl").read_text().splitlines()) == result["steps"]
    assert f"The training ended with {error.__name__}." in (tmp_path / "_recipe/report.html").read_text()


def result_of(output_dir) -> dict:
    return json.loads((output_dir / "_recipe/run.json").read_text())["result"]


def test_a_training_that_goes_on_after_an_exception_is_watched_to_its_end(tmp_path):
    """Other code catches it around `training_step`."""
    watched = RegressionCallback()
    trainer = make_trainer(tmp_path, steps=30)
    trainer.add_callback(watched)
    trainer.add_callback(SkipsErrors(trainer))
    trainer.add_callback(FailsAt(trainer, 4, ValueError("by hand")))
    trainer.train()
    result = result_of(tmp_path)
    assert (result["steps"], result["exit_code"], result["interrupted_by"]) == (30, 0, None)
    assert watched.failure is None and [f.id for f in watched.findings if f.severity != "info"] == []


class SkipsErrors(TrainerCallback):
    """Of micro-batches: a loss of 0 instead."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            step = self.trainer.training_step

            def training_step(*arguments, **keywords):
                try:
                    return step(*arguments, **keywords)
                except ValueError:
                    return torch.tensor(0.0)

            self.trainer.training_step = training_step


def test_what_the_guards_raise_at_an_exception_does_not_hide_it(tmp_path, monkeypatch, caplog):
    watched = RegressionCallback()
    trainer = make_trainer(tmp_path)
    trainer.add_callback(watched)
    trainer.add_callback(FailsAt(trainer, 4, ValueError("by hand")))
    monkeypatch.setattr(watched, "_judge_last", lambda control: 1 / 0)
    with pytest.raises(ValueError, match="by hand"):
        trainer.train()
    assert "the guards failed at the end of a training" in caplog.text


def test_a_training_that_was_ended_is_recorded_when_the_next_starts(tmp_path):
    watched = RegressionCallback()
    trainer = make_trainer(tmp_path / "first")
    trainer.add_callback(watched)
    trainer.add_callback(FailsAt(trainer, 4, KeyboardInterrupt("by hand"), is_at_the_end=True))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(FailsAt)
    trainer.args.output_dir = str(tmp_path / "second")
    trainer.train()
    assert result_of(tmp_path / "first")["verdict"].startswith("interrupted by an exception, ")
    assert result_of(tmp_path / "second")["exit_code"] == 0
    assert watched not in callback._unfinished


def test_a_forked_child_does_not_end_its_parents_training(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(RegressionCallback())
    trainer.add_callback(FailsAt(trainer, 4, ValueError("by hand"), is_at_the_end=True))
    with pytest.raises(ValueError, match="by hand"):
        trainer.train()
    with monkeypatch.context() as patched:
        patched.setattr("os.getpid", lambda: -1)
        callback._end_the_rest()
    assert "result" not in json.loads((tmp_path / "_recipe/run.json").read_text())
    callback._end_the_rest()
    assert result_of(tmp_path)["verdict"].startswith("interrupted by an exception, ")
