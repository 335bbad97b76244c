"""Muon on the device: is the iteration in the device's fast precision the CPU's in fp32, what does a step of the 180M
take beside AdamW's, and is a resumed run bit for bit the same."""

import math
import time
from pathlib import Path

import torch
from transformers import Trainer

from recipe.muon import Muon, fast_dtype, group_parameters, orthogonalize
from tests.gpu.correctness import resume
from tests.gpu.part import Report
from tests.gpu.scale import Scale, build_model, let_go, synchronize

COUNT, STEPS, WARM = 4, 10, 2
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1


def run(scale: Scale, report: Report, folder: Path) -> None:
    report.section("iteration", lambda: iteration(scale))
    report.section("torch's own", lambda: beside_torch(scale))
    report.section("step", lambda: step_times(scale))
    report.section("resume", lambda: resume(scale, folder / "muon", False, optim="muon"))


def matrices_of(scale: Scale) -> torch.Tensor:
    config = scale.model_config()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, config.hidden_size, config.intermediate_size, generator=generator)


def iteration(scale: Scale) -> dict:
    """How far the device's result lies from the CPU's in fp32, as a share of its norm; singular values, which five
    iterations bring to 0.7 to 1.2."""
    matrices = matrices_of(scale)
    expected, found = (
        orthogonalize(matrices, torch.float32),
        {"precision": str(fast_dtype(torch.device(scale.device)))},
    )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result = orthogonalize(matrices.to(scale.device), dtype).cpu()
        values = torch.linalg.svdvals(result)
        found[name] = {
            "off by": float((result - expected).norm() / expected.norm()),
            "singular values": [float(values.min()), float(values.max())],
        }
    return found


def beside_torch(scale: Scale) -> dict:
    """One step from the same weights and gradients, as a share of the largest change: torch iterates in bf16."""
    start, gradient = matrices_of(scale)[:2].to(scale.device)
    own, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own.grad = other.grad = gradient
    group = {"params": [own], "momentum": 0.95, "weight_decay": WEIGHT_DECAY}
    Muon([group], lr=LEARNING_RATE).step()
    keys = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([other], **keys).step()
    return {"off by": float((own - other).detach().abs().max() / (other - start).detach().abs().max())}


def step_times(scale: Scale) -> dict:
    """Milliseconds of an optimizer's step alone, the median of a few, over all parameters of the model."""
    model = build_model(scale)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    decayed = Trainer.get_decay_parameter_names(None, model)
    groups = group_parameters(model, decayed, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95), eps=1e-8)
    optimizers = {
        "Muon": Muon(groups, lr=LEARNING_RATE),
        "AdamW, fused": torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
    }
    found = {name: step_time(scale, optimizer) for name, optimizer in optimizers.items()}
    let_go(model)
    return found


def step_time(scale: Scale, optimizer: torch.optim.Optimizer) -> float:
    seconds = []
    for number in range(WARM + (2 if scale.is_tiny else STEPS)):
        synchronize(scale)
        start = time.perf_counter()
        optimizer.step()
        synchronize(scale)
        if number >= WARM:
            seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds)[math.floor(len(seconds) / 2)]
