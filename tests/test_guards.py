"""What holds for every guard: documentation, thresholds, isolation, state, silence when disabled."""

import ast
import inspect
import json
import logging
import re
import shutil
import threading
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipe.errors import UserError
from recipe.explain import SECTIONS, WIDTH, guard_of, pages, sections_of
from recipe.guards import FINDING_IDS, GUARDS, MEANINGS, RegressionCallback, session
from recipe.guards.checkpoint import read_session
from recipe.guards.guard import CannotJudge, Finding, Guard
from recipe.guards.records import read_lines
from recipe.guards.reporter import Reporter
from recipe.guards.runner import PROBE_FAILED
from recipe.guards.taps import TAPS
from recipe.guards.worker import Worker

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipe" / "guards"
HOOKS = ("setup", "inspect", "probe", "before_micro_step", "after_micro_step", "before_step", "after_step")
HOOKS += (
    "measure",
    "measure_tokens",
    "observe",
    "observe_eval",
    "begin_pass",
    "evidence",
    "save",
    "load",
    "on_resume",
)
of_each_guard = pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)


# --- documentation


def test_an_id_belongs_to_one_guard():
    names = [name for guard in GUARDS for name in guard.ids]
    assert len(names) == len(set(names)) and tuple(names) == FINDING_IDS


@of_each_guard
def test_a_guard_is_documented(guard):
    summary, *_ = inspect.cleandoc(guard.__doc__).split("\n\n")
    assert summary.endswith(".")
    for name, meaning in guard.ids.items():
        assert meaning.endswith(".") and re.fullmatch(r"[a-z_]+", name)
        assert tuple(title for title in SECTIONS if title in sections_of(guard, name)) == SECTIONS, name


@of_each_guard
def test_what_a_guard_names_exists(guard):
    assert set(guard.taps) <= set(TAPS)
    assert set(guard.explained_by) <= set(FINDING_IDS) and not set(guard.explained_by) & set(guard.ids)
    assert set(guard.rules_out) <= set(guard.ids)


def test_the_pages_are_those_of_the_classes():
    """`python -m recipe.explain docs` writes them."""
    for path, text in pages(ROOT / "docs").items():
        assert path.read_text(encoding="utf-8") == text, path


def test_an_unknown_id_is_answered_in_short_lines():
    with pytest.raises(UserError, match="there are") as error:
        guard_of("zzzzz")
    assert all(name in str(error.value) for name in FINDING_IDS)
    assert max(map(len, str(error.value).splitlines())) <= WIDTH


def test_a_finding_id_is_written_in_its_own_module_only():
    """And in what others name as explanations."""
    home = {name: Path(inspect.getsourcefile(guard)) for guard in GUARDS for name in guard.ids}
    elsewhere = []
    for path in sorted((ROOT / "recipe").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        excused = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "explained_by" for t in node.targets)
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in excused
            found = set(re.findall(r"\w+", node.value)) & set(home) if is_text else ()
            elsewhere += [(path.relative_to(ROOT).as_posix(), name) for name in found if home[name] != path]
    assert elsewhere == []


# --- thresholds


# Numbers of the implementation: ids and bits, constants of hashes, sizes of buffers, where to look first.
NO_THRESHOLDS = {"IGNORE_INDEX", "VALID", "SCORED", "LABEL_IS_TOKEN", "LABEL_IS_NEXT", "STARTS", "PREFIX"}
NO_THRESHOLDS |= {
    "INTEGERS",
    "ONE_TYPE",
    "SLICE",
    "GOLDEN",
    "PADDING",
    "CHUNK",
    "OVERFLOW",
    "MAX_COPIED",
    "LINE_LENGTH",
}


def constants(source: str) -> list[tuple[ast.stmt, list[str]]]:
    """Assignments of constants that hold numbers, in modules and classes, with their names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            numbers = (
                p for p in ast.walk(node.value) if isinstance(p, ast.Constant) and type(p.value) in (int, float)
            )
            if names and all(name.isupper() for name in names) and any(True for _ in numbers):
                found.append((node, names))
    return found


def without_origin(source: str) -> list[str]:
    """Constants with a comment neither in their lines nor above. One above serves the lines that follow it, up to one
    that has its own."""
    comments = {token.start[0] for token in generate_tokens(StringIO(source).readline) if token.type == COMMENT}
    bare, served = [], -1  # the last line that the comment above still serves
    for node, names in sorted(constants(source), key=lambda each: each[0].lineno):
        above = node.lineno - 1 in (served, *comments)
        inside = any(node.lineno <= line <= node.end_lineno for line in comments)
        served = node.end_lineno if above and not inside else -1
        bare += names if not above and not inside else []
    return bare


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_threshold_has_its_origin(path):
    bare = [name for name in without_origin(path.read_text(encoding="utf-8")) if name.lstrip("_") not in NO_THRESHOLDS]
    assert bare == []


def test_a_threshold_without_its_origin_is_seen():
    assert without_origin("# of both\nA = 1\nB, C = 2, 3\n\nD = 4\n") == ["D"]
    assert without_origin("# of A\nA = 1\n\nB = 2  # of B\n\nC = 3\n") == ["C"]
    assert without_origin("class G:\n    # of A\n    A = 1\n\n    B = 2\n") == ["B"]


# --- size


def test_modules_classes_and_functions_are_short():
    long = []
    for path in sorted(FOLDER.parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > 400:
            long.append((path.name, lines))
        for node in ast.walk(ast.parse(source)):
            limit = {ast.ClassDef: 250, ast.FunctionDef: 50}.get(type(node))
            if limit and node.end_lineno - node.lineno + 1 > limit:
                long.append((f"{path.name} {node.name}", node.end_lineno - node.lineno + 1))
    assert long == []


# --- on a training


def rows(count: int, length: int = 32, seed: int = 1) -> list[dict]:
    ids = torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(config, folder, guards=None, checkpoint=None, steps=12, callbacks=(), **arguments):
    """A stock Trainer on a tiny model; returns it."""
    torch.manual_seed(0)
    values = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=6,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(**{**values, **arguments}),
        train_dataset=rows(8 * steps),
        eval_dataset=rows(4, seed=2),
        callbacks=[*callbacks, *([guards] if guards else [])],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    assert trainer.state.global_step == steps
    return trainer


@pytest.fixture(scope="module")
def config(tiny_config):
    from transformers import LlamaConfig

    return LlamaConfig(**tiny_config)


@pytest.fixture(scope="module")
def unwatched(config, tmp_path_factory):
    """The weights of a training without guards."""
    return train(config, tmp_path_factory.mktemp("unwatched") / "run").model.state_dict()


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """The folder of a training with guards, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    train(config, folder, RegressionCallback())
    return folder


def assert_equal_weights(trainer, weights) -> None:
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def raising(*arguments, **kwargs):
    raise RuntimeError("a fault of the guard")


@of_each_guard
def test_a_fault_disables_its_guard_alone(guard, config, unwatched, tmp_path, monkeypatch, caplog):
    """In any of its methods; the training is not changed by a bit, and the log says it once."""
    own = [name for name in HOOKS if name in vars(guard)]
    for name in own:
        monkeypatch.setattr(guard, name, raising)
    guards = RegressionCallback()
    with caplog.at_level(logging.INFO, "recipe.guards"):
        trainer = train(config, tmp_path / "run", guards)
    assert_equal_weights(trainer, unwatched)
    assert guards.failure is None
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR and r.name == "recipe.guards"]
    reasons = ("a fault of the guard", PROBE_FAILED)  # a probe runs the user's code, whose faults are no fault of it
    failed = {name for name, reason in guards.cannot_judge.items() if any(words in reason for words in reasons)}
    assert failed == set(guard.ids)
    assert len([line for line in said if "a fault of the guard" in line]) <= 1
    others = {name for other in GUARDS if other is not guard for name in other.ids}
    assert {"loss_not_finite", "learning_rate_off"} & others <= guards.judged


class Toy(Guard):
    """For tests."""

    ids = {"toy": "A toy."}

    def setup(self, run):
        self.state = {"n": 0}

    def observe(self, step):
        yield self.clear()


@pytest.mark.parametrize(
    "method",
    [
        {"__init__": raising},
        {"evidence": raising},
        {"evidence": lambda self: {"x": torch.ones(1)}},
        {"save": lambda self: {"n": {1, 2}}},
        {"observe": lambda self, step: iter(["no verdict"])},
        {"observe": lambda self, step: iter([self.finding("info", "a", "b", evidence={"x": torch.ones(1)})])},
        {"observe": lambda self, step: None},
    ],
    ids=lambda method: next(iter(method)),
)
def test_each_kind_of_fault_disables_its_guard_alone(method, config, unwatched, tmp_path, monkeypatch, caplog):
    """Also what would fail later, where it is written or sent."""
    others = tuple(guard for guard in GUARDS if {"loss_not_finite", "init_loss_off"} & set(guard.ids))
    monkeypatch.setattr(RegressionCallback, "guards", (*others, type("Toy", (Toy,), method)))
    guards = RegressionCallback()
    trainer = train(config, tmp_path / "run", guards)
    assert_equal_weights(trainer, unwatched)
    assert guards.failure is None and "the guard failed: " in guards.cannot_judge["toy"]
    assert len([record for record in caplog.records if "guard toy failed and is off" in record.getMessage()]) == 1
    assert "loss_not_finite" in guards.judged and "toy" not in json.dumps([f.to_json() for f in guards.findings])
    assert "Toy" not in json.loads((tmp_path / "run/checkpoint-12/guards.json").read_text())["guards"]


class LateWorker(Worker):
    """Begins a task when its result is asked for: as far behind the training as it can be."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()

    def submit(self, task, *arguments):
        self.gate = gate = threading.Event()
        super().submit(lambda: task(*arguments) if gate.wait(60) else None)

    def wait(self):
        self.gate.set()
        super().wait()

    def result(self):
        self.gate.set()
        return super().result()


def test_a_worker_that_is_behind_changes_nothing(saved, config, unwatched, tmp_path, monkeypatch):
    """Neither weights nor what is found, recorded and saved."""
    monkeypatch.setattr(session, "Worker", LateWorker)
    threads = threading.active_count()
    assert_equal_weights(train(config, tmp_path / "run", RegressionCallback()), unwatched)
    assert threading.active_count() == threads
    for name in ("findings.jsonl", "steps.jsonl", "evals.jsonl"):
        here, there = (read_lines(folder / "_recipe" / name) for folder in (saved, tmp_path / "run"))
        for record in here + there:
            for key in [key for key in record if key.endswith("_per_second") or key == "eval_runtime"]:
                del record[key]
        assert here == there
    for name in ("checkpoint-6", "checkpoint-12"):
        here, there = (read_session(folder / name) for folder in (saved, tmp_path / "run"))
        assert here.numbers == there.numbers and here.arrays.keys() == there.arrays.keys()
        assert all(np.array_equal(array, there.arrays[key]) for key, array in here.arrays.items())


@pytest.mark.parametrize("name", ["findings.jsonl", "steps.jsonl", "evals.jsonl"])
def test_a_file_that_cannot_be_written_does_not_end_a_training(name, config, unwatched, tmp_path):
    (tmp_path / "run/_recipe" / name).mkdir(parents=True)
    guards = RegressionCallback()
    assert_equal_weights(train(config, tmp_path / "run", guards), unwatched)
    assert guards.failure is None and guards.judged


@of_each_guard
def test_disabled_ids_are_silent(guard):
    """Whatever the guard yields."""
    reporter = Reporter(GUARDS, frozenset(guard.ids), on_alarm=raising)
    reporter.begin(Path("nowhere"), is_main=False, until=-1)
    findings = [guard.finding("error", "a", "b", id=name) for name in guard.ids]
    reporter.take(findings, 1, 1)
    reporter.explain_waiting((), {})
    assert reporter.findings == []


class Recorder(TrainerCallback):
    """Verdicts by step, as the reporter is given them."""

    def __init__(self, guards):
        self.verdicts: dict[int, list] = {}
        take = guards.reporter.take

        def record(verdicts, step, tokens_seen):
            verdicts = list(verdicts)
            named = [(type(v).__name__, v.id, getattr(v, "check", ""), getattr(v, "found", "")) for v in verdicts]
            self.verdicts.setdefault(step, []).extend(named)
            take(verdicts, step, tokens_seen)

        guards.reporter.take = record


class Faults(TrainerCallback):
    """Faults that counters and windows remember: a rate of its own, a gradient that is not clipped, texts that begin
    with two BOS, a batch that repeats."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= 4:
            for group in optimizer.param_groups:
                group["lr"] *= 2


@pytest.mark.parametrize("faults", [(), (Faults,)], ids=["healthy", "faulty"])
def test_state_survives_a_resume(faults, config, tmp_path):
    """Saved in mid-run and restored, every guard gives the verdicts of the uninterrupted run."""
    whole = RegressionCallback()
    recorded = Recorder(whole)
    train(config, tmp_path / "whole", whole, callbacks=[fault() for fault in faults])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    resumed = RegressionCallback()
    again = Recorder(resumed)
    train(
        config,
        tmp_path / "again",
        resumed,
        checkpoint=tmp_path / "again" / "checkpoint-6",
        callbacks=[fault() for fault in faults],
    )
    of_resume = {name for guard in GUARDS if guard.of_one_resume for name in guard.ids}
    for step in range(7, 13):
        before = [verdict for verdict in recorded.verdicts[step] if verdict[1] not in of_resume]
        after = [verdict for verdict in again.verdicts[step] if verdict[1] not in of_resume]
        # A guard may look again after a resume, and so judge more often; never less, and never otherwise.
        assert [v for v in before if v not in after] == [], step
        assert [v for v in after if v not in before and v[0] != "Clear"] == [], step
    assert [(f.id, f.step, f.found) for f in resumed.findings] == [(f.id, f.step, f.found) for f in whole.findings]
    assert {name: each.checks for name, each in resumed.reporter.open.items()} == {
        name: each.checks for name, each in whole.reporter.open.items()
    }
    assert resumed.tokens_seen == whole.tokens_seen
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]


@of_each_guard
def test_a_state_that_does_not_fit_starts_fresh(guard, config, unwatched, saved, tmp_path, caplog):
    """With one warning, and the training goes on."""
    if not [name for name in ("save", "load", "setup") if name in vars(guard)]:
        pytest.skip("keeps nothing")
    numbers = json.loads((saved / "checkpoint-6/guards.json").read_text())
    if guard.__name__ not in numbers["guards"]:
        pytest.skip("not in force in this run")
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run/checkpoint-6/guards.json"
    numbers["guards"][guard.__name__] = {"nonsense": [1, 2]}
    file.write_text(json.dumps(numbers))
    with np.load(file.with_suffix(".npz")) as arrays:
        others = {name: array for name, array in arrays.items() if not name.startswith(f"{guard.__name__}.")}
    np.savez(file.with_suffix(".npz"), **others)
    guards = RegressionCallback()
    with caplog.at_level(logging.WARNING, "recipe.guards"):
        trainer = train(config, tmp_path / "run", guards, checkpoint=tmp_path / "run/checkpoint-6")
    assert_equal_weights(trainer, unwatched)
    assert guards.failure is None
    warnings = [record.getMessage() for record in caplog.records if "cannot be restored" in record.getMessage()]
    assert len(warnings) == 1 and guard.__name__ in warnings[0]


# --- batches of any kind


def as_list(trainer):
    """As TRL's GRPOTrainer: the micro-batch is a list of rows."""
    trainer.data_collator = lambda rows: rows
    trainer._prepare_inputs = lambda inputs: inputs

    def compute_loss(model, inputs, return_outputs=False, **kwargs):
        ids = torch.stack([row["input_ids"] for row in inputs])
        outputs = model(input_ids=ids, labels=ids)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer.compute_loss = compute_loss


def without_ids(trainer):
    """A dict of other names, one of them nested."""

    def compute_loss(model, inputs, return_outputs=False, **kwargs):
        outputs = model(input_ids=inputs["text"]["ids"], labels=inputs["text"]["ids"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer.data_collator = lambda rows: {"text": {"ids": torch.stack([row["input_ids"] for row in rows])}}
    trainer.compute_loss = compute_loss


@dataclass
class Ids:
    ids: torch.Tensor

    def __contains__(self, name):  # Trainer asks for "labels"
        return False


def as_dataclass(trainer):
    """An object with attributes."""

    def compute_loss(model, inputs, return_outputs=False, **kwargs):
        outputs = model(input_ids=inputs.ids, labels=inputs.ids)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer.data_collator = lambda rows: Ids(torch.stack([row["input_ids"] for row in rows]))
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("change", [as_list, without_ids, as_dataclass])
def test_batches_of_any_kind(change, config, tmp_path):
    """Guards that need tokens do not apply; the others judge, and the training is not changed."""

    def run(folder, guards=None):
        torch.manual_seed(0)
        values = dict(output_dir=str(folder), max_steps=10, use_cpu=True, disable_tqdm=True, report_to=[])
        values |= dict(per_device_train_batch_size=4, learning_rate=1e-3, save_strategy="no")
        arguments = TrainingArguments(**values, remove_unused_columns=False)
        trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows(40))
        change(trainer)
        if guards:
            trainer.add_callback(guards)
        trainer.train()
        return trainer

    weights = run(tmp_path / "plain").model.state_dict()
    guards = RegressionCallback()
    assert_equal_weights(run(tmp_path / "run", guards), weights)
    assert guards.failure is None and guards.findings == []
    assert {"loss_not_finite", "learning_rate_off", "frozen_parameters", "optimizer_off"} <= guards.judged
    needing = {name for guard in GUARDS if {"tokens", "head", "ngrams"} & set(guard.taps) for name in guard.ids}
    assert needing - guards.judged <= guards.not_applicable.keys() and not guards.cannot_judge
    assert not any("Error" in reason for reason in guards.cannot_judge.values())


# --- the line


def test_a_log_line_fits_in_160_characters():
    long = Finding("loss_spike", "warning", 12345, 1, "found " * 40, "expected " * 40, ("cause " * 40,))
    short = Finding("loss_spike", "warning", 1, 1, "a", "b", ("c",))
    assert len("WARNING recipe.guards | " + long.log_line()) <= 160
    assert short.log_line() == "loss_spike | step 1 | found a | expected b | likely: c"
    assert all(part in long.log_line() for part in (" | found ", " | expected "))
    partly = Finding("loss_spike", "warning", 12345, 1, "found it", "expected it", ("cause " * 40,))
    assert partly.log_line().startswith(
        "loss_spike | step 12345 | found found it | expected expected it | likely: cause"
    )


def test_details_go_first_and_words_are_whole():
    causes = ("labels shifted (by the collator (and the model)): twice; see the guide",)
    line = Finding("loss_spike", "error", 1, 1, "a: " + "b" * 60, "c", causes).log_line()
    assert line.endswith(f"found a: {'b' * 60} | expected c | likely: labels shifted")
    line = Finding("loss_spike", "error", 1, 1, "loss " * 40, "c", ("one cause",)).log_line()
    assert "loss… | expected c | likely: one cause" in line


def test_a_guard_says_why_it_cannot_judge():
    assert issubclass(CannotJudge, Exception) and Guard().save() == {}
    assert set(MEANINGS) == set(FINDING_IDS)


def test_a_disk_that_is_full_at_a_save_does_not_switch_the_guards_off(
    config, unwatched, tmp_path, monkeypatch, caplog
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipe.guards.session.write_session", full)
    guards = RegressionCallback()
    with caplog.at_level(logging.WARNING, "recipe.guards"):  # whatever another test has set
        assert_equal_weights(train(config, tmp_path / "run", guards), unwatched)
    assert guards.failure is None and guards.judged
    assert "training goes on: [Errno 28] No space left on device" in caplog.text
