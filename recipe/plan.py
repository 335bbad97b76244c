"""`plan`: what a run will need, before it starts: parameters, FLOPs, memory, disk, hours."""

import copy
import math
import os
import shutil
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from recipe.arguments import Config
from recipe.conflicts import num_ranks
from recipe.errors import UserError
from recipe.internals import has_fast_bf16_cpu
from recipe.loss import chunk_size
from recipe.memory import (
    GB,
    StepMemory,
    count_parameters,
    evaluation_memory,
    free_memory,
    meta_model,
    optimizer_bytes,
    show_count,
    step_memory,
    update_bytes,
)
from recipe.model import choose_attention, flops_per_token, read_model_config, reason_of, why_not_compile

# GPU memory in GB; dense matrix-product rates in TFLOP/s of bf16, or of fp16 where there is no bf16; from the vendor's
# data sheets.
GPUS = {
    "T4 16 GB": (16, 65, "fp16"),
    "RTX 4090 24 GB": (24, 165, "bf16"),
    "L4 24 GB": (24, 121, "bf16"),
    "A100 40 GB": (40, 312, "bf16"),
    "A100 80 GB": (80, 312, "bf16"),
    "H100 80 GB": (80, 989, "bf16"),
    "H200 141 GB": (141, 989, "bf16"),
    "B200 192 GB": (192, 2250, "bf16"),
}
GPU_MFU = 0.40  # assumed: no run of the recipe on a GPU has been measured yet
# Of the matrix-product rate in that precision, attention counted: two cores with AVX512-BF16 reached 0.49, 0.52 and
# 0.67 in fp32 with the demo, 13.8M and 180M, and 0.30, 0.39 and 0.48 in bf16; with AVX2 0.41 in fp32 with the demo
# (`python -m tests.benchmarks.throughput`, whose shares are by 6 N).
CPU_MFU = {"fp32": 0.5, "bf16": 0.4}
# Seconds of training on a CPU: twice what repays a minute at 0.9 of the time. FLOP/s of a core with units for bf16 in
# training: two cores with AVX512-BF16 reached 0.16 to 0.2 T (`python -m tests.benchmarks.throughput`).
COMPILING_PAYS_AFTER, CORE_RATE = 1200, 1e11
USABLE = 0.9  # of a GPU's memory: the rest is for the CUDA context and fragmentation
WIDTH = 110
TOKENS_PER_PARAMETER = 20  # compute-optimal, Chinchilla (arXiv 2203.15556)


@dataclass(frozen=True)
class Device:
    """`rows` x `accumulation`: the largest micro-batch that fits and has the run's global batch; None: none fits."""

    name: str
    memory: float  # bytes
    precision: str
    peak: int  # bytes, with the config's own micro-batch
    rows: int | None
    accumulation: int | None
    rate: float  # FLOP/s of matrix products
    mfu: float  # the share of it that training reaches


def _count_parts(model: PretrainedConfig, source: str) -> dict[str, int]:
    try:
        return count_parameters(model)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: no model can be made of it: {reason_of(error)}") from error


def make_plan(config: Config) -> dict:
    """JSON-able; sizes in bytes. Nothing is allocated, and no data is read."""
    training, block_size = config.training, config.data.block_size
    model = read_model_config(config.model.model_config, config.model.model_name_or_path)
    parts = _count_parts(model, config.model.model_config or config.model.model_name_or_path)
    count, tokens = sum(parts.values()), config.max_steps * config.tokens_per_step
    flops = flops_per_token(model, count, block_size)
    here = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    try:
        sizes = StepSizes(config, model, here, training.device.type)
        is_known = here != "fp32" and training.device.type == "cuda"  # in fp16 it is as large as in bf16
        on_gpu = sizes if is_known or not GPUS else StepSizes(config, model, "bf16", "cuda")
    except Exception as error:
        raise UserError(
            f"plan cannot tell what a {model.model_type} model needs: it does not run without its data "
            f"({type(error).__name__}); `train` may take it all the same"
        ) from error
    device = training.device
    own_mfu = mfu_of(device, here)
    name, rate = f"this {device.type}", matrix_rate(device, here)
    own = _device(name, free_memory(device), here, sizes, config, rate, own_mfu)
    gpus = [
        _device(name, USABLE * memory * GB, kind, on_gpu, config, tflops * 1e12, GPU_MFU)
        for name, (memory, tflops, kind) in GPUS.items()
    ]
    ranks = num_ranks()
    hours = {each.name: flops * tokens / (each.rate * each.mfu * ranks) / 3600 for each in (own, *gpus)}
    own_step = sizes.step(training.per_device_train_batch_size)
    checkpoint = 4 * count + optimizer_bytes(meta_model(model), sizes.optim)
    kept = training.save_total_limit or math.ceil(config.max_steps / max(1, training.save_steps))
    return {
        "parameters": {"total": count, **parts},
        "flops_per_token": flops,
        "tokens": tokens,
        "steps": config.max_steps,
        "tokens_per_step": config.tokens_per_step,
        "tokens_per_parameter": tokens / count,
        "step_memory": _parts(own_step, sizes.update, device.type),
        "evaluation_memory": sizes.evaluation,
        "ranks": ranks,
        "is_checkpointing_on_cpu": bool(training.activation_checkpointing) and device.type == "cpu",
        "is_emulated": here == "bf16" and device.type == "cpu" and not has_fast_bf16_cpu(),
        "devices": [{**asdict(each), "hours": hours[each.name]} for each in (own, *gpus)],
        "disk": {"checkpoint": checkpoint, "kept": kept, "needed": checkpoint * (kept + 1) + 4 * count},
        "disk_free": shutil.disk_usage(_existing(Path(training.output_dir))).free,
    }


def _parts(memory: StepMemory, update: int, device: str) -> dict:
    freed = memory.peak_on_cpu - memory.peak if device == "cpu" else 0.0
    peak = max(memory.peak + freed, memory.weights + memory.optimizer + memory.gradients + update)
    return {**asdict(memory), "gradients": memory.gradients, "update": update, "freed": freed, "peak": peak}


def tokens_per_second(model: PretrainedConfig, block_size: int, precision: str, device: torch.device) -> float:
    """Expected of the device, as in `make_plan`."""
    flops = flops_per_token(model, sum(count_parameters(model).values()), block_size)
    return matrix_rate(device, precision) * mfu_of(device, precision) / flops


def mfu_of(device: torch.device, precision: str) -> float:
    """The share of the rate of matrix products that training is expected to reach."""
    return CPU_MFU.get(precision, CPU_MFU["fp32"]) if device.type == "cpu" else GPU_MFU


def compiling_pays_on_cpu(config: Config, model: PretrainedConfig) -> bool:
    """Whether a compiled bf16 run of this length ends sooner on a CPU: it takes about a tenth less for each token,
    once half a minute has been spent on compiling for training and as much for evaluation. By counting alone: a
    resumed run, and each rank, must decide alike."""
    flops = flops_per_token(model, sum(count_parameters(model).values()), config.data.block_size)
    seconds = flops * config.max_steps * config.tokens_per_step / (os.cpu_count() * CORE_RATE)
    return seconds > COMPILING_PAYS_AFTER and why_not_compile() is None


class StepSizes:
    """Memory of one step in one precision, on a type of device, for any number of rows.

    It grows in proportion to rows and, where all layers are alike, to layers. So it is measured for two numbers of
    each, which takes a second, and extrapolated.
    """

    def __init__(self, config: Config, model: PretrainedConfig, precision: str, device: str):
        training = config.training
        self.optim = str(getattr(training.optim, "value", training.optim))
        self._shared = {
            "block_size": config.data.block_size,
            "precision": precision,
            "attention": choose_attention(config.model.attn_implementation, False),
        }
        self._step = {
            "optim": self.optim,
            "is_accumulating": training.gradient_accumulation_steps > 1,
            "is_checkpointing": bool(training.activation_checkpointing),
            "chunk": chunk_size(device),
        }
        # From the rows on that fill a chunk of the loss: more of them need no more logits
        self._first = math.ceil(chunk_size(device) / config.data.block_size)
        self._one, self._two = (self._measure(model, self._first + more) for more in (0, 1))
        self.update = update_bytes(meta_model(model), self.optim)
        rows = training.per_device_eval_batch_size
        depths = [each for each in (with_layers(model, 1), with_layers(model, 2)) if each is not None] or [model]
        one, *more = (evaluation_memory(each, rows=rows, **self._shared) for each in depths)
        # autocast keeps copies of the weights of each layer
        self.evaluation = one + sum((model.num_hidden_layers - 1) * (two - one) for two in more)

    def _measure(self, model: PretrainedConfig, rows: int) -> StepMemory:
        shallow = [with_layers(model, layers) for layers in (1, 2)]
        if None in shallow:
            return step_memory(model, rows=rows, **self._shared, **self._step)
        return extrapolate(
            *(step_memory(each, rows=rows, **self._shared, **self._step) for each in shallow), model.num_hidden_layers
        )

    def step(self, rows: int) -> StepMemory:
        return extrapolate(self._one, self._two, rows - self._first + 1)

    def peak(self, rows: int, is_cpu: bool) -> float:
        at = self.step(rows)
        between = at.weights + at.optimizer + max(self.evaluation, at.gradients + self.update)
        return max(at.peak_on_cpu if is_cpu else at.peak, between)


def with_layers(model: PretrainedConfig, layers: int) -> PretrainedConfig | None:
    """The same model with that many layers; None where they may differ."""
    if model.model_type != "llama":
        return None
    fewer = copy.deepcopy(model)
    fewer.num_hidden_layers = layers
    return fewer


def extrapolate(one: StepMemory, two: StepMemory, count: int) -> StepMemory:
    """From the memory at 1 and at 2 to that at `count`, on a line."""
    first, second = asdict(one), asdict(two)
    return StepMemory(**{name: first[name] + (count - 1) * (second[name] - first[name]) for name in first})


def _device(
    name: str, memory: float, precision: str, sizes: StepSizes, config: Config, rate: float, mfu: float
) -> Device:
    training, is_cpu = config.training, name == "this cpu"
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    fitting = [each for each in range(1, rows + 1) if rows % each == 0 and sizes.peak(each, is_cpu) <= memory]
    best = max(fitting, default=None)
    peak = sizes.peak(training.per_device_train_batch_size, is_cpu)
    accumulation = rows // best if best else None
    return Device(name, memory, precision, peak, best, accumulation, rate, mfu)


def matrix_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of this device's matrix products, the fastest of a few; of small ones alone where a large one takes
    longer than half a second, as in a precision that is emulated."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    best = 0.0
    for size in (256, 256, 1024, 1024, 1024, 1024, 1024):
        if best and 2 * size**3 / best > 0.5:
            break
        left = torch.ones(size, size, dtype=dtype, device=device)
        start = time.perf_counter()
        (left @ left)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def format_plan(plan: dict) -> str:
    parameters, memory, disk = dict(plan["parameters"]), plan["step_memory"], plan["disk"]
    total = parameters.pop("total")
    names = ("weights", "gradients", "optimizer", "activations", "logits", "freed")
    values = {
        "parameters": f"{total:,} ({', '.join(f'{name} {show_count(n)}' for name, n in parameters.items())})",
        "FLOPs per token": show_count(plan["flops_per_token"]),
        "tokens": f"{plan['tokens']:,} in {plan['steps']:,} steps of {plan['tokens_per_step']:,}; "
        f"{plan['tokens_per_parameter']:.3g} per parameter (compute-optimal: about {TOKENS_PER_PARAMETER})",
        "step memory": ", ".join(f"{name} {_size(memory[name])}" for name in names if memory[name]),
        "evaluation": f"{_size(plan['evaluation_memory'])} beside weights and optimizer"
        + (f"; Muon's step: {_size(memory['update'])} beside these and gradients" if memory["update"] else ""),
        "disk": f"{_size(disk['needed'])}: {disk['kept'] + 1} checkpoints of {_size(disk['checkpoint'])} at most, and "
        f"final/; {'only ' * (disk['needed'] > plan['disk_free'])}{_size(plan['disk_free'])} are free",
    }
    lines = [f"{name:<16}{value}" for name, value in values.items()]
    lines += ["", f"{'device':<16}{'precision':>10}{'usable':>10}{'peak':>10}{'rows x accumulation':>21}{'hours':>9}"]
    lines += [_device_line(device) for device in plan["devices"]]
    own, gpu = plan["devices"][0], plan["devices"][1]
    if own["peak"] > own["memory"]:
        lines += ["", *textwrap.wrap(_too_much(own), WIDTH)]
    if plan["is_emulated"]:
        lines += ["", "This CPU has no units for bf16 and emulates it: --bf16 false trains faster."]
    if plan["is_checkpointing_on_cpu"]:
        lines += ["", "With activation_checkpointing malloc keeps more: runs took 1.3 to 2 times this CPU's peak."]
    devices = "one device" if plan["ranks"] == 1 else f"{plan['ranks']} devices, one a rank"
    note = (
        "Freed: what malloc keeps of freed blocks, on a CPU. Peak: with the config's micro-batch, eager, beside what "
        "the process holds anyway. rows x accumulation: the largest micro-batch that fits, for the same global batch. "
        f"Hours: of {devices}, without evaluation; at {own['mfu']:.0%} of the {own['rate'] / 1e9:,.0f} GFLOP/s that "
        f"matrix products reach here now; GPUs at {gpu['mfu']:.0%} of their data sheets' rate (assumed, not measured)."
    )
    return "\n".join([*lines, "", *textwrap.wrap(note, WIDTH)])


def _too_much(own: dict) -> str:
    fix = "no micro-batch fits"
    if own["rows"]:
        fix = f"per_device_train_batch_size {own['rows']}, gradient_accumulation_steps {own['accumulation']} would do"
    needed, usable = _size(own["peak"]), _size(own["memory"])
    return f"The config's micro-batch needs {needed} on {own['name']}, and {usable} are usable: {fix}."


def _device_line(device: dict) -> str:
    fit = f"{device['rows']} x {device['accumulation']}" if device["rows"] else "does not fit"
    sizes = f"{_size(device['memory']):>10}{_size(device['peak']):>10}"
    hours = _hours(device["hours"]) if device["rows"] else "-"
    return f"{device['name']:<16}{device['precision']:>10}{sizes}{fit:>21}{hours:>9}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 0.1 else "< 0.1"


def _size(num_bytes: float) -> str:
    if num_bytes >= 1000 * GB:
        return f"{num_bytes / GB / 1000:.3g} TB"
    return f"{num_bytes / GB:.3g} GB" if num_bytes >= GB else f"{num_bytes / 1e6:.3g} MB"
