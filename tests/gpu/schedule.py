"""The first 80 steps of llama_180m.json, as that config has them but for the source: its schedule, its precision, its
compilation, its guards. The loss curve is kept."""

import json
from pathlib import Path

import torch
from transformers import TrainerCallback

from recipe.model import why_not_compile
from tests.gpu.part import Report
from tests.gpu.scale import Scale, build_run

STEPS, TINY_STEPS = 80, 6
KEPT = ("step", "loss", "grad_norm", "learning_rate", "tokens_per_second")


class StopAfter(TrainerCallback):
    """Writes the curve as it grows, and ends the run."""

    def __init__(self, steps: int, put):
        self.steps, self.put = steps, put

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0 or state.global_step == self.steps:
            self.put()
        if state.global_step == self.steps:
            control.should_training_stop = True


def run(scale: Scale, report: Report, folder: Path) -> None:
    report.section("run", lambda: first_steps(scale, report, folder))


def first_steps(scale: Scale, report: Report, folder: Path) -> dict:
    is_compiled = why_not_compile() is None and not scale.is_tiny
    steps = TINY_STEPS if scale.is_tiny else STEPS
    # The schedule is that of 10,000 steps.
    run = build_run(scale, folder / "schedule", torch_compile=str(is_compiled).lower(), max_steps=10_000)
    path = Path(run.trainer.args.output_dir) / "steps.jsonl"

    def found() -> dict:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        curve = [{name: record[name] for name in KEPT} for record in map(json.loads, lines)]
        alarms = [(finding.id, finding.step) for finding in run.guards.findings if finding.severity != "info"]
        memory = torch.cuda.max_memory_allocated() / 2**30 if scale.is_cuda else None
        return {"curve": curve, "alarms": alarms, "guards' failure": run.guards.failure, "peak memory, GiB": memory}

    run.trainer.add_callback(StopAfter(steps, lambda: report.put("run", found())))
    run.trainer.train()
    return {**found(), "judged": sorted(run.guards.judged)}
