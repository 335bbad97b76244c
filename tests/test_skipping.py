"""Steps that are not finite: not applied, named, and after three in a row the end."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerControl, TrainerState, get_scheduler

from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.data.pipeline import build_data
from recipe.guards.records import read_lines
from recipe.internals import takes_found_inf
from recipe.skipping import SkipCallback
from recipe.trainer import PretrainTrainer
from tests.test_guards_on_runs import make_trainer, watch


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of micro-batch `which` NaN in the steps `steps` (from 1), or a gradient infinite."""

    def install(steps, which=0, factor=math.nan, of_gradient=False):
        compute = PretrainTrainer.compute_loss
        seen = {}

        def spoiled(self, model, inputs, *args, **kwargs):
            loss = compute(self, model, inputs, *args, **kwargs)
            is_real = model.training and "training_step" in vars(self)  # the guards' probes run on a copy without it
            if not is_real or self.state.global_step + 1 not in steps:
                return loss
            count = seen[self.state.global_step] = seen.get(self.state.global_step, -1) + 1
            if count != which:
                return loss
            if not of_gradient:
                return loss * factor
            nothing = model.get_input_embeddings().weight[0, 0] * 0.0
            nothing.register_hook(lambda gradient: torch.full_like(gradient, factor))
            return loss + nothing

        monkeypatch.setattr(PretrainTrainer, "compute_loss", spoiled)

    return install


def state_of(checkpoint):
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    scheduler = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    moments = {(i, name): value for i, each in optimizer["state"].items() for name, value in each.items()}
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return load_file(checkpoint / "model.safetensors"), moments, (rates, scheduler["last_epoch"])


def assert_same_state(first, second):
    for before, after in zip(state_of(first)[:2], state_of(second)[:2], strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert state_of(first)[2] == state_of(second)[2]


PLAIN = {"eval_strategy": "no", "eval_steps": None, "save_steps": 1, "max_steps": 12}


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim": "adamw_torch"}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 2}],
    ids=lambda changes: next(iter(changes), "fused"),
)
def test_weights_moments_and_schedule_stay(write_config, tmp_path, spoil, changes):
    spoil({4, 7, 12}, which=changes.get("gradient_accumulation_steps", 1) - 1)
    assert run(["train", write_config(**PLAIN, **changes)]) == 0
    saved = [tmp_path / f"run/checkpoint-{step}" for step in range(13)]
    assert_same_state(saved[11], saved[12])  # the last step is always saved
    assert [step for step in range(1, 13) if not saved[step].exists()] == [4, 7]
    assert state_of(saved[12])[2][1] == 9 and state_of(saved[6])[2][1] == 5
    findings = read_lines(tmp_path / "run/findings.jsonl")
    assert [(each["id"], each["step"], each["severity"]) for each in findings] == [("loss_not_finite", 4, "warning")]
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result["skipped_steps"] == 3 and result["verdict"] == "suspicious: loss_not_finite"


@pytest.mark.parametrize("step", [1, 10])  # 10: all weights and all gradients are looked at
@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_found_alone(write_config, tmp_path, spoil, step, factor):
    spoil({step}, factor=factor, of_gradient=True)
    assert run(["train", write_config(**{**PLAIN, "save_steps": 20, "max_steps": 14})]) == 0
    findings = read_lines(tmp_path / "run/findings.jsonl")
    assert [(each["id"], each["step"]) for each in findings] == [("loss_not_finite", step)]
    assert all(math.isfinite(each["loss"]) for each in read_lines(tmp_path / "run/steps.jsonl"))


def test_the_documents_are_named(write_config, tmp_path, spoil):
    path = write_config(**PLAIN, gradient_accumulation_steps=3, per_device_train_batch_size=2)
    spoil({5}, which=1)
    assert run(["train", path]) == 0
    (finding,) = read_lines(tmp_path / "run/findings.jsonl")
    stream = iter(build_data(parse_config(path, ["--use_cpu", "true", "--bf16", "false"])).loader.dataset)
    rows = [next(stream) for _ in range(6 * 5)][4 * 6 + 2 : 4 * 6 + 4]
    name = finding["evidence"]["documents"][0].rsplit("[", 1)[0]
    expected = list(dict.fromkeys(f"{name}[{document}]" for row in rows for document in row.documents))
    assert finding["evidence"]["documents"] == expected and expected[0] in finding["found"]


def names_in(folder):
    return sorted(path.name for path in folder.rglob("checkpoint-*"))


def test_three_in_a_row_end_the_run_at_the_last_good_state(write_config, tmp_path, spoil, caplog):
    caplog.set_level(logging.INFO)
    spoil({5, 6, 7, 8})
    path = write_config(**PLAIN)
    assert run(["train", path]) == 3
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 3
    assert "step 8 | stopping: 3 steps in a row were not finite; none of them was applied" in caplog.text
    assert "no step after them was finite: the newest checkpoints are now abandoned/checkpoint-4" in caplog.text
    assert "the last good checkpoint is checkpoint-3; lower learning_rate" in caplog.text
    spoil({99})
    assert run(["train", path, "--resume_from_checkpoint", "latest"]) == 0
    assert [each["step"] for each in read_lines(tmp_path / "run/steps.jsonl")] == [*range(1, 13)]
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result["skipped_steps"] == 0 and json.loads((tmp_path / "run/run.json").read_text())["resumed_from"]


def test_a_state_that_has_exploded_costs_no_good_checkpoint(write_config, tmp_path, caplog):
    path, run_dir = write_config(**{**PLAIN, "max_steps": 4, "save_total_limit": 1}), tmp_path / "run"
    assert run(["train", path]) == 0
    assert names_in(run_dir) == ["checkpoint-4"]
    auto = ["train", path, "--resume_from_checkpoint", "auto", "--max_steps", "12"]
    for times in (1, 2):  # the checkpoint after the first step is finite, and useless
        assert run([*auto, "--learning_rate", "1e30", "--allow_change", "learning_rate"]) == 3
        assert names_in(run_dir) == ["checkpoint-4", *["checkpoint-5"] * times]
        assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert run(auto) == 0
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-12"]


def test_without_a_good_checkpoint_none_is_moved(write_config, tmp_path, spoil, caplog):
    path, run_dir = write_config(**PLAIN), tmp_path / "run"
    auto = ["train", path, "--resume_from_checkpoint", "auto"]
    for _ in range(2):
        spoil({2, 3, 4, 5, 6})
        assert run(auto) == 3
        assert names_in(run_dir) == ["checkpoint-1"]
        assert "no checkpoint is known to be good: start a new run with a lower learning_rate" in caplog.text


def test_a_single_one_loses_nothing(write_config, tmp_path, spoil, caplog):
    """A checkpoint that it falls on is made up, and the guards go on with the NaN in their windows."""
    spoil({6})
    path, run_dir = write_config(**{**PLAIN, "save_steps": 3}), tmp_path / "run"
    assert run(["train", path]) == 0
    assert names_in(run_dir) == ["checkpoint-12", "checkpoint-3", "checkpoint-7", "checkpoint-9"]
    weights = (run_dir / "final/model.safetensors").read_bytes()
    losses = [each["loss"] for each in read_lines(run_dir / "steps.jsonl")]
    assert run(["train", path, "--resume_from_checkpoint", str(run_dir / "checkpoint-7")]) == 0
    assert weights == (run_dir / "final/model.safetensors").read_bytes()
    assert losses == [each["loss"] for each in read_lines(run_dir / "steps.jsonl")]
    assert "failed and is off" not in caplog.text


def test_a_row_goes_on_after_a_resume():
    skips = SkipCallback()
    skips.resume(step=8, num_skipped=3, last_applied=6)
    assert (skips.in_a_row, skips.last_applied, skips.num_skipped) == (2, 6, 3)


def test_two_in_a_row_do_not(write_config, tmp_path, spoil):
    spoil({3, 4, 6, 7})
    assert run(["train", write_config(**PLAIN)]) == 0


def test_nothing_differs_where_all_is_finite(write_config, tmp_path, monkeypatch):
    path = write_config(**{**PLAIN, "save_steps": 20})
    assert run(["train", path, "--output_dir", str(tmp_path / "with")]) == 0
    monkeypatch.setattr(SkipCallback, "on_pre_optimizer_step", lambda *args, **kwargs: None)
    assert run(["train", path, "--output_dir", str(tmp_path / "without")]) == 0
    files = [(tmp_path / name / "final/model.safetensors").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]


class Reads(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_decision_reads_nothing_from_the_device():
    parameter = torch.nn.Parameter(torch.ones(4))
    inner = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    assert takes_found_inf(inner) and not takes_found_inf(torch.optim.AdamW([parameter], fused=False, foreach=False))
    scheduler = get_scheduler("linear", inner, 0, 10)
    accelerated = type("Accelerated", (), {"optimizer": inner, "scaler": None, "param_groups": inner.param_groups})()
    arguments = type("Arguments", (), {"world_size": 1})()
    known = dict(optimizer=accelerated, lr_scheduler=scheduler)
    skips, state, control = SkipCallback(), TrainerState(max_steps=9), TrainerControl()
    for step, total in enumerate((1.0, math.nan)):
        parameter.grad, skips.total = torch.ones(4), torch.tensor(total)
        before = parameter.detach().clone()
        skips.settle(accelerated, scheduler)
        with Reads() as reads:
            skips.on_pre_optimizer_step(arguments, state, control, **known)
            inner.step()
            skips.on_optimizer_step(arguments, state, control, **known)
        assert reads.count == 0
        assert torch.equal(before, parameter) == (step == 1)
        scheduler.step()
    skips.settle(accelerated, scheduler)
    assert skips.num_skipped == 1 and scheduler.last_epoch == 1 and inner.param_groups[0]["lr"] == pytest.approx(0.09)


def test_in_someone_elses_trainer_it_is_only_reported(tmp_path, monkeypatch, caplog):
    """The weights become NaN, as they would without the callback."""
    caplog.set_level(logging.INFO)

    def train(is_watched):
        trainer = make_trainer(tmp_path, steps=3)
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            compute(*args, **kwargs) * (math.nan if trainer.state.global_step == 1 and trainer.model.training else 1.0)
        )
        guards = watch(trainer) if is_watched else trainer.train()
        return trainer, guards

    (watched, guards), (plain, _) = train(True), train(False)
    finding = next(each for each in guards.findings if each.id == "loss_not_finite")
    assert finding.severity == "error" and "not applied" not in finding.found
    assert all(value.isnan().all() for value in watched.model.parameters() if value.requires_grad)
    assert watched.optimizer.state_dict()["state"][0]["step"] == plain.optimizer.state_dict()["state"][0]["step"] == 3
