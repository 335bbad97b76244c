"""FSDP2 on two gloo ranks: what can be judged is judged, the rest says why not, and the training is not changed.

accelerate ignores `fsdp` on CPU ranks; here its state is told to shard, and the parameters must be DTensor.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipe.guards import FINDING_IDS, RegressionCallback
from recipe.guards.step import norm_of

MODEL = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
STEPS, ROWS, LENGTH = 24, 4, 96
IDS = torch.randint(0, 257, (2 * ROWS * STEPS, LENGTH), generator=torch.Generator().manual_seed(1))
EVAL = torch.randint(0, 257, (8, LENGTH), generator=torch.Generator().manual_seed(2))


def shard_on_cpu() -> None:
    begin, plugins = AcceleratorState.__init__, []

    def with_shards(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        if plugins:  # each time: it takes the type of the processes' own state again
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = with_shards


class Act(TrainerCallback):
    """Calls `act` with the optimizer just before each step."""

    def __init__(self, act):
        self.act = act

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.act(state.global_step, optimizer)


def raise_the_rate(trainer):
    def act(step, optimizer):
        for group in optimizer.param_groups:
            group["lr"] *= 30 if step > 2 else 1

    trainer.add_callback(Act(act))


def change_loss(change):
    def apply(trainer):
        compute_loss = trainer.compute_loss

        def changed(*args, return_outputs=False, **kwargs):
            loss, outputs = compute_loss(*args, return_outputs=True, **kwargs)
            loss = change(trainer, loss)
            return (loss, outputs) if return_outputs else loss

        trainer.compute_loss = changed

    return apply


def leave_out_the_shift(trainer):
    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return total / (num_items_in_batch or labels.numel())

    trainer.model.loss_function = loss_function


def repeat_rows(trainer):
    trainer.train_dataset = [trainer.train_dataset[i % 24] for i in range(len(trainer.train_dataset))]


def train_on_eval(trainer):
    trainer.train_dataset[:64] = [trainer.eval_dataset[i % 8] for i in range(64)]


def break_one_step(trainer, loss):
    return loss * (math.nan if trainer.state.global_step == 3 else 1)


# What is wrong -> the id that names it.
FAULTS = {
    "rate": (raise_the_rate, "learning_rate_off"),
    "not a number": (
        change_loss(break_one_step),
        "loss_not_finite",
    ),
    "averaged over ranks twice": (change_loss(lambda t, loss: loss / 2), "accumulation_mismatch"),
    "no shift": (leave_out_the_shift, "missing_label_shift"),
    "repeated rows": (repeat_rows, "repeated_data"),
    "held-out rows": (train_on_eval, "train_eval_overlap"),
}


def train(folder: Path, change=None, guards=None) -> Trainer:
    AcceleratorState._reset_state()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=12,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
    )
    rows, held_out = ([{"input_ids": row, "labels": row} for row in ids] for ids in (IDS, EVAL))
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out)
    if change is not None:
        change(trainer)
    if guards is not None:
        trainer.add_callback(guards)
    trainer.train()
    assert any(isinstance(parameter.data, DTensor) for parameter in trainer.model.parameters())
    return trainer


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def on_both_ranks(folder: Path) -> None:
    shard_on_cpu()
    alone = train(folder / "alone")
    guards = RegressionCallback()
    watched = train(folder / "healthy", guards=guards)
    before, after = whole_weights(alone), whole_weights(watched)
    logged = [entry["grad_norm"] for entry in watched.state.log_history if "grad_norm" in entry]
    healthy = {
        "is_equal": all(torch.equal(value, before[name]) for name, value in after.items()),
        "failure": guards.failure,
        "findings": [finding.log_line() for finding in guards.findings],
        "judged": sorted(guards.judged),
        "reasons": {**guards.cannot_judge, **guards.not_applicable},
        "norms": [[record["grad_norm"] for record in guards.history], logged],
    }
    found = {}
    for name, (change, _) in FAULTS.items():
        guards = RegressionCallback()
        train(folder / name.replace(" ", "-"), change, guards)
        found[name] = {"failure": guards.failure, "alarms": [f.id for f in guards.findings if f.severity != "info"]}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps({"healthy": healthy, "faults": found}))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_the_training_is_not_changed_and_silent(results):
    healthy = results["healthy"]
    assert healthy["is_equal"] and healthy["failure"] is None and healthy["findings"] == []


def test_what_can_be_judged_is_judged(results):
    judged = {"loss_not_finite", "learning_rate_off", "missing_label_shift", "repeated_data", "train_eval_overlap"}
    judged |= {"accumulation_mismatch", "frozen_parameters", "loss_diverged", "token_out_of_range", "train_eval_gap"}
    assert judged <= set(results["healthy"]["judged"])


def test_the_rest_says_why_not(results):
    healthy = results["healthy"]
    silent = set(FINDING_IDS) - set(healthy["judged"]) - healthy["reasons"].keys()
    assert silent <= {"double_bos", "padding_is_target", "eos_never_target", "loss_below_envelope", "loss_spike"}
    assert not any("Error" in reason for reason in healthy["reasons"].values())
    for name in ("non_causal_attention", "wrong_gradient", "reference_mismatch", "optimizer_off"):
        assert "sharded" in healthy["reasons"][name], name


def test_the_norm_of_the_gradient_is_that_of_all_parts(results):
    ours, logged = results["healthy"]["norms"]
    assert ours == pytest.approx(logged[: len(ours)], rel=1e-5) and len(ours) >= STEPS - 1


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(results, name):
    found = results["faults"][name]
    assert found["failure"] is None and FAULTS[name][1] in found["alarms"]


def test_norms_of_parts_add_up():
    ranks = [{"grad_norm": 3.0, "norm_is_of_part": True}, {"grad_norm": 4.0, "norm_is_of_part": True}]
    assert norm_of(ranks) == 5.0
    assert norm_of([{"grad_norm": 3.0, "norm_is_of_part": False}] * 2) == 3.0
    assert norm_of([{"grad_norm": None, "norm_is_of_part": False}]) is None


# --- what is refused


def test_deepspeed_is_not_applicable(tiny_model, tmp_path):
    """Whatever it does with the optimizer and the model: no event of the training raises."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(tiny_model, arguments)
    trainer.is_deepspeed_enabled = True
    guards = RegressionCallback(trainer=trainer)
    trainer.add_callback(guards)
    given = (trainer.args, trainer.state, trainer.control)
    guards.on_train_begin(*given)
    guards.on_epoch_begin(*given)
    guards.on_pre_optimizer_step(*given, optimizer=None)
    guards.on_optimizer_step(*given)
    guards.on_step_end(*given)
    guards.on_evaluate(*given, metrics={"eval_loss": 1.0})
    guards.on_save(*given)
    guards.on_train_end(*given)
    assert guards.not_applicable.keys() == set(FINDING_IDS) and guards.cannot_judge == {} and guards.findings == []
    assert all("DeepSpeed" in reason for reason in guards.not_applicable.values())
    stored = json.loads((tmp_path / "_recipe/run.json").read_text())
    assert stored["result"]["verdict"].startswith("not judged: DeepSpeed keeps weights")


if __name__ == "__main__":
    on_both_ranks(Path(sys.argv[1]))
