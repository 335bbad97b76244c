"""The memory of one optimizer step, by part, found without allocating it: the model runs on fake tensors.

    step = step_memory(config, rows=8, block_size=256, precision="fp32")
    step.peak  # bytes

The operators are those of the CPU in eager mode. A compiled model needs less; flash attention on a GPU saves what
SDPA's flash kernel on the CPU saves.
"""

import contextlib
import logging
import os
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from recipe.errors import UserError
from recipe.loss import with_chunked_loss
from recipe.muon import AT_ONCE, is_hidden_matrix, outer_parameters

# Bytes per parameter of optimizer state, by the first part of `optim`'s name. Others are taken for AdamW in fp32.
STATE_BYTES = {"adamw": 8, "adagrad": 4, "sgd": 0, "rmsprop": 4, "adafactor": 0, "lion": 4}
MUON_BYTES = 4  # of hidden matrices; all else has AdamW's
STATE_BYTES_8_BIT = 2
# On a CPU: what glibc's malloc keeps of freed blocks, as a share of what forward and backward pass allocate. Measured
# 0.13 to 0.41 on three models in fp32 and bf16 (`python -m tests.benchmarks limits --only plan`); with
# MALLOC_MMAP_THRESHOLD_=131072, where it keeps nothing, the peak was that of the tensors to 4 %.
KEPT_BY_MALLOC = 0.3
GB = 1e9


@dataclass(frozen=True)
class StepMemory:
    """Bytes. The parts do not all reach their largest value at the same time: `peak` is below their sum."""

    weights: float
    optimizer: float
    activations: float  # what the backward pass needs, without the logits
    logits: float  # and all tensors of their size, at their largest
    working: float  # peak of all that forward and backward pass allocate, gradients among it

    @property
    def gradients(self) -> float:
        return self.weights  # fp32 as they are

    @property
    def peak(self) -> float:
        """Of the tensors."""
        return self.weights + self.optimizer + max(self.working, self.gradients)

    @property
    def peak_on_cpu(self) -> float:
        return self.peak + KEPT_BY_MALLOC * self.working


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live: all, and those of tensors with `vocab_size` columns."""

    def __init__(self, parameters, vocab_size: int):
        super().__init__()
        self.now = self.peak = self.logits = self.most_logits = 0
        self._vocab_size = vocab_size
        self._known = weakref.WeakSet(parameter.untyped_storage() for parameter in parameters)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._known:
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage, is_logits = tensor.untyped_storage(), tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
        self._known.add(storage)
        self._change(storage.nbytes(), is_logits)
        weakref.finalize(storage, self._change, -storage.nbytes(), is_logits)

    def _change(self, num_bytes: int, is_logits: bool) -> None:
        self.now += num_bytes
        self.logits += num_bytes * is_logits
        self.peak, self.most_logits = max(self.peak, self.now), max(self.most_logits, self.logits)


def step_memory(
    config: PretrainedConfig,
    *,
    rows: int,
    block_size: int,
    precision: str = "fp32",
    optim: str = "adamw_torch",
    is_accumulating: bool = False,
    is_checkpointing: bool = False,
    attention: str = "sdpa",
    chunk: int | None = None,
) -> StepMemory:
    """`precision`: fp32, or that of the autocast, bf16 or fp16. `is_accumulating`: gradients stay through a forward
    pass. `is_checkpointing`: activations are computed again in the backward pass. `chunk`: positions of one in the
    loss, None: as on a CPU."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what it raises
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = with_chunked_loss(_empty_model(config, attn_implementation=attention, dtype=torch.float32), chunk)
        weights = list(model.parameters())
        num_bytes = sum(weight.untyped_storage().nbytes() for weight in weights)
        if is_checkpointing:
            model.activation_checkpointing_enable()
        live = _LiveBytes(weights, config.get_text_config().vocab_size)
        with live:
            for weight in weights if is_accumulating else ():
                weight.grad = torch.zeros_like(weight)  # of the micro-batch before
            loss = _loss_of(model.train(), rows, block_size, precision)
            kept = live.now - live.logits
            loss.backward()
    activations = kept - num_bytes * is_accumulating
    return StepMemory(num_bytes, optimizer_bytes(model, optim), activations, live.most_logits, live.peak)


def evaluation_memory(config: PretrainedConfig, *, rows: int, block_size: int, precision: str, attention: str) -> int:
    """Bytes at the peak of an evaluation's forward pass, without weights."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _empty_model(config, attn_implementation=attention, dtype=torch.float32)
        live = _LiveBytes(model.parameters(), config.get_text_config().vocab_size)
        with live, torch.no_grad():
            _loss_of(model.eval(), rows, block_size, precision)
    return live.peak


def _empty_model(config: PretrainedConfig, **settings):
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)


def _loss_of(model, rows: int, block_size: int, precision: str) -> torch.Tensor:
    ids = torch.zeros(rows, block_size, dtype=torch.long)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def optimizer_bytes(model: torch.nn.Module, optim: str) -> int:
    """Of the optimizer's state."""
    each = STATE_BYTES_8_BIT if "8bit" in optim else STATE_BYTES.get(optim.split("_")[0], 8)
    sizes, outer = {False: each, True: MUON_BYTES if optim == "muon" else each}, outer_parameters(model)
    return sum(p.numel() * sizes[is_hidden_matrix(p, outer)] for p in model.parameters())


def update_bytes(model: torch.nn.Module, optim: str) -> int:
    """What the step of Muon makes and frees: copies of the matrices that it iterates at once. Counted: 4.2 to 6 of
    them, the most of square ones, whose Gram matrices are as large. Other optimizers: little."""
    if optim != "muon":
        return 0
    outer = outer_parameters(model)
    counts = Counter(tuple(sorted(p.shape)) for p in model.parameters() if is_hidden_matrix(p, outer))
    of_each = [(4 + 2 * m / n) * 4 * m * n * min(count, AT_ONCE) for (m, n), count in counts.items()]
    return int(max(of_each, default=0))


def meta_model(config: PretrainedConfig):
    """Parameters without memory."""
    with torch.device("meta"):
        return _empty_model(config)


def count_parameters(config: PretrainedConfig) -> dict[str, int]:
    """By part. A tied head is counted with the embedding."""
    model = meta_model(config)
    parts = {"embedding": 0, "attention": 0, "MLP": 0, "norms and others": 0, "head": 0}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    for name, weight in model.named_parameters():
        if weight is embedding:
            part = "embedding"
        elif head is not None and weight is head.weight:
            part = "head"
        elif "norm" in name or "ln_" in name:
            part = "norms and others"
        else:
            part = (
                "attention"
                if "attn" in name or "attention" in name
                else "MLP"
                if "mlp" in name
                else "norms and others"
            )
        parts[part] += weight.numel()
    return {part: count for part, count in parts.items() if count}


def free_memory(device: torch.device) -> int:
    """Bytes that one process of this machine may still use."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration):  # Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_fits(config: PretrainedConfig, optim: str, device: torch.device) -> None:
    """Raise `UserError` for a model whose weights, gradients and optimizer states alone do not fit into memory."""
    model = meta_model(config)
    count = model.num_parameters()
    needed, free = 8 * count + optimizer_bytes(model, optim), free_memory(device)
    if needed > free:
        raise UserError(
            f"{show_count(count)} parameters need {needed / GB:,.0f} GB for weights, gradients and optimizer states "
            f"in fp32; {free / GB:,.0f} GB are free on this {device.type}; take a smaller model"
        )


def show_count(count: float) -> str:
    """1234567 -> 1.2M"""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
