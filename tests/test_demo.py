"""The shipped demo, on its own corpus and reference, with the original run's bug put in from outside."""

from pathlib import Path

import pytest
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.trainer_callback import DefaultFlowCallback

import recipe
from recipe.__main__ import run
from recipe.guards.records import read_lines

DEMO = str(Path(recipe.__file__).parent / "configs" / "cpu_demo.json")


def unshifted(self, logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def test_without_the_label_shift_the_probe_speaks_before_step_1(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", unshifted)
    words = ["--output_dir", str(tmp_path), "--on_regression", "stop"]
    assert run(["train", DEMO, *words]) == 3
    first = read_lines(tmp_path / "findings.jsonl")[0]
    assert (first["id"], first["step"]) == ("missing_label_shift", 0)


@pytest.mark.slow  # three minutes
def test_with_the_probes_disabled_each_curve_guard_fires_by_itself(tmp_path, monkeypatch):
    """Within 120 steps, where the original run was at a loss of 1.8. Neither reads what the other found, so that one
    run shows both: it goes on after the first, and ends with the second."""
    expected = {"loss_off_reference": "too good to be true", "loss_below_envelope": "below n-grams"}
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", unshifted)
    on_step_end = DefaultFlowCallback.on_step_end

    def alarms() -> dict[str, dict]:
        return {each["id"]: each for each in read_lines(tmp_path / "findings.jsonl") if each["severity"] != "info"}

    def end_when_both_have_spoken(self, args, state, control, **kwargs):
        control = on_step_end(self, args, state, control, **kwargs)
        control.should_training_stop |= state.global_step >= 121 or expected.keys() <= alarms().keys()
        return control

    monkeypatch.setattr(DefaultFlowCallback, "on_step_end", end_when_both_have_spoken)
    words = ["--disabled_guards", "missing_label_shift,reference_mismatch", "--eval_strategy", "no"]
    run(["train", DEMO, "--output_dir", str(tmp_path), *words])
    found = alarms()
    assert list(found)[:2] in (list(expected), list(expected)[::-1])
    for guard, words in expected.items():
        assert found[guard]["step"] <= 120 and words in found[guard]["found"]
