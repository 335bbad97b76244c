"""What others offer is used fairly: each raises an alarm on a bug that it is built for, and leaves the run alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipe.guards import RegressionCallback
from tests.zoo import results
from tests.zoo.others import TOOLS, Others
from tests.zoo.others.watchdog import Watchdog, is_spike

STEPS, ROWS, VOCABULARY = 40, 4, 97
SILENT = {tool: {} for tool in TOOLS}
ROOT = Path(__file__).resolve().parent.parent


def learnable_rows(count=STEPS * ROWS, length=32, shift=0):
    """Rows that count upwards from anywhere, with one token in four drawn at random; labels moved by `shift`."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    ids = (starts + torch.arange(length)) % VOCABULARY
    noise = torch.randint(0, VOCABULARY, ids.shape, generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.25, noise, ids)
    labels = torch.cat([ids[:, shift:], torch.full((count, shift), -100)], dim=1)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def make_trainer(path, rows=None, callbacks=(), **arguments):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=64, attention_dropout=0.1, **sizes))
    values = dict(
        output_dir=str(path),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        learning_rate=3e-3,
    )
    args = TrainingArguments(**{**values, **arguments})
    return Trainer(model=model, args=args, train_dataset=rows or learnable_rows(), callbacks=list(callbacks))


def watch(trainer, **options):
    others = Others()
    others.watch(trainer, **options)
    trainer.train()
    assert others.errors == []
    return others


def kinds(others):
    return {tool: {alarm["what"]: alarm["step"] for alarm in found} for tool, found in others.alarms().items()}


class After(TrainerCallback):
    """Does something to the weights after each step from `step` on."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.step:
            with torch.no_grad():
                self.change(model)


def test_every_tool_has_a_column():
    assert set(results.TOOLS) == set(TOOLS)


# --- the watchdog, on numbers


def bark(losses, norms=None):
    """The first step of each alarm."""
    dog, first = Watchdog(num_classes=100), {}
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=1):
        for what, _ in dog.judge({"step": step, "loss": loss, "grad_norm": norm}):
            first.setdefault(what, step)
    return first


def falling(count):
    return [4.6 * 0.98**step + 0.01 * (-1) ** step for step in range(count)]


def test_the_watchdog_is_silent_on_a_falling_curve():
    assert bark(falling(150)) == {}


def test_it_barks_at_what_is_not_finite():
    assert bark([*falling(5), math.nan]) == {"loss not finite": 6}
    assert bark(falling(3), [1.0, math.inf, 1.0]) == {"grad_norm not finite": 2}


def test_twice_the_first_loss_three_times_in_a_row():
    assert bark([4.6, 9.3, 9.3, 9.1, 9.3, 9.3, 9.3]) == {"loss too high": 7}


def test_a_constant_after_20_steps():
    assert bark([5.7] * 30) == {"loss too high": 23}  # over ln 100 + 1 = 5.61; judged from step 21 on
    assert bark([5.5] * 30) == {}


def test_six_deviations_over_the_mean_and_one_side_only():
    norms = [1.0, 1.2] * 50
    assert bark(falling(101), [*norms, 1.1 + 6.1 * 0.1]) == {"grad_norm spike": 101}
    assert bark(falling(101), [*norms, 1.1 + 5.9 * 0.1]) == {}
    assert bark(falling(101), [*norms, 0.0]) == {}


def test_no_spike_before_32_values_nor_at_no_deviation():
    assert not is_spike(100.0, [1.0, 2.0] * 15) and is_spike(100.0, [1.0, 2.0] * 16)
    assert not is_spike(100.0, [1.0] * 40)


def test_an_eval_entry_is_no_step():
    assert Watchdog(100).judge({"step": 3, "eval_loss": math.nan}) == []


# --- on runs


def test_a_healthy_run_is_silent_and_the_same_bit_for_bit(tmp_path, capsys):
    bare = make_trainer(tmp_path / "bare")
    bare.train()
    watched = make_trainer(tmp_path / "watched")
    capsys.readouterr()
    others = watch(watched)
    assert kinds(others) == SILENT and others.printed == []
    for one, other in zip(bare.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (bare, watched)]
    assert logs[0] == logs[1] and "training_step" not in vars(watched)


def test_all_see_nan_weights(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[After(12, lambda model: model.model.norm.weight.fill_(math.nan))])
    found = kinds(watch(trainer))
    assert found["watchdog"] == {"loss not finite": 13, "grad_norm not finite": 13}
    assert found["losslint"]["nan_inf"] == 13
    assert found["trainproof"]["TP-NAN-GRAD"] == 25  # its callback looks every 25 steps
    assert found["trainproof"]["TP-ZERO-LOSS-ONSET"] == 25
    assert found["torch-audit"] == {"TA100": 13}


def test_three_see_a_diverging_loss_and_keep_off_the_terminal(tmp_path, capsys):
    def spoil(model):
        model.lm_head.weight.mul_(1.5)

    others = watch(make_trainer(tmp_path, callbacks=[After(10, spoil)]))
    found = kinds(others)
    assert "loss too high" in found["watchdog"] and found["trainproof"]["TP-DIVERGE"] == 25
    assert 20 <= found["losslint"]["divergence"] < STEPS
    assert "TRAINPROOF WARNING - this run looks doomed" in others.printed[0]["text"]
    assert "TRAINPROOF" not in capsys.readouterr().out


def test_losslint_sees_a_spike_and_trainproof_a_jump_of_the_gradient(tmp_path):
    def jolt(model):
        model.lm_head.weight.mul_(jolt.factor)
        jolt.factor = 1 / jolt.factor if jolt.factor > 1 else 1.0

    jolt.factor = 200.0
    found = kinds(watch(make_trainer(tmp_path, callbacks=[After(33, jolt)])))
    assert found["losslint"]["loss_spike"] == 34 and found["watchdog"]["loss spike"] == 34
    assert found["trainproof"]["TP-GRAD-SPIKE"] == STEPS  # between two looks: seen when the run ends


def test_trainproof_sees_labels_shifted_by_the_user_before_step_1(tmp_path):
    found = kinds(watch(make_trainer(tmp_path, rows=learnable_rows(shift=1), max_steps=3)))
    assert found["trainproof"]["TP-OBJ-LABEL-SHIFT-DOUBLE"] == 0


def torch_audit_after(tmp_path, change, **arguments):
    return kinds(watch(make_trainer(tmp_path, callbacks=[After(2, change)], max_steps=4, **arguments)))["torch-audit"]


def test_torch_audit_sees_gradients_that_explode(tmp_path):
    def inflate(model):
        model.lm_head.weight.mul_(1000)

    assert torch_audit_after(tmp_path, inflate) == {"TA102": 3}


def test_torch_audit_sees_a_layer_that_is_never_called_and_settings_of_the_optimizer(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.model.forgotten = torch.nn.Linear(8, 8, bias=False)
    trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), weight_decay=0.1)
    found = kinds(watch(trainer))["torch-audit"]
    assert found == {"TA401": 0, "TA403": 0, "TA500": 1}
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_torch_audit_sees_negative_tokens_before_the_model_does(tmp_path):
    rows = learnable_rows()
    rows[0]["input_ids"] = rows[0]["input_ids"] - VOCABULARY
    others, trainer = Others(), make_trainer(tmp_path, rows=rows, train_sampling_strategy="sequential")
    others.watch(trainer)
    with pytest.raises(IndexError):
        trainer.train()
    assert kinds(others)["torch-audit"] == {"TA305": 0} and others.errors == []
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_trainsight_sees_a_label_that_is_another_token(tmp_path):
    others = watch(make_trainer(tmp_path, rows=learnable_rows(shift=1), max_steps=2))
    assert kinds(others)["trainsight"] == {"LABEL_TOKEN_MISMATCH": 0}


def padded_rows(scored):
    rows = learnable_rows()
    for row in rows:
        row["attention_mask"] = (torch.arange(32) < 24).long()
        row["labels"] = row["labels"].masked_fill(~scored, -100)
    return rows


def test_trainsight_sees_padding_and_prompts_that_are_scored(tmp_path):
    place, prompts = torch.arange(32), {"trainsight": {"prompt_lengths": lambda batch: [8] * len(batch["labels"])}}
    cases = {
        "healthy": ((place >= 8) & (place < 24), prompts, {}),
        "padding": (place >= 8, {}, {"PADDING_LABELS_UNMASKED": 0}),
        "prompts": (place < 24, prompts, {"PROMPT_LABELS_UNMASKED": 0}),
        "no prompts": (place < 24, {}, {}),
        "nothing": (place < 0, {}, {"NO_SUPERVISED_TOKENS": 0}),
    }
    for name, (scored, options, found) in cases.items():
        others = watch(make_trainer(tmp_path, rows=padded_rows(scored), max_steps=1), **options)
        assert kinds(others)["trainsight"] == found, name


class Stream(IterableDataset):
    def __iter__(self):
        return iter(learnable_rows(shift=1))


def test_and_in_a_stream_and_believes_who_says_that_the_loss_does_not_shift(tmp_path):
    assert (
        "TP-OBJ-LABEL-SHIFT-DOUBLE" in kinds(watch(make_trainer(tmp_path, rows=Stream(), max_steps=2)))["trainproof"]
    )
    trainer = make_trainer(tmp_path, rows=learnable_rows(shift=1), max_steps=2)
    others = watch(trainer, trainproof={"loss_shifts": False})
    assert "TP-OBJ-LABEL-SHIFT-DOUBLE" not in kinds(others)["trainproof"]


def test_trainproof_sees_a_class_that_is_never_a_target_and_an_ignore_index_that_is_a_class(tmp_path):
    rows = learnable_rows()
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["labels"] == 5, -100)
    trainer = make_trainer(tmp_path, rows=rows, max_steps=33)
    trainer.model.config.ignore_index = 7
    found = kinds(watch(trainer))["trainproof"]
    assert found["TP-OBJ-DEAD-CLASS"] == 0 and found["TP-OBJ-IGNORE-INDEX-COLLISION"] == 0


def test_trainproof_sees_documents_that_come_twice(tmp_path):
    others = watch(make_trainer(tmp_path, max_steps=2), trainproof={"documents": ["one text", "another", "one text"]})
    assert kinds(others)["trainproof"]["TP-PRE-DUPLICATE-TEXT"] == 0


def test_a_resumed_run_is_judged_with_its_past(tmp_path):
    first = make_trainer(tmp_path, save_strategy="steps", save_steps=30, max_steps=30, lr_scheduler_type="constant")
    watch(first)
    second = make_trainer(tmp_path, lr_scheduler_type="constant")
    others = Others()
    others.watch(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert second.state.global_step == STEPS and others.errors == []
    assert kinds(others) == SILENT


def test_a_run_that_breaks(tmp_path):
    rows = learnable_rows()
    rows[0]["labels"] = rows[0]["labels"] + 1000  # the loss refuses it
    others, trainer = Others(), make_trainer(tmp_path, rows=rows)
    others.watch(trainer)
    with pytest.raises(IndexError):
        trainer.train()
    assert kinds(others)["trainproof"]["TP-OBJ-TARGET-OUT-OF-RANGE"] == 0


def test_a_tool_that_breaks_is_written_down_once(tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("cannot lint")

    monkeypatch.setattr("tests.zoo.others.on_logs.run_all_checks", broken)
    monkeypatch.setattr("torch_audit.validators.builtin.stability.isfinite_all", broken)
    others, trainer = Others(), make_trainer(tmp_path, max_steps=3)
    others.watch(trainer)
    trainer.train()
    found = kinds(others)
    assert others.errors == [
        {"tool": "torch-audit", "error": "RuntimeError: Validator TA100 crashed: cannot lint"},
        {"tool": "losslint", "error": "RuntimeError: cannot lint"},
    ]
    assert found["losslint"] == found["torch-audit"] == {} and trainer.state.global_step == 3


def judged_by_guards(path, others=None, guards_first=True):
    trainer, guards = make_trainer(path, max_steps=6, gradient_accumulation_steps=2), RegressionCallback()
    if guards_first:
        trainer.add_callback(guards)
    if others is not None:
        others.watch(trainer)
    if not guards_first:
        trainer.add_callback(guards)
    trainer.train()
    assert "training_step" not in vars(trainer)
    return guards.judged, guards.findings, [entry.get("loss") for entry in trainer.state.log_history]


@pytest.mark.parametrize("guards_first", [True, False])
def test_they_do_not_blind_our_guards(tmp_path, guards_first):
    others = Others()
    beside = judged_by_guards(tmp_path / "beside", others, guards_first)
    assert beside == judged_by_guards(tmp_path / "alone") and "missing_label_shift" in beside[0]
    assert others.errors == []


@pytest.mark.slow
def test_of_two_ranks_the_first_reports(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, __file__, str(tmp_path)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["watchdog"]["loss not finite"] == 13 and first["losslint"]["nan_inf"] == 13
    assert second == SILENT


def main(directory: str) -> None:
    path = Path(directory)
    poison = After(12, lambda model: model.get_parameter("model.norm.weight").data.fill_(math.nan))
    others = watch(make_trainer(path / "run", callbacks=[poison], max_steps=26))
    (path / f"{os.environ['RANK']}.json").write_text(json.dumps(kinds(others)))


if __name__ == "__main__":
    main(sys.argv[1])
