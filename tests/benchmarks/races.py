"""One race of `time_to_loss`, in a process of its own: trains until the eval loss is low enough."""

import json
import os
import statistics
import sys
import time
from collections import deque

import torch
from transformers import TrainerCallback

from recipe.arguments import parse_config
from recipe.data.pipeline import build_data
from tests.benchmarks.measure_guards import build
from tests.benchmarks.stock import build_stock

DEMO, MODEL, BLOCK_SIZE = "recipe/configs/cpu_demo.json", "recipe/configs/llama_3m_model.json", 256
# Tokens between evaluations, which begin once the training loss is this near to the target.
EVERY, NEAR = 51_200, 0.15
OURS = {"optim": "muon", "eval_strategy": "no", "save_strategy": "no", "logging_steps": 5, "trajectory": "none"}
# The demo's, for stock Trainer
COMMON = {"weight_decay": 0.1, "adam_beta2": 0.95, "logging_steps": 5}


class Race(TrainerCallback):
    """Ends the training when the eval loss is at `target`, which it looks for every 51,200 tokens once the training
    loss is near, or after `limit` tokens."""

    def __init__(self, trainer, rows: torch.Tensor, target: float, limit: int):
        self.model, self.rows, self.target, self.limit = trainer.model, rows, target, limit
        self.recent: deque = deque(maxlen=8)
        self.record = {"reached": False, "losses": [], "evals": []}

    def on_train_begin(self, args, state, control, **kwargs):
        self.tokens_per_step = args.per_device_train_batch_size * BLOCK_SIZE
        self.spent = {"seconds": -time.perf_counter(), "processor_seconds": -time.process_time()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.recent.append(logs["loss"])
            self.record["losses"].append([self._tokens(state), round(logs["loss"], 4)])

    def _tokens(self, state) -> int:
        return state.global_step * self.tokens_per_step

    def on_step_end(self, args, state, control, **kwargs):
        tokens, is_last = self._tokens(state), state.global_step >= state.max_steps
        is_near = bool(self.recent) and statistics.mean(self.recent) < self.target + NEAR
        is_over = tokens >= self.limit or is_last
        if is_over or (is_near and tokens % EVERY < self.tokens_per_step):
            self._pause(1)
            loss = eval_loss(self.model, self.rows)
            self._pause(-1)
            self.record["evals"].append([tokens, round(loss, 4)])
            self.record["reached"] = loss <= self.target
            control.should_training_stop = self.record["reached"] or is_over
        if control.should_training_stop:
            self._pause(1)
            self.record |= {"tokens": tokens, **self.spent}

    def _pause(self, sign: int) -> None:
        self.spent["seconds"] += sign * time.perf_counter()
        self.spent["processor_seconds"] += sign * time.process_time()


@torch.no_grad()
def eval_loss(model, rows: torch.Tensor) -> float:
    """Of all rows, nats per token; leaves the model in train mode."""
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows.split(32)]
    model.train()
    return sum(losses) / len(rows)


def race(folder: str, arm: str, settings: dict, seed: int, target: float, limit: int) -> dict:
    """One run, in a process of its own."""
    words = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in settings.items()}
    if arm == "ours":
        run = build(folder, "cpu_demo", **words, **OURS, train_seed=seed, seed=seed)
        trainer, data = run.trainer, run.data
    else:
        words |= {"train_seed": seed, "output_dir": f"{folder}/run", "use_cpu": "true"}
        data = build_data(parse_config(DEMO, [w for name, value in words.items() for w in (f"--{name}", str(value))]))
        trainer = build_stock(MODEL, data.loader, folder, seed, **settings, **COMMON)
    rows = torch.stack([torch.as_tensor(row.input_ids, dtype=torch.long) for row in data.eval_rows.rows])
    contest = Race(trainer, rows, target, limit)
    trainer.add_callback(contest)
    trainer.train()
    if arm == "ours":
        contest.record["findings"] = [each.id for each in run.guards.findings if each.severity != "info"]
    return contest.record


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of pyarrow may abort the interpreter when it ends
