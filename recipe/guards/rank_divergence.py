"""Weights that differ between ranks."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from recipe.guards.guard import CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.taps import is_checked
from recipe.guards.updates import is_partial, shorten, stack

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankDivergence(Guard):
    """The weights differ between ranks: each trains a model of its own.

    When: after steps 1, 10, 100 and every 100th.
    Measured: an exact checksum of each parameter's bits must be the same on all ranks.
    Try: comparing the first parameter that differs before step 1; broadcasting the model from rank 0.
    Cannot see: sharded weights; buffers and optimizer states.
    """

    ids = {"rank_divergence": "The weights differ between ranks."}
    on_every_rank = True

    def setup(self, run) -> None:
        if run.world_size == 1:
            raise NotApplicable("one rank")
        if any(is_partial(parameter) for parameter in run.model.parameters()):
            raise CannotJudge("the parameters are sharded, so ranks hold different parts")
        self.model = run.model
        self.names = [name for name, _ in run.model.named_parameters()]

    def measure(self, local) -> torch.Tensor | None:
        return parameter_checksums(self.model) if is_checked(local.step + 1) else None

    def observe(self, step) -> Iterator[Verdict]:
        checksums = step.payloads.get(type(self).__name__, [None])
        if None not in checksums:
            yield self.judge(self.names, checksums) or self.clear()

    @classmethod
    def judge(cls, names: Sequence[str], checksums: Sequence[Sequence[int]]) -> Finding | None:
        """`checksums`: of `parameter_checksums`, one sequence for each rank, after the same step."""
        by_name = zip(names, zip(*checksums, strict=True), strict=True)
        differing = [name for name, sums in by_name if len(set(sums)) > 1]
        if not differing:
            return None
        (usual, _), *_ = Counter(map(tuple, checksums)).most_common(1)
        odd = [rank for rank, sums in enumerate(checksums) if tuple(sums) != usual]
        return cls.finding(
            "error",
            found=f"{len(differing)} of {len(names)} parameters differ ({shorten(differing[0])})",
            expected=f"equal bits (on all {len(checksums)} ranks)",
            causes=("another initialisation on a rank (or other steps)", "gradients changed before averaging"),
            action="compare the first of them over ranks before step 1; broadcast the model from rank 0",
            evidence={"differing": differing[:20], "num_differing": len(differing), "odd_ranks": odd},
        )


def parameter_checksums(model: torch.nn.Module) -> torch.Tensor:
    """An int64 per parameter: its bit patterns, added with wrap-around. Exact, and the same in any order."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    return stack([p.view(INTEGERS[p.element_size()]).sum(dtype=torch.int64) for p in parameters])
