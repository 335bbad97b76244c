"""Private names of torch, transformers, accelerate and evaluate that the guards need, in one place.

tests/test_internals.py uses each of them, so that an upgrade which breaks one is named by its test.
"""

import torch


def count_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def count_graph_breaks() -> int:
    """Graph breaks, each reason as often as it came."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())
