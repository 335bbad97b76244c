"""Faults of the guards on one of two gloo ranks: the training goes on, unchanged, on both."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from recipe.guards import RegressionCallback
from recipe.guards.rank_divergence import RankDivergence
from recipe.guards.session import Session, survives
from recipe.guards.taps import PendingStep
from recipe.guards.targets import LossTarget

MODEL = dict(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def fault(*arguments, **kwargs):
    raise RuntimeError("a fault")


def unsendable(*arguments, **kwargs):
    return lambda: "a fault"


# Where it is raised, on rank 1 alone.
FAULTS = {
    "measuring": (RankDivergence, "measure"),
    "what cannot be sent": (RankDivergence, "measure"),
    "setting up": (RankDivergence, "setup"),
    "probing": (LossTarget, "probe"),
    "reading a step": (PendingStep, "read"),
    "sending a step": (Session, "_send"),
    "preparing": (Session, "_probe"),
    "taking an evaluation": (Session, "_take_evaluation"),
}


def train(folder: Path, guards: RegressionCallback | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 257, (104, 24), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**MODEL)), arguments, train_dataset=rows[8:], eval_dataset=rows[:8])
    if guards is not None:
        trainer.add_callback(guards)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def on_both_ranks(folder: Path) -> None:
    """What each fault does, written by rank 0."""
    rank, logged, results = int(os.environ["RANK"]), [], {}
    train(folder / "healthy", RegressionCallback())
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("recipe.guards").addHandler(handler)
    alone = train(folder / "alone")
    for name, (owner, method) in FAULTS.items():
        guards = RegressionCallback()
        logged.clear()
        # What `survives` guards is replaced inside of it, as a bug there would be.
        broken = unsendable if name == "what cannot be sent" else fault
        replaced = survives(broken) if hasattr(getattr(owner, method), "__wrapped__") else broken
        with mock.patch.object(owner, method, replaced if rank == 1 else getattr(owner, method)):
            watched = train(folder / name.replace(" ", "-"), guards)
        results[name] = {
            "is_equal": all(torch.equal(value, alone[key]) for key, value in watched.items()),
            "failure": guards.failure,
            "unjudged": {key: reason for key, reason in guards.cannot_judge.items() if "failed" in reason},
            "logged": list(logged),
            "judged": sorted(guards.judged),
        }
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "results.json").read_text()), "stderr": done.stderr}


def test_each_line_is_logged_once_on_two_ranks(results):
    lines = [line for line in results["stderr"].splitlines() if "recipe.guards | " in line]
    assert [line for line in lines if "recipe guards: " in line] == lines[:1]
    assert "verdict: " in lines[1] and "/healthy/_recipe/report.html" in "".join(lines[1:])  # a line or two
    assert sum("/healthy/_recipe/report.html" in line for line in lines) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_one_rank_does_not_change_the_training(results, name):
    assert results[name]["is_equal"]


@pytest.mark.parametrize("name", ["measuring", "what cannot be sent", "setting up"])
def test_a_guard_that_fails_on_one_rank_is_off_on_all_and_the_others_go_on(results, name):
    found = results[name]
    assert found["failure"] is None and set(found["unjudged"]) == {"rank_divergence"}
    words = "pickle" if name == "what cannot be sent" else "a fault"
    assert len(found["logged"]) == 1 and words in found["logged"][0] and "rank 1" in found["logged"][0]
    assert {"loss_not_finite", "learning_rate_off", "missing_label_shift"} <= set(found["judged"])


@pytest.mark.parametrize("name", ["reading a step", "sending a step", "preparing", "taking an evaluation"])
def test_what_fails_outside_of_a_guard_switches_all_off(results, name):
    assert "a fault" in results[name]["failure"]


if __name__ == "__main__":
    on_both_ranks(Path(sys.argv[1]))
