"""What must hold on a CUDA device. `python -m tests.gpu` runs these too; with `--device cpu` on the CPU, at the same
sizes."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from recipe.generate import Sampling, sample_tokens
from recipe.guards import RegressionCallback
from recipe.guards.gradients import GradientTap
from recipe.guards.head import HeadTap
from recipe.guards.session import Session
from recipe.model import agree_on_tf32, why_not_compile
from tests.gpu.assertions import DEVICE
from tests.gpu.correctness import compare_losses
from tests.gpu.environment import attention_kernels
from tests.gpu.scale import Scale, batch_of, build_model, build_run
from tests.test_guard_rate import STEADY, train

ON = os.environ.get(DEVICE, "cuda")
SCALE = Scale(ON, is_tiny=True)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained(folder: Path, **keys):
    """A few steps of the recipe, guards on."""
    run = build_run(SCALE, folder, max_steps=3, **keys)
    run.trainer.train()
    return run


def test_the_first_losses_are_those_of_the_cpu():
    """On a CPU another order of the sums moved none by 1e-6; bf16 by 2e-6 at this size, and up to 1e-2 at larger
    ones. A fault moves them by far more."""
    found = compare_losses(SCALE)
    assert found["weights"] < 1e-3, "other initial weights: torch draws other numbers than the recorded version"
    assert found["fp32 / CPU"] < 1e-4, found
    assert found["bf16 / fp32"] < 1e-2, found


def test_packed_rows_take_a_fused_attention_kernel():
    found = attention_kernels(SCALE)
    for name in {"packed rows", "packed rows, compiled"} & found.keys():
        operators = found[name]["operators"]
        assert any("flash_attention" in each or "cudnn_attention" in each for each in operators), (name, operators)
        assert not found[name]["with mask"], name


def test_the_guards_watch_a_run_to_its_end(tmp_path):
    run = trained(tmp_path)
    assert run.guards.failure is None and len(run.guards.judged) > 15
    assert [finding.id for finding in run.guards.findings if finding.severity != "info"] == []
    assert not [reason for reason in run.guards.cannot_judge.values() if "failed" in reason]
    logged = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert [step["loss"] for step in run.guards.history] == pytest.approx(logged, rel=1e-6)


class Number(TrainerCallback):
    """Of the step that is made, from 0."""

    now = -1

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step


def test_in_a_steady_step_the_guards_never_wait_for_the_device(tiny_config, tmp_path, monkeypatch):
    """torch raises where the host waits for the device, in the guards' calls and in their hooks."""
    number, modes = Number(), []
    set_mode = torch.cuda.set_sync_debug_mode if ON == "cuda" else modes.append

    def strict(call):
        def strictly(*arguments, **kwargs):
            set_mode("error" if number.now in STEADY else "default")
            try:
                return call(*arguments, **kwargs)
            finally:
                set_mode("default")

        return strictly

    own = ("before_micro_step", "after_micro_step", "before_step", "after_step", "end_step", "flush")
    for owner, name in [*((Session, name) for name in own), (HeadTap, "_on_gradient"), (GradientTap, "_on_gradient")]:
        monkeypatch.setattr(owner, name, strict(getattr(owner, name)))
    guards = train(tmp_path, tiny_config, [number], device=ON)
    assert [tap.failure for tap in (guards.session.taps.head, *guards.session.taps.gradients)] == [None] * 3
    assert ON == "cuda" or "error" in modes


def test_a_compiled_model_is_compared_with_the_eager_one(tmp_path):
    if reason := why_not_compile():
        pytest.skip(reason)
    run = trained(tmp_path, torch_compile="true")
    assert run.guards.failure is None
    assert "compiled_mismatch" in run.guards.judged, run.guards.cannot_judge


def test_both_settings_of_tf32_agree():
    """torch.compile of torch 2.9 and 2.10 reads the older one, and raises where it differs."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.fp32_precision = "tf32"  # as transformers does
        agree_on_tf32()
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


class NoShift(Trainer):
    """Scores position i on token i."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), inputs["labels"].flatten())
        return (loss, {"logits": logits}) if return_outputs else loss


def test_a_missing_shift_is_named_before_step_1(tmp_path):
    trainer = trainer_of(tmp_path, NoShift)
    guards = RegressionCallback(on_regression="stop")
    trainer.add_callback(guards)
    trainer.train()
    assert guards.stopped_by.id == "missing_label_shift" and guards.stopped_by.step == 0


def trainer_of(folder: Path, kind=Trainer, **sizes) -> Trainer:
    rows = batch_of(Scale("cpu", True), 12, SCALE.block_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not SCALE.is_cuda,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return kind(model=build_model(SCALE, **sizes), args=arguments, train_dataset=data)


def test_the_guards_leave_the_device_s_random_numbers_alone(tmp_path):
    """With dropout, losses differ by far more than rounding once the generator is moved."""
    losses = []
    for guards in ([], [RegressionCallback()]):
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path / str(len(guards)), attention_dropout=0.5)
        for callback in guards:
            trainer.add_callback(callback)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_samples_leave_the_device_s_random_numbers_alone(tmp_path):
    run = build_run(SCALE, tmp_path, max_steps=1)
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if SCALE.is_cuda else [])]
    with suppress(ValueError):
        sample_tokens(run.trainer.model, run.data.tokenizer, [5, 6, 7], Sampling(max_new_tokens=4, seed=1))
    now = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if SCALE.is_cuda else [])]
    assert all(map(torch.equal, states, now))
