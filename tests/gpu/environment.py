"""What is there: device, versions, TF32 and bf16 rates, attention kernels, torch.compile, Liger."""

import copy
import importlib.util
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from recipe.model import CAUSAL_SDPA, why_not_compile
from tests.gpu.part import Report
from tests.gpu.scale import Scale, autocast, batch_of, build_model, build_run, synchronize, use_tf32

PACKAGES = ("transformers", "accelerate", "datasets", "tokenizers", "safetensors", "numpy", "pyarrow", "triton")
ATTENTION_OPS = ("scaled_dot_product", "flash_attention", "efficient_attention", "_safe_softmax")
# Attention, whether it is compiled, and whether positions restart.
RECIPE = {
    "packed rows": (CAUSAL_SDPA, False, False),
    "packed rows, compiled": (CAUSAL_SDPA, True, False),
    "documents kept apart": ("sdpa", False, True),
}
# It makes a mask where the recipe's attention makes none.
TRANSFORMERS_OWN = {"packed rows, compiled, transformers' sdpa": ("sdpa", True, False)}
ATTENTION_KERNELS = ("flash", "fmha", "attention", "sdpa")


def run(scale: Scale, report: Report, folder: Path) -> None:
    report.section("device", lambda: describe_device(scale))
    report.section("precision of the recipe", lambda: recipe_precision(scale, folder))  # of a process as it begins
    report.section("matrix rates", lambda: matrix_rates(scale))
    report.section("attention", lambda: attention_kernels(scale))
    report.section("torch.compile", lambda: try_compile(scale))
    report.section("Liger", lambda: try_liger(scale))
    report.section("attention of transformers", lambda: attention_kernels(scale, TRANSFORMERS_OWN))


def describe_device(scale: Scale) -> dict:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in PACKAGES}
    if not scale.is_cuda:
        return {"name": f"CPU, {torch.get_num_threads()} threads", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory, GiB": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver(),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        **found,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return None


# --- matrix products


def matrix_rates(scale: Scale) -> dict:
    """TFLOP/s of square products. That TF32 is faster than IEEE shows that the setting is in force."""
    found = {"bf16": matrix_rate(scale, torch.bfloat16)}
    for name, is_on in (("fp32, IEEE", False), ("fp32, TF32", True)):
        use_tf32(scale, is_on)
        found[name] = matrix_rate(scale, torch.float32)
    return found


def matrix_rate(scale: Scale, dtype: torch.dtype) -> float:
    """The median of ten products after three, in 1e12 FLOPs a second."""
    size = 256 if scale.is_tiny else 8192
    generator = torch.Generator(device=scale.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=scale.device, dtype=dtype) for _ in range(2))
    seconds = [timed(scale, lambda: a @ b) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def timed(scale: Scale, function: Callable) -> float:
    synchronize(scale)
    started = time.perf_counter()
    function()
    synchronize(scale)
    return time.perf_counter() - started


# --- attention


def attention_kernels(scale: Scale, calls: dict = RECIPE) -> dict:
    """What calls of two layers ran."""
    rows = batch_of(scale, 2, scale.block_size)
    place = torch.arange(scale.block_size, device=scale.device).expand_as(rows)
    apart = {"position_ids": place % (scale.block_size // 2)}
    found = {}
    for name, (attention, is_compiled, is_apart) in calls.items():
        if is_compiled and why_not_compile():
            continue
        torch._dynamo.reset()
        model = build_model(scale, attention, num_hidden_layers=1 if scale.is_tiny else 2)
        called = torch.compile(model, backend=scale.compile_backend) if is_compiled else model
        found[name] = profiled(scale, called, {"input_ids": rows, "labels": rows, **(apart if is_apart else {})})
    torch._dynamo.reset()
    return found


def profiled(scale: Scale, model, inputs: dict) -> dict:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scale.is_cuda else [])]
    with autocast(scale, scale.is_cuda):
        model(**inputs).loss.backward()
        with profile(activities=activities, record_shapes=True) as profiler:
            model(**inputs).loss.backward()
            synchronize(scale)
    events = [event for event in profiler.events() if event.name.startswith("aten::_")]
    events = [event for event in events if any(word in event.name for word in ATTENTION_OPS)]
    kernels = {event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    return {
        "operators": sorted({event.name for event in events}),
        # The mask, and each bias, is the only argument of four dimensions after queries, keys and values.
        "with mask": any(len(shape) == 4 for event in events for shape in forward_shapes(event)[3:]),
        "kernels": sorted(n[:120] for n in kernels if any(word in n.lower() for word in ATTENTION_KERNELS)),
    }


def forward_shapes(event) -> list:
    return [] if "backward" in event.name else list(event.input_shapes)


def recipe_precision(scale: Scale, folder: Path) -> dict:
    """What is in force once the recipe has assembled a run."""
    run = build_run(scale, folder / "precision", max_steps=1)
    training = run.trainer.args
    found = {"bf16": training.bf16, "tf32": training.tf32, "optimizer": training.optim.value}
    found["attention"] = run.trainer.model.config._attn_implementation
    found["fp32 matrix products"] = torch.backends.cuda.matmul.fp32_precision
    # Raises where the two settings of torch disagree; torch.compile of torch 2.9 and 2.10 reads the older one.
    found["allow_tf32"] = torch.backends.cuda.matmul.allow_tf32
    found["pinned loader"] = training.dataloader_pin_memory
    return found


# --- compilation


def try_compile(scale: Scale, steps: int = 6) -> dict:
    """Two layers of the model, compiled: seconds to the first step, and graphs that are compiled after step 3."""
    if reason := why_not_compile():
        return {"not run": reason}
    eager = build_model(scale, num_hidden_layers=1 if scale.is_tiny else 2)  # as above: compiled from the cache
    model = torch.compile(copy.deepcopy(eager), backend=scale.compile_backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rows, counted, losses = batch_of(scale, 2, scale.block_size), [], []
    counters.clear()
    started = time.perf_counter()
    for step in range(steps):
        with autocast(scale, scale.is_cuda):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        counted.append(counters["stats"]["unique_graphs"])
        if step == 0:
            first = time.perf_counter() - started
    with autocast(scale, scale.is_cuda), torch.no_grad():
        of_eager = float(eager(input_ids=rows, labels=rows).loss)
    return {
        "backend": scale.compile_backend,
        "first step, s": first,
        "graphs": counted[-1],
        "graphs after step 3": counted[-1] - counted[2],
        "graph breaks": sum(counters["graph_break"].values()),
        "loss, compiled": losses[0],
        "loss, eager": of_eager,
    }


def try_liger(scale: Scale) -> dict:
    """Its kernels against the model's own, on the loss of one batch."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {"not run": "liger-kernel is not installed"}
    if not scale.is_cuda:
        return {"not run": "its kernels need a GPU"}
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model, rows = build_model(scale, num_hidden_layers=4), batch_of(scale, 2, scale.block_size)
    losses = {}
    for name in ("loss, own", "loss, Liger"):
        with autocast(scale):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        losses[name] = float(loss.detach())
        if name == "loss, own":
            _apply_liger_kernel_to_instance(model=model)
    return {"version": installed("liger-kernel"), **losses}
