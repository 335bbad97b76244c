"""What a run keeps in memory does not grow with its steps; `python -m tests.benchmarks.endurance` has 100,000."""

import gc
import json
import sys

import numpy as np

from recipe.__main__ import run
from recipe.data.packing import encode
from recipe.guards.ngrams import NgramModel
from recipe.guards.records import read_lines
from tests.benchmarks.fault_disk import at_steps

TINY = {"block_size": 16, "per_device_train_batch_size": 1, "eval_strategy": "no", "eval_steps": None}


def test_a_step_leaves_nothing_behind(write_config, tmp_path, monkeypatch):
    """Blocks of Python's allocator between steps 100 and 200, with short histories. It was 2.4 a step, of windows that
    are not full yet; an entry of the log kept for each step is 7, a pair of arrays 5."""
    monkeypatch.setattr("recipe.guards.worker.HISTORY", 16)
    monkeypatch.setattr("recipe.trainer.LOGGED", 16)
    monkeypatch.setattr("recipe.data.packing.FIRST_TOKENIZE_BYTES", 1)
    monkeypatch.setattr("recipe.data.packing.TOKENIZE_BYTES", 1)
    blocks = []

    def count(_):
        gc.collect()
        blocks.append(sys.getallocatedblocks())

    with at_steps({100: count, 200: count}):
        assert run(["train", write_config(**TINY, max_steps=201, save_steps=201, logging_steps=1)]) == 0
    assert blocks[1] - blocks[0] < 400
    logged = json.loads((tmp_path / "run/checkpoint-201/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged] == list(range(186, 202))
    assert [record["step"] for record in read_lines(tmp_path / "run/steps.jsonl")] == list(range(1, 202))


def test_the_tokens_of_the_ngram_model_are_kept_in_one_piece():
    model, steps = NgramModel(4096), 200
    rows = [np.random.default_rng(0).integers(0, 4096, 16) for _ in range(2)]
    scored = [np.ones(16, bool)] * 2
    model.observe(rows, scored)
    before = sys.getallocatedblocks()
    for _ in range(steps):
        model.observe(rows, scored)
    assert sys.getallocatedblocks() - before < steps
    assert model.state()["tokens"].tolist() == np.concatenate(rows * (steps + 1)).tolist()


def test_tokens_that_wait_in_a_lane_take_four_bytes(tokenizer):
    (ids,) = encode(["some text"], tokenizer)
    assert isinstance(ids, np.ndarray) and ids.dtype == np.int32
