"""What `recipe plan` says that a step takes, beside the peak of the allocator: the 180M, eager, without guards."""

import torch

from recipe.plan import make_plan
from recipe.train import assemble, open_run
from tests.benchmarks.measure_guards import drop_guards
from tests.gpu.part import Report
from tests.gpu.scale import Scale, parse_run

GB = 1e9
OPTIMIZERS = ("adamw_torch_fused", "muon")


def run(scale: Scale, report: Report, folder) -> None:
    for optim in OPTIMIZERS:
        report.section(optim, lambda optim=optim: planned_and_measured(scale, folder / optim, optim))


def planned_and_measured(scale: Scale, folder, optim: str) -> dict:
    """GB. `off by`: of the measured. On a CPU there is no such peak, and only the plan is made."""
    config = parse_run(scale, folder, max_steps=2, warmup_steps=1, optim=optim)
    found = {"planned, GB": make_plan(config)["step_memory"]["peak"] / GB}
    run = assemble(config, open_run(config))
    drop_guards(run)
    if scale.is_cuda:
        torch.cuda.empty_cache()
        weights = sum(weight.untyped_storage().nbytes() for weight in run.trainer.model.parameters())
        before = torch.cuda.memory_allocated() - weights * (next(run.trainer.model.parameters()).is_cuda)
        torch.cuda.reset_peak_memory_stats()
    run.trainer.train()
    if scale.is_cuda:
        found["measured, GB"] = (torch.cuda.max_memory_allocated() - before) / GB
        found["off by"] = found["planned, GB"] / found["measured, GB"] - 1
    return found
