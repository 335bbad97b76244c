"""The shipped demo, on its own corpus and reference, with the original run's bug put in from outside."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import recipe
from recipe.__main__ import run
from recipe.guards.records import read_lines

DEMO = str(Path(recipe.__file__).parent / "configs" / "cpu_demo.json")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def unshifted(self, logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def test_without_the_label_shift_the_probe_speaks_before_step_1(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", unshifted)
    words = ["--output_dir", str(tmp_path), "--on_regression", "stop"]
    assert run(["train", DEMO, *words]) == 3
    first = read_lines(tmp_path / "findings.jsonl")[0]
    assert (first["id"], first["step"]) == ("missing_label_shift", 0)


@pytest.mark.parametrize(
    ("trajectory", "guard", "found"),
    [("auto", "loss_off_reference", "too good to be true"), ("none", "loss_below_envelope", "below n-grams")],
)
def test_with_the_probe_disabled_each_curve_guard_fires_by_itself(tmp_path, monkeypatch, trajectory, guard, found):
    """Within 120 steps, where the original run was at a loss of 1.8."""
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", unshifted)
    words = ["--disabled_guards", "missing_label_shift", "--on_regression", "stop", "--eval_strategy", "no"]
    assert run(["train", DEMO, "--output_dir", str(tmp_path), "--trajectory", trajectory, *words]) == 3
    findings = read_lines(tmp_path / "findings.jsonl")
    first = next(finding for finding in findings if finding["severity"] != "info")
    assert first["id"] == guard and first["step"] <= 120 and found in first["found"]
