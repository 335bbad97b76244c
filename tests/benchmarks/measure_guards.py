"""What the guards cost, each call in a process of its own (see `measure.run_fresh`). All times are wall seconds."""

import contextlib
import itertools
import json
import logging
import os
import resource
import statistics
import sys
import time
from collections import defaultdict

import torch
from transformers import TrainerCallback

from recipe.guards import worker
from recipe.guards.callback import RegressionCallback
from recipe.guards.session import PreflightDone
from recipe.guards.taps import Taps
from recipe.resolve import resolve
from recipe.train import assemble, open_run
from tests.benchmarks import guard_rate

PARTS = {
    "beside: reading, hashing, counting": (worker, "read"),
    "beside: judging, on the main process": (worker, "observe"),
    "taps, before a micro-batch": (Taps, "begin_micro_step"),
    "taps, after a micro-batch": (Taps, "end_micro_step"),
    "end of step in all": (RegressionCallback, "on_step_end"),
}
# What `recipe.guards.attach.Wrapping` wraps, of the Trainer and of its accelerator.
STEPS, CLIP = ("training_step", "prediction_step"), ("clip_grad_norm_",)


def parse(folder: str, config: str, **keys):
    overrides = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    overrides += ["--output_dir", f"{folder}/run", "--use_cpu", "true"]
    return resolve(f"recipe/configs/{config}.json", overrides)


def build(folder: str, config: str, **keys):
    parsed = parse(folder, config, **keys)
    return assemble(parsed, open_run(parsed))


def drop_guards(run) -> None:
    """And the callbacks that ask them."""
    run.trainer.remove_callback(run.guards)
    for callback in list(run.trainer.callback_handler.callbacks):
        if hasattr(callback, "guards"):
            run.trainer.remove_callback(callback)


def steps(folder: str, config: str, count: int, block: int, warm: int, **keys) -> dict:
    """Trains with the guards on and off in turn, `block` steps each, in one run: seconds of a step and its parts."""
    run = build(folder, config, max_steps=count, eval_strategy="no", save_strategy="no", **keys)
    clock, spent = Clock(run.trainer, run.guards, block), defaultdict(float)
    run.trainer.add_callback(clock)
    run.trainer.callback_handler.callbacks.insert(0, run.trainer.callback_handler.callbacks.pop())  # before the guards
    for name, (owner, method) in PARTS.items():
        setattr(owner, method, timed(getattr(owner, method), spent, name))
    run.trainer.train()
    seconds = {is_on: [s for number, on, s in clock.steps if on == is_on and number > warm] for is_on in (True, False)}
    pairs = [clock.mean_of(number) for number in range(warm // block + 1, count // block)]
    ratios = [a / b if is_on else b / a for (is_on, a), (_, b) in itertools.pairwise(pairs)]
    watched = sum(on for _, on, _ in clock.steps)
    return {
        "on": statistics.median(seconds[True]),
        "off": statistics.median(seconds[False]),
        "ratios": ratios,
        "parts": {name: value / watched for name, value in spent.items()}
        | {f"guard {name}": value / watched for name, value in run.guards.session.runner.seconds.items()}
        | {f"beside: {name}": value / watched for name, value in run.guards.session.runner.seconds_beside.items()},
        "findings": [finding.id for finding in run.guards.findings],
    }


class Clock(TrainerCallback):
    """Times steps from end to end, and takes the guards off the trainer and puts them back every `block` steps: their
    callback, the methods that they wrapped, and their hooks on the optimizer. Hooks on two parameters and on the head
    stay, and return at once."""

    def __init__(self, trainer, guards: RegressionCallback, block: int):
        self.trainer, self.guards, self.block, self.is_on = trainer, guards, block, True
        self.taken: list[tuple[dict, dict]] = []  # from where, and what
        self.steps: list[tuple[int, bool, float]] = []
        self.last = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        now, was_on = time.perf_counter(), self.is_on
        self.steps.append((state.global_step, was_on, now - self.last))
        if state.global_step and state.global_step % self.block == 0:
            self.switch()
        self.last = time.perf_counter()

    def switch(self) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        if self.is_on:
            wrapped = (vars(self.trainer), STEPS), (vars(self.trainer.accelerator), CLIP)
            self.taken = [(held, {name: held.pop(name) for name in names}) for held, names in wrapped]
            optimizer = self.trainer.optimizer.optimizer  # accelerate wraps it
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
                self.taken.append((hooks, dict(hooks)))
                hooks.clear()
            callbacks.remove(self.guards)
        else:
            for held, own in self.taken:
                held.update(own)
            callbacks.insert(1, self.guards)
        self.is_on = not self.is_on

    def mean_of(self, block: int) -> tuple[bool, float]:
        """The median step of one block, and whether the guards were on; its first step, which switched, apart."""
        inside = [
            (on, s) for number, on, s in self.steps if (number - 1) // self.block == block and number % self.block != 1
        ]
        return inside[0][0], statistics.median(s for _, s in inside)


def timed(function, spent: dict[str, float], name: str):
    def measured(*arguments, **kwargs):
        started = time.perf_counter()
        try:
            return function(*arguments, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started

    return measured


def probes(folder: str, config: str, **keys) -> dict:
    """Seconds of each guard before step 1, and the process's peak memory."""
    run = build(folder, config, max_steps=2, **keys)
    run.guards.only_check = True
    before = peak_megabytes()
    started = time.perf_counter()
    with contextlib.suppress(PreflightDone):
        run.trainer.train()
    run.guards.on_train_end(run.trainer.args, run.trainer.state, run.trainer.control)
    seconds = dict(run.guards.session.runner.seconds)
    return {
        "seconds": {name: value for name, value in seconds.items() if value >= 0.01},
        "all": sum(seconds.values()),
        "total": time.perf_counter() - started,
        "megabytes": [before, peak_megabytes()],
        "unjudged": {**run.guards.cannot_judge, **run.guards.not_applicable},
        "tokens": run.guards.facts["tokens_per_step"],
    }


def training(folder: str, config: str, **keys) -> dict:
    """Seconds of a step and peak memory of two steps without the guards."""
    run = build(folder, config, max_steps=2, eval_strategy="no", save_strategy="no", **keys)
    drop_guards(run)
    before, started = peak_megabytes(), time.perf_counter()
    run.trainer.train()
    return {"step": (time.perf_counter() - started) / 2, "megabytes": [before, peak_megabytes()]}


def rate(folder: str, world_size: int) -> dict:
    logging.disable(logging.WARNING)
    return guard_rate.measure(folder, world_size)


def operations(folder: str) -> float:
    logging.disable(logging.WARNING)
    return guard_rate.device_operations(folder)


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    torch.manual_seed(0)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of pyarrow may abort the interpreter when it ends
