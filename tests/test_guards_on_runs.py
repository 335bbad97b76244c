"""Every guard on a real run of a stock Trainer: named first where its bug is, silent and judged where it is not.

The bugs are put in from outside, where users put them: loss function, collator, dataset, hooks, optimizer, scheduler,
checkpoint files. `init_loss_off` is information but for logits that are probabilities.
"""

import functools
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from recipe.guards import RegressionCallback
from recipe.guards.session import Session, survives
from recipe.guards.step import Step
from recipe.guards.taps import PendingStep
from recipe.results import verdict

ROWS, LENGTH, STATES, EOS = 4, 64, 64, 256
LOSS = ("init_loss_off", "missing_label_shift", "double_label_shift", "wrong_loss_target", "loss_not_finite")
ATTENTION = ("non_causal_attention", "row_leak")
COUNTED = ("repeated_data", "token_out_of_range", "padding_is_target", "eos_never_target")
EVALUATION = ("eval_not_repeatable", "eval_train_mismatch", "train_eval_overlap", "train_eval_gap")
OPTIMIZED = ("optimizer_off", "learning_rate_off", "frozen_parameters", "untied_weights")
CURVES = ("loss_spike", "grad_norm_off", "loss_below_envelope")


# --- data and runs


@functools.cache
def text(count: int, length: int = LENGTH, seed: int = 1, first_token: int = 0) -> torch.Tensor:
    """Rows `[count, length]` of a Markov chain: what follows a token can be learned, unlike in random tokens."""
    follow = torch.rand(STATES, STATES, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.55, 0.25, 0.15, 0.05])
    ranks = torch.multinomial(shares, count * length, replacement=True, generator=generator).view(count, length)
    ids = torch.randint(STATES, (count, length), generator=generator)
    for place in range(1, length):
        ids[:, place] = follow[ids[:, place - 1], ranks[:, place]]
    return ids + first_token


def as_rows(ids: torch.Tensor, labels: torch.Tensor | None = None) -> list[dict]:
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, ids if labels is None else labels, strict=True)]


def documents(count: int, seed: int = 1) -> list[dict]:
    """Packed rows of two documents each: EOS between them, positions restart, the first token is no target."""
    rows = []
    for number, ids in enumerate(text(count, seed=seed).clone()):
        cut = LENGTH // 4 + number * 7 % (LENGTH // 2)
        ids[cut - 1] = EOS
        labels, positions = ids.clone(), torch.arange(LENGTH)
        labels[cut] = -100
        positions[cut:] -= cut
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return rows


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(intermediate_size=64, max_position_embeddings=2 * LENGTH, vocab_size=257)
    tokens = dict(tie_word_embeddings=True, eos_token_id=EOS, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **tokens, **changes}))


def make_trainer(tmp_path, model=None, train=None, steps=4, trainer_class=Trainer, more=None, **arguments) -> Trainer:
    """`more`: of Trainer, the other keywords: of TrainingArguments."""
    values = dict(output_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=ROWS, use_cpu=True)
    values |= dict(disable_tqdm=True, report_to=[], save_strategy="no", logging_steps=1000, learning_rate=3e-3)
    values |= dict(per_device_eval_batch_size=ROWS, lr_scheduler_type="constant")
    args = TrainingArguments(**{**values, **arguments})
    rows_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    train = as_rows(text(steps * rows_a_step)) if train is None else train
    return trainer_class(model=model or make_model(), args=args, train_dataset=train, **(more or {}))


def watch(trainer: Trainer, checkpoint=None, **options) -> RegressionCallback:
    guards = RegressionCallback(**options)
    trainer.add_callback(guards)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return guards


def train(tmp_path, **run) -> RegressionCallback:
    return watch(make_trainer(tmp_path, **run))


def alarms(guards: RegressionCallback) -> list[tuple[str, int]]:
    return [(finding.id, finding.step) for finding in guards.findings if finding.severity != "info"]


def check_first(guards: RegressionCallback, name: str, first: int, last: int | None = None) -> None:
    found = alarms(guards)
    assert found and found[0][0] == name, (found, guards.cannot_judge.get(name))
    assert first <= found[0][1] <= (first if last is None else last), found


def check_healthy(guards: RegressionCallback, *names: str) -> None:
    assert alarms(guards) == [], [finding.log_line() for finding in guards.findings]
    missing = sorted(set(names) - guards.judged)
    assert not missing, (missing, guards.cannot_judge, guards.not_applicable)


class From(TrainerCallback):
    """Calls `act` once, after step `step`; `since` says whether that has happened."""

    def __init__(self, step: int, act=lambda model: None):
        self.step, self.act, self.since = step, act, False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.since = True
            self.act(model)


def next_token_loss(logits, targets, num_items_in_batch=None):
    """`targets` are already shifted."""
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def shifted(labels):
    return F.pad(labels[:, 1:], (0, 1), value=-100)


# --- healthy runs, shared


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Packed documents, accumulated, evaluated three times, saved at step 40."""
    tmp_path = tmp_path_factory.mktemp("healthy")
    run = dict(
        train=documents(8 * 66), steps=66, gradient_accumulation_steps=2, more={"eval_dataset": documents(16, 2)}
    )
    trainer = make_trainer(tmp_path, **run, eval_strategy="steps", eval_steps=22, save_strategy="steps", save_steps=40)
    return watch(trainer), run, tmp_path


def test_a_healthy_run_is_judged_and_silent(healthy):
    others = ("cross_document_attention", "accumulation_mismatch")
    check_healthy(healthy[0], *LOSS, *ATTENTION, *others, *COUNTED, *EVALUATION, *OPTIMIZED, *CURVES)


def test_a_resumed_run_is_judged_and_silent_and_keeps_its_memory(healthy):
    guards, run, tmp_path = healthy
    checkpoint = tmp_path / "run/checkpoint-40"
    saved = json.loads((checkpoint / "guards.json").read_text())
    trainer = make_trainer(tmp_path / "resumed", **run)
    resumed = watch(trainer, checkpoint)
    check_healthy(resumed, "resume_jump", "resume_replay", *CURVES[2:])
    assert saved["step"] == 40 and trainer.state.global_step == 66
    states = [each.session.runner.save(each.session.run) for each in (guards, resumed)]
    for name, state in states[0][0].items():
        if name not in ("ResumeJump", "OptimizerOff"):  # these look again after a resume
            assert states[1][0].get(name) == state, name
    floors = [[record["floor"] for record in each.history[-26:]] for each in (guards, resumed)]
    assert floors[0] == floors[1]


USUAL = {
    "label smoothing": dict(label_smoothing_factor=0.1, gradient_accumulation_steps=2),
    "noisy embeddings": dict(neftune_noise_alpha=5.0),
    "bf16, activations again": dict(bf16=True, activation_checkpointing=True, gradient_accumulation_steps=2),
    "Adafactor": dict(optim="adafactor"),
    "plateaus": dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5}),
    "random tokens": dict(
        train=as_rows(torch.randint(257, (96, LENGTH), generator=torch.Generator().manual_seed(1))), learning_rate=1e-2
    ),
    "epochs that end in a short step": dict(train=as_rows(text(18)), gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("arguments", USUAL.values(), ids=USUAL)
def test_usual_settings_are_no_fault(tmp_path, arguments):
    check_healthy(train(tmp_path, steps=24, **arguments))


def test_two_eval_sets_are_no_fault(tmp_path):
    more = {"eval_dataset": {"a": as_rows(text(7, seed=2)), "b": uneven(9)}}
    guards = train(tmp_path, steps=8, eval_strategy="steps", eval_steps=4, eval_on_start=True, more=more)
    check_healthy(guards, "eval_not_repeatable", "eval_train_mismatch")


def test_a_run_made_longer_at_its_resume_is_no_fault(tmp_path):
    """In the second epoch; the schedule is drawn out, so one step still has the rate that was saved."""
    run = dict(train=as_rows(text(32)), lr_scheduler_type="linear")
    check_healthy(train(tmp_path, steps=16, **run, save_strategy="steps", save_steps=12))
    guards = watch(make_trainer(tmp_path, steps=32, **run), tmp_path / "run/checkpoint-12")
    check_healthy(guards, "resume_jump", "resume_replay", "learning_rate_off")


# --- the loss


def test_a_missing_shift(tmp_path):
    model = make_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: next_token_loss(logits, labels)
    check_first(train(tmp_path, model=model), "missing_label_shift", 0)


def test_a_double_shift(tmp_path):
    ids = text(16)
    check_first(train(tmp_path, train=as_rows(ids, shifted(ids))), "double_label_shift", 0)


def test_targets_of_another_row(tmp_path):
    model = make_model()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: next_token_loss(logits, shifted(labels.flip(0)))
    check_first(train(tmp_path, model=model), "wrong_loss_target", 0)


def test_wrong_targets_of_one_row_in_eight_from_step_5_on_are_seen_in_passing(tmp_path):
    model, bug = make_model(), From(4)

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        targets = shifted(labels)
        if bug.since:
            targets[6] = targets[6].flip(0)
        return next_token_loss(logits, targets, num_items_in_batch)

    model.loss_function = loss_function
    guards = train(tmp_path, model=model, steps=20, per_device_train_batch_size=8, more={"callbacks": [bug]})
    check_first(guards, "wrong_loss_target", 5, 14)  # four of the rows, every second step, each in its turn
    assert guards.findings[0].evidence["row"] == 6


def test_shuffled_labels_of_a_tenth_of_the_rows(tmp_path):
    ids = text(20 * ROWS)
    labels = ids.clone()
    labels[9::10] = labels[9::10].flip(1)
    check_first(train(tmp_path, train=as_rows(ids, labels), steps=20), "wrong_loss_target", 1, 10)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_nan_that_trainer_logs_as_zero(tmp_path, filtered):
    bug = From(3, lambda model: model.model.norm.weight.data.fill_(float("nan")))
    guards = train(tmp_path, steps=6, more={"callbacks": [bug]}, logging_nan_inf_filter=filtered)
    check_first(guards, "loss_not_finite", 4)


# --- the attention


def test_one_layer_that_is_not_causal(tmp_path):
    model = make_model()
    model.model.layers[1].self_attn.is_causal = False
    check_first(train(tmp_path, model=model), "non_causal_attention", 0)


def test_a_mean_over_the_batch(tmp_path):
    model = make_model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out - 0.1 * out.mean(0, keepdim=True))
    check_first(train(tmp_path, model=model), "row_leak", 0)


def test_a_mask_of_ones_beside_restarting_positions(tmp_path):
    rows = [row | {"attention_mask": torch.ones(LENGTH, dtype=torch.long)} for row in documents(16)]
    check_first(train(tmp_path, train=rows), "cross_document_attention", 0)


# --- the first loss: a hint only


def test_a_model_drawn_from_too_wide_a_distribution(tmp_path):
    guards = train(tmp_path, model=make_model(initializer_range=1.0))
    assert [(finding.id, finding.severity) for finding in guards.findings] == [("init_loss_off", "info")]


# --- accumulation


def uneven(count: int) -> list[dict]:
    ids = text(count)
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[8 + number * 11 % 48 :] = -100
    return as_rows(ids, labels)


class SumOfMeans(Trainer):
    """Divides by the scored tokens of its own micro-batch alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class MeanOfMeans(SumOfMeans):
    """And by the number of micro-batches, as Trainer does for models that know nothing of num_items_in_batch."""

    def __init__(self, *arguments, **kwargs):
        super().__init__(*arguments, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize("trainer_class", [SumOfMeans, MeanOfMeans])
def test_micro_batches_that_do_not_weigh_as_their_tokens(tmp_path, trainer_class):
    run = dict(train=uneven(48), steps=6, gradient_accumulation_steps=2)
    check_first(train(tmp_path, trainer_class=trainer_class, **run), "accumulation_mismatch", 0)


@pytest.mark.parametrize("trainer_class", [SumOfMeans, MeanOfMeans])
def test_they_are_seen_in_passing_where_the_probe_cannot_judge(tmp_path, trainer_class):
    trainer = make_trainer(
        tmp_path, trainer_class=trainer_class, train=uneven(96), steps=12, gradient_accumulation_steps=2
    )
    training_step = trainer.training_step
    trainer.training_step = lambda *arguments, **kwargs: training_step(*arguments, **kwargs)
    guards = watch(trainer)
    assert "training_step was replaced" in guards.cannot_judge["accumulation_mismatch"]
    check_first(guards, "accumulation_mismatch", 3, 12)


def test_uneven_rows_are_no_fault(tmp_path):
    check_healthy(train(tmp_path, train=uneven(48), steps=6, gradient_accumulation_steps=2), "accumulation_mismatch")


# --- the curve


def leak_next_token(model, place):
    """In train mode the residual stream at `place` gets the next position's. Switched on by the returned list."""
    is_on = []

    def leak(module, args, out):
        return out + F.pad(out[:, 1:], (0, 0, 0, 1)) if is_on and module.training else out

    place(model).register_forward_hook(leak)
    return is_on


def test_a_leak_that_no_probe_sees_falls_below_the_envelope(tmp_path):
    model = make_model()
    is_on = leak_next_token(model, lambda model: model.model.embed_tokens)
    bug = From(30, lambda model: is_on.append(1))
    guards = train(tmp_path, model=model, steps=52, learning_rate=1e-2, more={"callbacks": [bug]})
    check_first(guards, "loss_below_envelope", 31, 50)
    assert "non_causal_attention" in guards.findings[0].evidence["asked_again_and_clear"]


def test_a_leak_of_a_later_step_is_named_when_the_curve_asks_again(tmp_path):
    model = make_model()
    is_on = leak_next_token(model, lambda model: model.model.layers[0])
    bug = From(30, lambda model: is_on.append(1))
    guards = train(tmp_path, model=model, steps=52, learning_rate=1e-2, more={"callbacks": [bug]})
    check_first(guards, "non_causal_attention", 31, 50)
    curve = guards.findings[1]
    assert curve.id == "loss_below_envelope" and curve.evidence["causes"] == ["non_causal_attention"]


def reference(tmp_path, loss: float) -> str:
    points = [{"tokens": tokens, "loss": loss, "low": loss - 0.3, "high": loss + 0.3} for tokens in (1, 10**6)]
    values = {"name": "own", "description": "", "belongs_to": {}, "window": 5, "points": points}
    (tmp_path / "reference.json").write_text(json.dumps(values))
    return str(tmp_path / "reference.json")


def test_a_curve_off_its_reference(tmp_path):
    guards = watch(make_trainer(tmp_path, steps=8), trajectory=reference(tmp_path, 3.0))
    check_first(guards, "loss_off_reference", 5)


def test_a_curve_on_its_reference(tmp_path):
    guards = watch(make_trainer(tmp_path, steps=8, learning_rate=1e-4), trajectory=reference(tmp_path, 5.55))
    check_healthy(guards, "loss_off_reference")


def test_a_jump_of_the_loss(tmp_path):
    bug = From(57, lambda model: model.model.embed_tokens.weight.data.mul_(30))
    guards = train(tmp_path, steps=66, learning_rate=1e-4, more={"callbacks": [bug]})
    check_first(guards, "loss_spike", 62)
    assert guards.findings[0].evidence["grad_norm_now"] > guards.findings[0].evidence["grad_norm_before"] > 0


def test_a_softmax_before_the_loss(tmp_path):
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.softmax(-1))
    check_first(train(tmp_path, model=model, steps=2), "init_loss_off", 0)


class RateSpike(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.param_groups[0]["lr"] = 3.0 if state.global_step >= 57 else args.learning_rate


def test_a_jump_of_the_loss_is_explained_by_the_learning_rate(tmp_path):
    guards = train(tmp_path, steps=66, learning_rate=1e-4, more={"callbacks": [RateSpike()]})
    check_first(guards, "learning_rate_off", 58)
    spike = next(finding for finding in guards.findings if finding.id == "loss_spike")
    assert spike.likely_causes[0].startswith("learning_rate_off (step 58")


def test_gradients_clipped_before_they_are_unscaled(tmp_path, monkeypatch):
    clip = Accelerator.clip_grad_norm_

    def clip_scaled(accelerator, parameters, *args, **kwargs):
        parameters = list(parameters)
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_mul_(gradients, 2.0**16)
        norm = clip(accelerator, parameters, *args, **kwargs)
        torch._foreach_div_(gradients, 2.0**16)
        return norm

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_scaled)
    check_first(train(tmp_path, max_grad_norm=1.0), "grad_norm_off", 1)


class FirstMicroBatchOfMatrices(Trainer):
    def training_step(self, model, *args, **kwargs):
        weights = [p for p in model.model.layers.parameters() if p.dim() == 2]
        first = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        loss = super().training_step(model, *args, **kwargs)
        for weight, gradient in zip(weights, first, strict=True):
            weight.grad = weight.grad if gradient is None else gradient
        return loss


def test_matrices_that_keep_their_first_micro_batch(tmp_path):
    run = {"trainer_class": FirstMicroBatchOfMatrices, "gradient_accumulation_steps": 2}
    check_first(train(tmp_path, steps=6, **run), "accumulation_mismatch", 3)


class Optimizes(TrainerCallback):
    def __init__(self, change):
        self.change = change

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group.update(self.change)


@pytest.mark.parametrize(
    ("change", "step"), [({"decoupled_weight_decay": False, "weight_decay": 0.1}, 1), ({"betas": (0.99, 0.9)}, 0)]
)
def test_an_optimizer_that_is_not_what_it_is_called(tmp_path, change, step):
    guards = train(tmp_path, more={"callbacks": [Optimizes(change)]}, optim="adamw_torch")
    check_first(guards, "optimizer_off", step)


class Plain(torch.nn.Module):
    """A model as in a script of one file: no config, no names for its embedding and its head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.tokens, self.out = torch.nn.Embedding(257, 16), torch.nn.Linear(16, 257)
        self.extra = torch.nn.Parameter(torch.ones(16, dtype=dtype))
        self.unused = torch.nn.Parameter(torch.zeros(0))

    def forward(self, input_ids, labels):
        logits = self.out(self.tokens(input_ids) * self.extra.real)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class NamesNoEmbedding(LlamaForCausalLM):
    def get_input_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", [Plain, functools.partial(Plain, torch.complex64), "no embedding"])
def test_a_model_that_names_little_trains(tmp_path, kind):
    """And is watched as far as can be: what is not known is said."""
    model = make_model() if kind == "no embedding" else kind()
    if kind == "no embedding":
        model.__class__ = NamesNoEmbedding
    guards = train(tmp_path, model=model, optim="adamw_torch")
    assert not alarms(guards) and {"learning_rate_off", "loss_not_finite"} <= guards.judged
    assert not any("guards failed" in reason for reason in guards.cannot_judge.values()), guards.cannot_judge


class OfNumbers(torch.nn.Linear):
    def forward(self, values, labels):
        logits = super().forward(values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_model_without_tokens_trains(tmp_path):
    torch.manual_seed(0)
    rows = [{"values": torch.randn(8), "labels": torch.tensor(number % 3)} for number in range(40)]
    guards = train(tmp_path, model=OfNumbers(8, 3), train=rows)
    assert not alarms(guards) and "loss_not_finite" in guards.judged
    assert "without input_ids" in guards.not_applicable["missing_label_shift"]


@pytest.mark.parametrize(
    "owner, method",
    [
        (Session, "_prepare"),
        (Session, "before_micro_step"),
        (Session, "_send"),
        (PendingStep, "read"),
        (Step, "gather"),
    ],
)
def test_a_fault_of_the_guards_does_not_end_the_training(tmp_path, monkeypatch, caplog, owner, method):
    alone = make_trainer(tmp_path / "alone", steps=6)
    alone.train()

    def fails(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(owner, method, survives(fails) if owner is Session else fails)
    watched = make_trainer(tmp_path / "watched", steps=6)
    guards = watch(watched)
    assert watched.state.global_step == 6
    assert all(map(torch.equal, alone.model.parameters(), watched.model.parameters()))
    assert guards.failure == "the guards failed with ZeroDivisionError: a bug"
    assert guards.failure in guards.cannot_judge.values()
    assert verdict(guards, interrupted_by=None).text == f"not judged: {guards.failure}"
    assert "the training goes on without them" in caplog.text


def test_a_trainer_that_trains_twice_is_no_fault(tmp_path):
    trainer = make_trainer(tmp_path, steps=12)
    first, second = watch(trainer), trainer.callback_handler.callbacks[-1]
    trainer.train()
    assert first is second and not alarms(second)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_other_optimizers_are_not_held_against_adam(tmp_path, optim):
    guards = train(tmp_path, optim=optim)
    assert not alarms(guards) and "optimizer_off" in guards.not_applicable


# --- the data


class Stream(IterableDataset):
    """Ends after its rows; every worker reads all of them."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        yield from as_rows(text(self.count, 2 * LENGTH))


def test_a_stream_that_ends_and_begins_again(tmp_path):
    guards = train(tmp_path, train=Stream(40 * ROWS), steps=60)
    check_first(guards, "repeated_data", 41, 56)
    assert "restarted: in the same order" in guards.findings[0].likely_causes[0]


def test_workers_that_each_read_the_whole_stream(tmp_path):
    guards = train(tmp_path, train=Stream(80 * ROWS), steps=60, dataloader_num_workers=2)
    check_first(guards, "repeated_data", 16, 40)
    assert "each worker reads all the data" in guards.findings[0].likely_causes[0]


def test_epochs_of_sized_data_are_declared(tmp_path):
    check_healthy(train(tmp_path, train=as_rows(text(20 * ROWS, 2 * LENGTH)), steps=70), "repeated_data")


def test_one_train_row_in_twenty_is_an_eval_row_at_another_alignment(tmp_path):
    held_out, ids = text(32, 2 * LENGTH, seed=2), text(40 * ROWS, 2 * LENGTH).clone()
    ids[::20, : LENGTH + 30] = held_out[: len(ids[::20]), LENGTH - 30 :]
    run = dict(train=as_rows(ids), steps=40, eval_strategy="steps", eval_steps=10)
    guards = train(tmp_path, **run, more={"eval_dataset": as_rows(held_out)})
    check_first(guards, "train_eval_overlap", 1, 21)


def test_tokens_that_the_embedding_does_not_have(tmp_path):
    """Reachable where the model folds them in; else torch ends the run itself."""
    model, ids = make_model(), text(16).clone()
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: (args[0] % 257,))
    ids[5, 7] = 300
    labels = ids.where(ids < 257, -100)
    check_first(train(tmp_path, model=model, train=as_rows(ids, labels)), "token_out_of_range", 0, 4)


def padded(count: int) -> list[dict]:
    """Documents of different lengths that end with EOS, not yet padded."""
    ids = text(count, LENGTH)
    return [{"input_ids": [*row[: 30 + number * 7 % 30].tolist(), EOS]} for number, row in enumerate(ids)]


@pytest.fixture
def padding_tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


def beginning_with(bos: tuple[int, ...], every: int = 1) -> list[dict]:
    """Of each of these numbers of rows the first begins with `bos`, the others with one BOS."""
    ids = text(80)
    begins = [bos if number % every == 0 else bos[:1] for number in range(len(ids))]
    return as_rows([torch.tensor([*begin, *row.tolist()])[:LENGTH] for begin, row in zip(begins, ids, strict=True)])


def test_two_bos_before_each_text(tmp_path):
    """Four texts a step: known with the sixteenth. A Trainer without tokenizer has the config's BOS."""
    guards = train(tmp_path, model=make_model(bos_token_id=255), train=beginning_with((255, 255)), steps=20)
    check_first(guards, "double_bos", 4)


@pytest.mark.parametrize("model, judged", [({"bos_token_id": 255}, True), ({"bos_token_id": 1}, True), ({}, False)])
def test_one_bos_empty_texts_ordinary_tokens_and_no_bos_are_no_fault(tmp_path, model, judged):
    guards = train(tmp_path, model=make_model(**model), train=beginning_with((255, 255), every=20), steps=20)
    check_healthy(guards, *["double_bos"] * judged)
    assert ("double_bos" in guards.not_applicable) == (not judged)


@pytest.mark.parametrize("added, severity", [([], None), (["<a>"], "info")])
def test_a_tokenizer_as_large_as_the_embedding_and_larger(tmp_path, padding_tokenizer, added, severity):
    padding_tokenizer.add_tokens(added)
    guards = train(tmp_path, more={"processing_class": padding_tokenizer, "data_collator": default_data_collator})
    check_healthy(guards, "token_out_of_range")
    found = [finding.severity for finding in guards.findings if finding.id == "token_out_of_range"]
    assert found == [severity] * bool(added)


def test_a_tokenizer_of_another_model_hidden_by_a_modulo(tmp_path, padding_tokenizer):
    more = {"processing_class": padding_tokenizer, "data_collator": default_data_collator}
    guards = train(tmp_path, model=make_model(vocab_size=250, eos_token_id=249), more=more)
    check_first(guards, "token_out_of_range", 0)


def test_a_pad_token_that_is_eos(tmp_path, padding_tokenizer):
    padding_tokenizer.pad_token = padding_tokenizer.eos_token
    more = {"data_collator": DataCollatorForLanguageModeling(padding_tokenizer, mlm=False)}
    guards = train(tmp_path, train=padded(80), steps=20, more=more)
    check_first(guards, "eos_never_target", 8, 9)


def test_a_pad_token_of_its_own(tmp_path, padding_tokenizer):
    padding_tokenizer.pad_token = padding_tokenizer.convert_ids_to_tokens(200)
    more = {"data_collator": DataCollatorForLanguageModeling(padding_tokenizer, mlm=False)}
    guards = train(tmp_path, train=padded(80), steps=20, more=more)
    check_healthy(guards, "eos_never_target", "padding_is_target")


def test_labels_that_are_a_copy_of_padded_ids(tmp_path, padding_tokenizer):
    padding_tokenizer.pad_token = padding_tokenizer.convert_ids_to_tokens(200)

    def collate(rows):
        batch = padding_tokenizer.pad(rows, return_tensors="pt")
        return batch | {"labels": batch["input_ids"].clone()}

    guards = train(tmp_path, train=padded(80), steps=20, more={"data_collator": collate})
    check_first(guards, "padding_is_target", 0, 3)


# --- evaluation


class DropoutLeftOn(Trainer):
    def prediction_step(self, model, *arguments, **kwargs):
        model.train()
        return super().prediction_step(model, *arguments, **kwargs)


class Doubled(Trainer):
    def prediction_step(self, *arguments, **kwargs):
        loss, *others = super().prediction_step(*arguments, **kwargs)
        return (2 * loss, *others)


def evaluated(**run) -> dict:
    held_out = {"eval_dataset": as_rows(text(8, seed=2))}
    return {"eval_strategy": "steps", "eval_steps": 4, "more": held_out, **run}


def test_dropout_left_on_in_evaluation(tmp_path):
    model = make_model(attention_dropout=0.1)
    check_first(train(tmp_path, **evaluated(model=model, trainer_class=DropoutLeftOn)), "eval_not_repeatable", 0)
    guards = train(tmp_path, model=model, trainer_class=DropoutLeftOn)  # nothing is evaluated
    assert alarms(guards) == [] and guards.findings[0].id == "eval_not_repeatable"


def test_dropout_in_training_only(tmp_path):
    check_healthy(train(tmp_path, model=make_model(attention_dropout=0.1)), "eval_not_repeatable")


class GoesOn(IterableDataset):
    """Each evaluation gets the next rows."""

    def __init__(self):
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        yield from as_rows(text(8, seed=10 + self.begun))


def test_an_eval_stream_that_goes_on(tmp_path):
    guards = train(tmp_path, steps=12, eval_strategy="steps", eval_steps=4, more={"eval_dataset": GoesOn()})
    check_first(guards, "eval_not_repeatable", 8)


def test_an_evaluation_on_another_scale(tmp_path):
    check_first(train(tmp_path, **evaluated(trainer_class=Doubled)), "eval_train_mismatch", 0)


def test_an_eval_text_of_another_kind(tmp_path):
    held_out = as_rows(text(16, first_token=128))
    guards = train(tmp_path, steps=40, eval_strategy="steps", eval_steps=40, more={"eval_dataset": held_out})
    check_first(guards, "train_eval_gap", 40)


# --- resuming


@pytest.fixture
def saved(healthy, tmp_path):
    """A copy of the healthy run's checkpoint 40, and a trainer that goes on from it."""
    _, run, source = healthy
    checkpoint = tmp_path / "run/checkpoint-40"
    shutil.copytree(source / "run/checkpoint-40", checkpoint)
    return checkpoint, functools.partial(make_trainer, tmp_path, **run)


def test_data_that_comes_round_again_after_a_resume(saved):
    checkpoint, make = saved
    check_first(watch(make(ignore_data_skip=True), checkpoint), "resume_replay", 41, 46)


def test_a_lost_optimizer(saved):
    checkpoint, make = saved
    (checkpoint / "optimizer.pt").unlink()
    check_first(watch(make(), checkpoint), "resume_jump", 40)


def test_altered_weights(saved):
    checkpoint, make = saved
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].flip(0).contiguous()}, checkpoint / "model.safetensors", {"format": "pt"})
    check_first(watch(make(), checkpoint), "resume_jump", 40)


@pytest.mark.parametrize("name", ["guards.json", "guards.npz"])
@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_damaged_state_is_logged_once_and_ends_nothing(saved, name, damage, caplog):
    checkpoint, make = saved
    whole = (checkpoint / name).read_bytes()
    other = b'{"step": 40}' if name == "guards.json" else b"PK\x05\x06" + bytes(18)
    (checkpoint / name).write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "other": other}[damage])
    trainer = make(max_steps=42)
    with caplog.at_level(logging.INFO, "recipe.guards"):
        guards = watch(trainer, checkpoint)
    own = [record for record in caplog.records if record.name == "recipe.guards"]
    warnings = [record.getMessage() for record in own if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "the guards' state cannot be restored" in warnings[0]
    assert trainer.state.global_step == 42 and alarms(guards) == []


def test_what_is_active_at_the_save_is_not_said_again(tmp_path):
    run = dict(train=as_rows(text(16 * ROWS), shifted(text(16 * ROWS))), steps=16)
    check_first(watch(make_trainer(tmp_path, **run, save_strategy="steps", save_steps=8)), "double_label_shift", 0)
    guards = watch(make_trainer(tmp_path, **run), tmp_path / "run/checkpoint-8")
    assert [finding for finding in guards.findings if finding.step >= 8] == []


# --- the optimizer


class SteppedTwice(TrainerCallback):
    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        lr_scheduler.step()


def test_a_schedule_that_runs_twice_as_fast(tmp_path):
    run = dict(steps=10, lr_scheduler_type="linear", more={"callbacks": [SteppedTwice()]})
    check_first(train(tmp_path, **run), "learning_rate_off", 4)


def test_a_schedule_that_is_kept(tmp_path):
    check_healthy(train(tmp_path, steps=10, lr_scheduler_type="cosine", warmup_steps=3), "learning_rate_off")


class ForgetsALayer(Trainer):
    def create_optimizer(self, *arguments):
        kept = [p for name, p in self.model.named_parameters() if "layers.1.mlp" not in name]
        self.optimizer = torch.optim.AdamW(kept, lr=self.args.learning_rate)
        return self.optimizer


def test_a_layer_that_no_optimizer_holds(tmp_path):
    check_first(train(tmp_path, trainer_class=ForgetsALayer), "frozen_parameters", 0)


def test_a_layer_cut_off_from_the_loss(tmp_path):
    model = make_model()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out.detach())
    check_first(train(tmp_path, model=model, steps=12), "frozen_parameters", 9)


@pytest.mark.parametrize("learning_rate, lost", [(2e-5, True), (3e-3, False)])
def test_updates_that_bf16_rounds_away(tmp_path, learning_rate, lost):
    guards = train(tmp_path, model=make_model().to(torch.bfloat16), steps=66, learning_rate=learning_rate)
    if lost:
        check_first(guards, "lost_updates", 64)
    else:
        check_healthy(guards, "lost_updates")


def test_a_window_of_updates_goes_on_after_a_resume(tmp_path, caplog):
    def make(steps):
        run = dict(learning_rate=2e-5, save_strategy="steps", save_steps=20, train=as_rows(text(66 * ROWS)))
        return make_trainer(tmp_path, model=make_model().to(torch.bfloat16), steps=steps, **run)

    assert alarms(watch(make(20))) == []
    check_first(watch(make(66), tmp_path / "run/checkpoint-20"), "lost_updates", 64)
    assert "damaged" not in caplog.text


class AveragesLeftBehind(TrainerCallback):
    def on_save(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.data.mul_(0.5)


def test_weights_that_a_save_leaves_in_the_model(tmp_path):
    run = dict(steps=22, save_strategy="steps", save_steps=20, more={"callbacks": [AveragesLeftBehind()]})
    check_first(train(tmp_path, **run), "lost_updates", 21)


def under_autocast(tmp_path, *callbacks: TrainerCallback, **autocast) -> RegressionCallback:
    trainer, guards = make_trainer(tmp_path, steps=12), RegressionCallback()
    for callback in (guards, *callbacks):
        trainer.add_callback(callback)
    with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
        trainer.train()
    return guards


def test_a_training_within_one_autocast_context(tmp_path):
    """Its forward passes use the first cast of each weight to the end."""
    guards = under_autocast(tmp_path)
    check_first(guards, "lost_updates", 2)
    assert guards.findings[0].severity == "error"


def test_a_context_around_ten_steps_each(tmp_path):
    class Outer(TrainerCallback):
        context = None

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % 10 == 0:
                self.on_train_end(args, state, control)
                self.context = torch.autocast("cpu", dtype=torch.bfloat16)
                self.context.__enter__()

        def on_train_end(self, args, state, control, **kwargs):
            if self.context is not None:
                self.context.__exit__(None, None, None)

    guards = train(tmp_path, steps=12, bf16=True, more={"callbacks": [Outer()]})
    check_first(guards, "lost_updates", 2)


class OwnAutocast(Trainer):
    def compute_loss(self, *arguments, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().compute_loss(*arguments, **kwargs)


class ClearsTheCache(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        torch.clear_autocast_cache()


def test_autocast_around_the_loss_alone_or_without_a_cache_is_no_fault(tmp_path):
    check_healthy(train(tmp_path / "loss", steps=12, trainer_class=OwnAutocast), "lost_updates")
    check_healthy(train(tmp_path / "bf16", steps=12, bf16=True), "lost_updates")
    uncached = under_autocast(tmp_path / "uncached", cache_enabled=False)
    cleared = under_autocast(tmp_path / "cleared", ClearsTheCache())
    for guards in (uncached, cleared):
        check_healthy(guards, "lost_updates")
        assert guards.judged_steps["lost_updates"] >= 12  # every step's casts


def test_a_head_that_is_no_longer_tied(tmp_path):
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    check_first(train(tmp_path, model=model), "untied_weights", 0)


# --- compiled, and over ranks


def broken_backend(graph, inputs):
    """A compiler that scales features differently."""
    return lambda *arguments: tuple(out * torch.linspace(0.5, 1.5, out.shape[-1]) for out in graph(*arguments))


@pytest.mark.slow  # dynamo traces the model: seconds, though no code is generated
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["eager", broken_backend])
def test_a_compiled_layer_that_computes_something_else(tmp_path, backend, in_place):
    torch.compiler.reset()
    model = make_model()
    if in_place:
        model.model.layers[1].compile(backend=backend)
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1], backend=backend)
    guards = train(tmp_path, model=model)
    if backend == "eager":
        check_healthy(guards, "compiled_mismatch")
    else:
        check_first(guards, "compiled_mismatch", 0)


def on_ranks(tmp_path, step: int) -> list[list]:
    """Two gloo ranks, the second of which moves a weight after `step` (0: never). Returns rank 0's alarms and ids."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, str(tmp_path), str(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 5])
def test_a_rank_whose_weights_go_their_own_way(tmp_path, step):
    found, judged = on_ranks(tmp_path, step)
    assert found == ([["rank_divergence", 10]] if step else [])
    assert "rank_divergence" in judged


def main(directory: str, step: str) -> None:
    rank = int(os.environ["RANK"])
    trainer = make_trainer(Path(directory), train=as_rows(text(12 * ROWS * 2)), steps=12)
    if rank == 1:
        trainer.add_callback(From(int(step), lambda model: model.get_parameter("model.norm.weight").data.mul_(1.01)))
    guards = watch(trainer)
    if rank == 0:
        (Path(directory) / "found.json").write_text(json.dumps([alarms(guards), sorted(guards.judged)]))


if __name__ == "__main__":
    main(*sys.argv[1:])


# --- the last line of a training of one's own


@pytest.mark.parametrize(("rate", "says"), [(0.0, "the learning rate was 0"), (3e-3, "too few tokens")])
def test_a_stock_trainer_ends_with_a_verdict(tmp_path, caplog, rate, says):
    caplog.set_level("INFO", "recipe.guards")
    train(tmp_path, learning_rate=rate)
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("verdict: ")]
    assert "nothing learned" in line and says in line


class Cycle(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return itertools.cycle(self.rows)


@pytest.mark.parametrize("count", [8, 16])
def test_an_endless_stream_of_a_few_rows(tmp_path, count):
    """The n-gram model finds the copies easy, which must not count against them."""
    run = dict(train=Cycle(as_rows(text(count, length=64))), steps=80, per_device_train_batch_size=8)
    guards = train(tmp_path, **run)
    assert "repeated_data" in dict(alarms(guards))
