"""Where the host waits for the device: how often, and in whose code.

On CUDA, what `torch.cuda.set_sync_debug_mode("warn")` warns of: copies to the host that are not asynchronous,
`.item()`, `nonzero`. It says nothing of an event's or a stream's own `synchronize`. On a CPU nothing waits; there
the values that the host reads (`.item()`, `bool(tensor)`) are counted, each of which would wait on CUDA.
"""

import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.tokens import ROOT

SITE = Path(torch.__file__).parents[1]
HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")


class SyncCounter:
    """Counts between `start` and `stop`, which need not be in one function."""

    def __init__(self, is_cuda: bool):
        self.is_cuda = is_cuda
        self.by_caller: Counter[str] = Counter()

    def start(self) -> None:
        if not self.is_cuda:
            self._mode = _HostReads(self.count)
            self._mode.__enter__()
            return
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._warned
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        if not self.is_cuda:
            self._mode.__exit__(None, None, None)
            return
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)

    def _warned(self, message, *_, **__) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.count()

    def count(self) -> None:
        self.by_caller[caller(traceback.extract_stack())] += 1


def caller(stack: traceback.StackSummary) -> str:
    """`file:function` of the innermost frame outside torch, the standard library and this file; of what backward
    itself waits for it is the caller of backward."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path == Path(__file__) or path.is_relative_to(SITE / "torch"):
            continue
        for root in (ROOT, SITE):
            if path.is_relative_to(root):
                return f"{path.relative_to(root).as_posix()}:{frame.name}"
    return "torch"


class _HostReads(TorchDispatchMode):
    def __init__(self, count):
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in HOST_READS:
            self._count()
        return function(*args, **(kwargs or {}))
