"""Is what the device computes right: losses beside those recorded on a CPU, bf16 beside fp32, a resumed run beside one
that was not interrupted.

    python -m tests.gpu.correctness

records the CPU's losses in reference.json.
"""

import json
import math
import platform
import shutil
from datetime import date
from pathlib import Path

import torch

from recipe.model import CAUSAL_SDPA, why_not_compile
from recipe.train import train
from tests.benchmarks.results import commit
from tests.gpu.environment import installed
from tests.gpu.part import Report
from tests.gpu.scale import Scale, autocast, batch_of, build_model, build_run, use_tf32

REFERENCE = Path(__file__).with_name("reference.json")
STEPS, LENGTH = 3, 256
LEARNING_RATE = 3e-4
LAYERS = 4  # of the resumed model, which has the 180M's width: its checkpoints are written and read in a second


def run(scale: Scale, report: Report, folder: Path) -> None:
    report.section("losses", lambda: compare_losses(scale))
    report.section("resume, eager", lambda: resume(scale, folder / "eager", False))
    report.section("resume, compiled", lambda: resume(scale, folder / "compiled", True), 0 if scale.is_tiny else 45)


# --- losses


def first_losses(scale: Scale, is_bf16: bool = False, attention: str = CAUSAL_SDPA) -> dict:
    """Loss of each of the first steps of 1 x 256 tokens, in a loop that is the same everywhere, and the sum of the
    initial weights, which tells other weights from another arithmetic."""
    model = build_model(scale, attention)
    weights = math.fsum(float(p.detach().double().sum()) for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        rows = batch_of(scale, 1, LENGTH, first=step * LENGTH)
        with autocast(scale, is_bf16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": weights}


def compare_losses(scale: Scale) -> dict:
    """Largest relative differences. `weights`: 0 where the model began with the same weights as the CPU's."""
    recorded = json.loads(REFERENCE.read_text(encoding="utf-8"))["tiny" if scale.is_tiny else "180M"]
    use_tf32(scale, False)
    exact, half = first_losses(scale), first_losses(scale, is_bf16=True)
    found = {"CPU, fp32": recorded["losses"], "fp32": exact["losses"], "bf16": half["losses"]}
    if scale.is_cuda:
        use_tf32(scale, True)
        found["TF32"] = first_losses(scale)["losses"]
    found["fp32 / CPU"] = gap(exact["losses"], recorded["losses"])
    found["bf16 / fp32"] = gap(half["losses"], exact["losses"])
    found["weights"] = abs(exact["weights"] - recorded["weights"])
    found["rounding on the CPU"] = recorded["rounding"]
    return found


def gap(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


def record() -> dict:
    """`rounding`: how far another order of the same sums, that of eager attention, moves the losses."""
    found = {"date": date.today().isoformat(), "commit": commit(), "cpu": torch.backends.cpu.get_cpu_capability()}
    names = ("torch", "transformers", "numpy")
    found |= {"versions": {name: installed(name) for name in names}, "python": platform.python_version()}
    for name, is_tiny in (("180M", False), ("tiny", True)):
        scale = Scale("cpu", is_tiny)
        losses = first_losses(scale)
        found[name] = {**losses, "rounding": gap(first_losses(scale, attention="eager")["losses"], losses["losses"])}
    REFERENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


# --- resuming


def resume(scale: Scale, folder: Path, is_compiled: bool, **others) -> dict:
    """The recipe, guards on, saved at half of its steps and resumed there; beside it the same run twice without a
    break, which tells what resuming changes from what changes anyway. `others`: keys of the config."""
    if is_compiled and (reason := why_not_compile()):
        return {"not run": reason}
    steps = 4 if scale.is_tiny else 6
    keys = {"max_steps": steps, "warmup_steps": 2, "save_strategy": "steps", "save_steps": steps // 2}
    keys |= {"torch_compile": str(is_compiled).lower(), "lr_scheduler_type": "linear", "lr_scheduler_kwargs": "{}"}
    keys |= others
    if not scale.is_tiny:
        keys |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    sizes = {} if scale.is_tiny else {"num_hidden_layers": LAYERS}
    whole = trained(scale, folder / "whole", sizes, keys)
    checkpoint = folder / "whole" / "run" / f"checkpoint-{steps // 2}"
    resumed = trained(scale, folder / "resumed", sizes, keys | {"resume_from_checkpoint": checkpoint})
    again = whole if scale.is_tiny and is_compiled else trained(scale, folder / "again", sizes, keys)
    shutil.rmtree(folder, ignore_errors=True)
    late = {**whole, "losses": whole["losses"][steps // 2 :]}
    return {"resumed": difference(resumed, late), "run again": difference(again, whole), "losses": whole["losses"]}


def trained(scale: Scale, folder: Path, sizes: dict, keys: dict) -> dict:
    run = build_run(scale, folder, sizes, **keys)
    train(run.trainer, run.guards, run.checkpoint)
    weights = {name: value.detach().cpu().clone() for name, value in run.trainer.model.state_dict().items()}
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    alarms = [finding.id for finding in run.guards.findings if finding.severity != "info"]
    first = 0 if run.checkpoint is None else int(run.checkpoint.name.rsplit("-", 1)[1])
    return {"losses": losses[first:], "weights": weights, "alarms": alarms, "failure": run.guards.failure}


def difference(run: dict, other: dict) -> dict:
    """Largest absolute differences of losses and of final weights; bit-equal where both are 0."""
    losses = max(abs(a - b) for a, b in zip(run["losses"], other["losses"], strict=True))
    weights = max(float((run["weights"][n].double() - w.double()).abs().max()) for n, w in other["weights"].items())
    found = {"is bit-equal": losses == 0 and weights == 0, "loss": losses, "weights": weights}
    return found | {"alarms": run["alarms"], "guards' failure": run["failure"]}


if __name__ == "__main__":
    print(json.dumps(record(), indent=1))
