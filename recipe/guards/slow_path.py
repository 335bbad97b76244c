"""Fast paths that are thought to be on and are not: half precision, TF32, fused attention, one compiled graph."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from recipe.guards.guard import PROBE, Finding, Guard, Verdict
from recipe.guards.run import LOW_PRECISION
from recipe.internals import count_graph_breaks, count_graphs


class SlowPath(Guard):
    """A fast path that is asked for is slower than the plain one, or is not taken.

    When: before step 1; for compiled models from step 10 on.
    Measured: before step 1 the model's largest matrix product on this device, in the precision that training uses and
        in fp32 (on a CPU by one thread's processor time, so that other programs do not matter); in fp32 on a CUDA
        device with and without TF32; from the dispatcher, which kernel `scaled_dot_product_attention` really ran, and
        where it was not a fused one, the time of both. A ratio of 2 is reported. From step 10 on, whether the compiled
        model is still being compiled again, and whether its graph has breaks (information).
    Try: `bf16: false` on a processor without AVX512-BF16 or AMX; `tf32: true`; no attention dropout and no mask that
        needs the plain kernel; fixed shapes for a compiled model.
    Cannot see: models with less than a million weights in linear layers besides the head, which are not bound by
        matrix products; slow data loading; kernels outside of PyTorch's own attention.
    """

    ids = {"slow_path": "A fast path that is asked for is slower than the plain one, or is not taken."}
    # Times slower than the other path. Chosen: what is measured by processor time repeats within 20 %, a path that is
    # meant to be fast is 2 to 8 times faster, and one that is emulated 30 to 100 times slower.
    RATIO = 2.0
    # In linear layers but the head: smaller models spend their time elsewhere. Chosen, not measured.
    MIN_WEIGHTS = 1_000_000
    # Compiling is over by then. Chosen, not measured: shapes that recur are known after a few steps.
    COMPILED_BY = 10
    # Compilations after that step, before it is reported: one may be a last short batch. Chosen, not measured.
    MIN_RECOMPILED = 2

    def setup(self, run) -> None:
        self.is_compiled, self.graphs = run.is_compiled, None  # graphs: of this process, not saved

    def probe(self, batch) -> Iterator[Verdict]:
        if not batch.is_first:
            return
        weights = linear_weights(batch.model)
        if sum(map(torch.Tensor.numel, weights)) < self.MIN_WEIGHTS:
            yield self.clear(check=PROBE)
            return
        largest = max(weights, key=torch.Tensor.numel)
        found = [self._judge_precision(batch.run, largest), self._judge_attention(batch)]
        findings = [finding for finding in found if finding is not None]
        yield from findings or [self.clear(check=PROBE)]

    def _judge_precision(self, run, weight: torch.Tensor) -> Finding | None:
        if run.dtype in LOW_PRECISION:
            return self.judge_precision(run.dtype, *compare_products(weight, run.dtype))
        if weight.is_cuda and torch.cuda.get_device_capability(weight.device) >= (8, 0):
            seconds = [time_product(weight, 4096, tf32) for tf32 in (False, True)]
            in_force = torch.backends.cuda.matmul.fp32_precision == "tf32"
            return None if in_force else self.judge_tf32(*seconds, is_asked_for=bool(run.args.tf32))
        return None

    def _judge_attention(self, batch) -> Finding | None:
        with torch.no_grad(), CalledAttention() as called, RanAttention() as ran:
            batch.loss_of(batch.short_inputs)()
        if not called.shapes or ran.kernels:
            return None
        device = batch.run.args.device
        has_choice = device.type == "cuda" or not called.dropout
        return self.judge_attention(*time_attention(called.shapes[0], batch.run.dtype, device), has_choice)

    def measure(self, local) -> tuple[int, int] | None:
        """Graphs compiled since the first call that counts, and breaks in them."""
        if not self.is_compiled or local.step + 1 < self.COMPILED_BY:
            return None
        graphs = count_graphs()
        self.graphs = graphs if self.graphs is None else self.graphs
        return graphs - self.graphs, count_graph_breaks()

    def observe(self, step) -> Iterator[Verdict]:
        if (counts := step.payload(self)) is not None:
            yield self.judge_compiled(*counts) or self.clear()

    @classmethod
    def judge_precision(cls, dtype: torch.dtype, seconds: float, seconds_fp32: float) -> Finding | None:
        """Seconds of one product in `dtype` and in fp32."""
        ratio, name = seconds / seconds_fp32, str(dtype).removeprefix("torch.")
        if ratio < cls.RATIO:
            return None
        return cls.finding(
            "warning",
            found=f"matrix products in {name} take {ratio:.1f} times as long (as in fp32)",
            expected="less time (than in fp32)",
            causes=(f"{name} is emulated (the device has no units for it)", "a library without kernels for them"),
            action=f"train in fp32 on this device: {'bf16' if dtype == torch.bfloat16 else 'fp16'} false",
            evidence={"ratio": ratio, "seconds": seconds, "seconds_fp32": seconds_fp32},
            check=PROBE,
        )

    @classmethod
    def judge_tf32(cls, seconds: float, seconds_tf32: float, is_asked_for: bool) -> Finding | None:
        """Seconds of one fp32 product without and with TF32, where TF32 is not in force."""
        ratio = seconds / seconds_tf32
        if ratio < cls.RATIO:
            return None
        return cls.finding(
            "warning" if is_asked_for else "info",
            found=f"TF32 is off; fp32 products take {ratio:.1f} times as long as with it",
            expected="on, as tf32 asks" if is_asked_for else "on, unless full fp32 is wanted",
            causes=("tf32 is not set in the training arguments", "it was switched off after they were read"),
            action="tf32 true, or bf16 true",
            evidence={"ratio": ratio, "seconds": seconds, "seconds_tf32": seconds_tf32},
            check=PROBE,
        )

    @classmethod
    def judge_attention(cls, seconds: float, seconds_fused: float, has_choice: bool = True) -> Finding | None:
        """Seconds of one attention call by the plain kernel, which ran, and by a fused one. `has_choice`: this device
        has a fused kernel for such calls; a CPU has none with dropout."""
        ratio = seconds / seconds_fused
        if ratio < cls.RATIO:
            return None
        return cls.finding(
            "warning" if has_choice else "info",
            found=f"attention ran the plain kernel ({ratio:.1f} times slower than a fused one)",
            expected="a fused kernel",
            causes=("attention dropout (for which a CPU has no fused kernel)",)
            if not has_choice
            else ("sdpa_kernel(MATH) around the training", "a mask or dtype that no fused kernel takes"),
            action="with sdpa_kernel(...) only around what needs it; attention_dropout 0",
            evidence={"ratio": ratio, "seconds": seconds, "seconds_fused": seconds_fused},
            check=PROBE,
        )

    @classmethod
    def judge_compiled(cls, recompiled: int, breaks: int) -> Finding | None:
        """Graphs compiled since step COMPILED_BY, and breaks in all graphs."""
        if recompiled < cls.MIN_RECOMPILED and not breaks:
            return None
        is_again = recompiled >= cls.MIN_RECOMPILED
        again = f"{recompiled} graphs were compiled since step {cls.COMPILED_BY}"
        return cls.finding(
            "warning" if is_again else "info",
            found=again if is_again else f"the compiled model has {breaks} graph breaks",
            expected="none" if is_again else "one graph",
            causes=("shapes of the batches change", "a flag or number that the model reads changes")
            if is_again
            else ("code that cannot be traced",),
            action="run with TORCH_LOGS=recompiles,graph_breaks, which names the line",
            evidence={"recompiled": recompiled, "graph_breaks": breaks},
        )


# --- matrix products


def linear_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of the linear layers but the head, which is as large as the vocabulary."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each is not head]
    return [each.weight for each in layers if not each.weight.is_meta]


def compare_products(weight: torch.Tensor, dtype: torch.dtype, budget: float = 0.15) -> tuple[float, float]:
    """Seconds of a product in `dtype` and in fp32, with as many rows as `budget` seconds allow, up to 1,024 on a CPU
    and 16,384 on a GPU: with fewer rows the start of the kernel would be timed."""
    rows, most, seconds = 16, 16384 if weight.is_cuda else 1024, (0.0, 1.0)
    while rows == 16 or (rows <= most and 8 * sum(seconds) < budget):
        seconds = time_product(weight.to(dtype), rows), time_product(weight.float(), rows)
        rows *= 4
    return seconds


def time_product(weight: torch.Tensor, rows: int, tf32: bool | None = None) -> float:
    """Seconds of `[rows, in] x [in, out]`, the fastest of two. `tf32`: on or off for as long as it takes."""
    weight = weight.detach()
    inputs = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), _tf32(tf32), torch.autocast(weight.device.type, enabled=False):
        return fastest(lambda: F.linear(inputs, weight), weight.device)


@contextmanager
def _tf32(is_on: bool | None) -> Iterator[None]:
    if is_on is None:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32" if is_on else "ieee"
        yield
    finally:
        matmul.fp32_precision = before


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, the fastest after a first one: of two on a CPU, in processor time of one thread, which other programs
    do not change; of ten on a GPU, where one takes microseconds."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        seconds = []
        for _ in range(11):
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        return max(min(seconds[1:]), 1e-9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        work()
        seconds = []
        for _ in range(2):
            before = time.thread_time()
            work()
            seconds.append(time.thread_time() - before)
    finally:
        torch.set_num_threads(threads)
    return max(min(seconds), 1e-9)


# --- attention


class CalledAttention(TorchFunctionMode):
    """Shapes of query, key and value of each call of `scaled_dot_product_attention`, and the largest dropout."""

    def __init__(self):
        super().__init__()
        self.shapes: list[list[torch.Size]] = []
        self.dropout = 0.0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            self.shapes.append([tensor.shape for tensor in given[:3]])
            self.dropout = max(self.dropout, kwargs.get("dropout_p", 0.0))
        return func(*args, **kwargs)


class RanAttention(TorchDispatchMode):
    """Names of the fused attention kernels that ran; the plain one is made of other operations."""

    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.kernels.append(str(func))
        return func(*args, **(kwargs or {}))


def time_attention(shapes: list[torch.Size], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of one causal call by the plain kernel, and by the fastest that PyTorch chooses by itself."""
    query, key, value = (torch.ones(shape, dtype=dtype, device=device) for shape in shapes)
    is_grouped = query.shape[-3] != key.shape[-3]

    def attend():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)

    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    with torch.no_grad():
        seconds = []
        for backend in (sdpa_kernel(SDPBackend.MATH), sdpa_kernel(fused, set_priority=True)):
            with backend:
                seconds.append(fastest(attend, device))
    return seconds[0], seconds[1]
