"""What is read of a training set before step 1: overlapping rows, a part twice, passes of one order."""

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Sampler
from transformers import Trainer

from recipe.guards import train_set
from tests.test_guards_on_runs import EOS, LENGTH, ROWS, as_rows, check_first, check_healthy, text, train

BLOCK, BYTES = 128, 256


def packed(count: int, document: int = 700, seed: int = 0) -> np.ndarray:
    """Tokens of `count` rows: documents of random bytes, EOS after each."""
    ids = np.random.default_rng(seed).integers(0, BYTES, count * BLOCK)
    ids[document::document] = EOS
    return ids


def judge(ids: np.ndarray) -> dict | None:
    rows = ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return train_set.judge(rows.shape, train_set.overlap(rows), train_set.find_twice(rows, (EOS,)))


def windows(stride: int, count: int = 100) -> np.ndarray:
    ids = packed(count)
    return np.concatenate([ids[at : at + BLOCK] for at in range(0, len(ids) - BLOCK, stride)])


@pytest.mark.parametrize(
    "stride, severity", [(64, "warning"), (96, "warning"), (112, "info"), (120, None), (127, None)]
)
def test_rows_that_overlap(stride, severity):
    found = judge(windows(stride))
    assert (found and found["severity"]) == severity
    assert not found or found["evidence"]["overlap_tokens"] == BLOCK - stride


def test_a_file_that_is_listed_twice():
    ids = packed(400)
    found = judge(np.concatenate([ids[: 40 * BLOCK + 37], ids]))
    assert found["severity"] == "warning"
    assert "rows 40 to 80" in found["found"] and found["evidence"]["distance"] == 40 * BLOCK + 37


@pytest.mark.parametrize(
    "ids",
    [
        packed(400),
        np.tile(packed(1), 400),  # one row again and again: seen at the steps
        np.tile(np.arange(50), 400 * BLOCK // 50 + 1)[: 400 * BLOCK],  # a period
        np.concatenate([packed(400, 700)[: 5 * BLOCK], packed(400)]),  # too little
        np.concatenate([packed(40, 10**6), packed(40, 10**6), packed(300, seed=1)]),  # one long document
    ],
)
def test_what_is_no_part_that_comes_twice(ids):
    assert judge(ids) is None


def test_what_is_read():
    row = {"input_ids": list(range(BLOCK))}
    assert train_set.read_packed([row, row]).shape == (2, BLOCK)
    assert train_set.read_packed(datasets.Dataset.from_list([row, row])).shape == (2, BLOCK)
    others = [
        {"input_ids": [1] * 64},  # another length
        row | {"labels": [-100] * 64 + [1] * 64},
        row | {"attention_mask": [1] * 100 + [0] * 28},
        row | {"input_ids": None},
        row | {"input_ids": [0.5] * BLOCK},
        "text",
    ]
    for other in others:
        assert train_set.read_packed([row, other]) is None
    lazy = datasets.Dataset.from_list([row, row]).with_transform(lambda batch: batch)
    assert train_set.read_packed(lazy) is None  # it may draw at random
    assert train_set.read_packed(torch.utils.data.TensorDataset(torch.arange(9))) is None


def test_the_order_of_passes():
    rows = packed(800).reshape(-1, BLOCK)
    digests = train_set.hash_rows(list(rows)).digest
    shuffled = np.random.default_rng(1).permutation(800)

    def is_seen(first, second, tokens=200 * BLOCK) -> bool:
        seen = train_set.TrainSet()
        assert seen.read([{"input_ids": row} for row in rows], (EOS,)) is None
        found = [seen.observe(digests[part]) for part in np.split(first, len(first) // 8)]
        seen.begin_pass(tokens)
        again = train_set.TrainSet()
        again.load(seen.state())
        again.of_set, again.tokens = seen.of_set, seen.tokens
        found += [again.observe(digests[part]) for part in np.split(second, len(second) // 8)]
        assert sum(map(bool, found)) <= 1
        return any(found)

    quarter = shuffled[:200]
    assert is_seen(quarter, quarter)
    assert not is_seen(quarter, quarter, tokens=800 * BLOCK)  # all of the rows
    assert not is_seen(quarter, shuffled[200:400]) and not is_seen(quarter, np.roll(quarter, 8))
    assert not is_seen(np.arange(200), np.arange(200)) and not is_seen(np.arange(0, 400, 2), np.arange(0, 400, 2))


class Quarter(Sampler):
    """The first quarter of a permutation, which `is_fixed` is the same in each pass."""

    def __init__(self, size: int, is_fixed: bool):
        self.size, self.is_fixed, self.epoch = size, is_fixed, 0

    def __len__(self):
        return self.size // 4

    def __iter__(self):
        self.epoch += not self.is_fixed
        return iter(
            torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch))[: len(self)].tolist()
        )


@pytest.mark.parametrize("kind", ["ignores the pass", "knows the pass", "knows no passes"])
def test_a_sampler_that_does_not_know_the_pass(tmp_path, kind):
    rows = as_rows(text(80 * ROWS, 2 * LENGTH))
    sampler = Quarter(len(rows), kind != "knows the pass")

    class Sampled(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return list(sampler) if kind == "knows no passes" else sampler

    guards = train(tmp_path, train=rows, steps=50, trainer_class=Sampled)
    if kind == "knows the pass":
        return check_healthy(guards, "repeated_data")
    found = [finding for finding in guards.findings if finding.id == "repeated_data"]
    assert [finding.severity for finding in found] == ["info" if kind == "knows no passes" else "warning"]
    assert found[0].step == 36 and "25% of the rows" in found[0].found
    return None


def test_overlapping_rows_are_named_before_step_1(tmp_path):
    ids = text(40, 16 * LENGTH).reshape(40, -1)
    rows = [row[at : at + 2 * LENGTH] for row in ids for at in range(0, 15 * LENGTH, LENGTH)]
    guards = train(tmp_path, train=as_rows(torch.stack(rows)), steps=40)
    check_first(guards, "repeated_data", 0)
    assert [finding.id for finding in guards.findings].count("repeated_data") == 1
