"""One arm of `throughput`, each in a process of its own (`measure.run_fresh`): some steps of one model, timed."""

import contextlib
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from recipe.data.pipeline import build_data
from recipe.guards.callback import RegressionCallback
from recipe.guards.ngrams import NgramTap
from recipe.guards.taps import Taps
from recipe.internals import has_fast_bf16_cpu
from recipe.plan import matrix_rate
from tests.benchmarks.measure_guards import build, drop_guards, parse, peak_megabytes, timed
from tests.benchmarks.stock import build_stock

LLAMA_13M = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
RUN = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 10, "trajectory": "none"}
RUN |= {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": "null"}
BIG = {"source": "docstrings", "eval_skip": 5000, "eval_documents": 20, "gradient_accumulation_steps": 4}
BIG |= {"per_device_train_batch_size": 1, "tokenizer": "tokenizer/llama-32k", "torch_compile": "false"}
# Of each model: the config that it is made from, what replaces keys there, and rows, accumulation and block of a step.
MODELS = {
    "demo": ("cpu_demo", {}, (8, 1, 256)),
    "13.8M": ("cpu_demo", {"block_size": 512, "model_config": LLAMA_13M}, (8, 1, 512)),
    "180M": ("llama_180m", BIG, (1, 4, 1024)),
}
TAPS = {
    "tap n-grams": (NgramTap, "observe"),
    "taps before a micro-batch": (Taps, "begin_micro_step"),
    "taps after a micro-batch": (Taps, "end_micro_step"),
    "end of step in all": (RegressionCallback, "on_step_end"),
}


class Steps(TrainerCallback):
    """Seconds of each step, from the end of the one before, and what `counters` gave after `warm` of them. To be the
    last callback."""

    def __init__(self, warm: int, counters: Callable[[], dict[str, float]]):
        self.warm, self.counters, self.before = warm, counters, {}
        self.seconds, self.last = [], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        before, self.last = self.last, time.perf_counter()
        self.seconds.append(self.last - before)
        if len(self.seconds) == self.warm:
            self.before = dict(self.counters())

    def parts(self) -> dict[str, float]:
        """Seconds of a step."""
        count = len(self.seconds) - self.warm
        return {name: (value - self.before.get(name, 0.0)) / count for name, value in self.counters().items()}


def keys_of(folder: str, model: str, steps: int) -> tuple[str, dict]:
    config, keys, _ = MODELS[model]
    return config, with_model({**keys, **RUN, "max_steps": steps, "warmup_steps": 1}, folder)


def with_model(keys: dict, folder: str) -> dict:
    """A `model_config` that is a dict becomes a file's path."""
    if isinstance(keys.get("model_config"), dict):
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(keys["model_config"]))
        keys["model_config"] = str(path)
    return keys


def recipe(folder: str, model: str, steps: int, warm: int, has_guards: bool, switches: dict) -> dict:
    """The real path of `train`."""
    config, keys = keys_of(folder, model, steps)
    return timed_run(build(folder, config, **keys, **switches), warm, has_guards)


def point(folder: str, steps: int, warm: int, keys: dict) -> dict:
    """The demo with other `keys`, guards on."""
    keys = with_model({**RUN, "max_steps": steps, "warmup_steps": 1, **keys}, folder)
    run = build(folder, "cpu_demo", **keys)
    return timed_run(run, warm, has_guards=True) | {"tokens": run.guards.facts["tokens_per_step"]}


def timed_run(run, warm: int, has_guards: bool) -> dict:
    spent = defaultdict(float)
    if not has_guards:
        drop_guards(run)
        return timed_training(run.trainer, warm)
    for name, (owner, method) in TAPS.items():
        setattr(owner, method, timed(getattr(owner, method), spent, name))

    def counters() -> dict[str, float]:
        return {**spent, **{f"guard {n}": each for n, each in run.guards.session.runner.seconds.items()}}

    return timed_training(run.trainer, warm, counters)


def stock(folder: str, model: str, steps: int, warm: int, switches: dict) -> dict:
    """Stock Trainer on the same rows, which are in memory."""
    config, keys = keys_of(folder, model, steps)
    rows, accumulation, _ = MODELS[model][2]
    parsed = parse(folder, config, **keys)
    batches = list(itertools.islice(build_data(parsed).loader, steps * accumulation))
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    rest = {"max_steps": steps, "logging_steps": 10, "learning_rate": 1e-3}
    trainer = build_stock(parsed.model.model_config, batches, folder, **sizes, **rest, **switches)
    return timed_training(trainer, warm)


def timed_training(trainer, warm: int, counters: Callable[[], dict[str, float]] = dict) -> dict:
    rates, clock = matrix_rates(), Steps(warm, counters)
    trainer.add_callback(clock)
    trainer.train()
    return figures(clock.seconds[warm:], clock.seconds[0], trainer.model, rates) | {"parts": clock.parts()}


def bare(folder: str, model: str, steps: int, warm: int, switches: dict) -> dict:
    """A loop of the model, autocast, torch.compile, fused AdamW and clipping, and nothing else."""
    config, keys = keys_of(folder, model, steps)
    parsed, (_, accumulation, _) = parse(folder, config, **keys), MODELS[model][2]
    batches = list(itertools.islice(build_data(parsed).loader, steps * accumulation))
    set_seed(42)
    own = LlamaForCausalLM(LlamaConfig.from_json_file(parsed.model.model_config))
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(own) if switches.get("torch_compile") else own
    precision = torch.autocast("cpu", torch.bfloat16) if switches.get("bf16") else contextlib.nullcontext()
    rates, seconds = matrix_rates(), [time.perf_counter()]
    for step in range(steps):
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            with precision:
                loss = compiled(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter())
    steps_taken = [after - before for before, after in itertools.pairwise(seconds)]
    return figures(steps_taken[warm:], steps_taken[0], own, rates)


def matrix_rates() -> dict[str, float]:
    kinds = ("fp32", "bf16") if has_fast_bf16_cpu() else ("fp32",)
    return {kind: matrix_rate(torch.device("cpu"), kind) for kind in kinds}


def figures(seconds: list[float], first: float, model, rates: dict) -> dict:
    after = matrix_rates()
    rates = {kind: max(rate, after[kind]) for kind, rate in rates.items()}
    return {
        "seconds": seconds,
        "first": first,
        "peak_mb": peak_megabytes(),
        "parameters": model.num_parameters(),
        "rates": rates,
    }


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of pyarrow may abort the interpreter when it ends
