"""Tokens a second of the 180M at 48 x 1,024 tokens a step: the recipe with guards on and off, compiled and eager, a
bare compiled loop, and stock Trainer.

Every Trainer runs once. Between its steps the arms take turns in short blocks, the bare loop among them, so that each
ratio is of neighbouring blocks. A block's first step is not timed; the device is synchronised at its edges alone.
"""

import gc
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from recipe.model import count_flops_per_token, why_not_compile
from tests.benchmarks.measure_guards import PARTS, Clock
from tests.benchmarks.measure_guards import timed as with_timer
from tests.gpu.environment import matrix_rate
from tests.gpu.part import Report
from tests.gpu.scale import Scale, autocast, batch_of, build_model, build_run, let_go, synchronize, use_tf32
from tests.gpu.sync import SyncCounter

COMPILED, EAGER = "recipe, compiled", "recipe, eager"
STOCK, STOCK_TUNED = "stock Trainer", "stock Trainer, bf16, compiled"
BARE = "bare loop, compiled"
ON, OFF = ", guards on", ", guards off"
UNTIMED = {part: getattr(owner, method) for part, (owner, method) in PARTS.items()}
COUNTED_STEPS = 3  # in which host synchronisations are counted
STEPS_MADE = 10_000  # of the schedule; the run is stopped when its blocks are done. Logged once in as many: a line
# would wait for the device in some blocks and not in others


def run(scale: Scale, report: Report, folder: Path) -> None:
    use_tf32(scale, True)
    model = build_model(scale)
    report.put("tokens a step", scale.tokens_per_step)
    report.put("rows", [scale.accumulation, scale.micro_batch, scale.block_size])
    report.put("parameters", model.num_parameters())
    report.put("FLOPs a token", flops(model, scale))
    let_go(model)
    report.section("bf16 matrix rate", lambda: matrix_rate(scale, torch.bfloat16))
    bare = BareLoop(scale)
    # Blocks and seconds of an H100, estimated: 0.3 s a step compiled, 0.7 s eager, 2.5 s in fp32; 60 s to compile.
    plan = {
        COMPILED: (recipe_arms, True, Turns(rounds=4, steps=6), 0),
        EAGER: (recipe_arms, False, Turns(rounds=3, steps=4), 45),
        STOCK: (stock_arms, False, Turns(rounds=2, steps=2), 30),
        STOCK_TUNED: (stock_arms, True, Turns(rounds=3, steps=3), 80),
    }
    for name, (measure, is_tuned, turns, least) in plan.items():
        turns, least = (Turns(rounds=1, steps=1, warm=0), 0) if scale.is_tiny else (turns, least)
        report.section(name, partial(measure, scale, report, folder, bare, is_tuned, turns), least)


def flops(model, scale: Scale) -> dict[str, int]:
    whole = count_flops_per_token(model, scale.block_size)
    config = model.config
    return {
        "6N": whole - 12 * config.num_hidden_layers * config.hidden_size * scale.block_size,
        "with attention": whole,
    }


# --- arms


class Turns(NamedTuple):
    """`rounds` of blocks of `steps`, an even number, since some guards look at every second step; before them `warm`
    steps, in which they look at more than later on."""

    rounds: int
    steps: int
    warm: int = 12


@dataclass(frozen=True)
class Arm:
    """`enter` puts the Trainer in this arm's state. `alone`: runs that many steps by itself, instead of the
    Trainer's."""

    name: str
    enter: Callable[[], None] = lambda: None
    alone: Callable[[int], None] | None = None


@dataclass
class Measured:
    """What one Trainer's blocks gave: seconds of a step, by arm and round."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak: dict[str, float] = field(default_factory=dict)
    host_reads: dict[str, dict[str, float]] = field(default_factory=dict)
    first_step: float | None = None
    graphs: int = 0
    graphs_late: int | None = None

    def as_dict(self, scale: Scale) -> dict:
        found = {
            "seconds a step": dict(self.seconds),
            "tokens/s": {name: scale.tokens_per_step / statistics.median(each) for name, each in self.seconds.items()},
            "to the first step, s": self.first_step,
            "peak memory, GiB": self.peak,
            "host reads a step": self.host_reads,
        }
        return found | {"graphs": self.graphs, "graphs after step 3": self.graphs_late}


class TakeTurns(TrainerCallback):
    """`put`: called with the figures after each block. `others`: bytes on the device that are not this Trainer's."""

    def __init__(self, scale: Scale, arms: list[Arm], turns: Turns, put, counted: list[Arm], others):
        self.scale, self.steps, self.warm, self.put, self.others = scale, turns.steps, turns.warm, put, others
        self.measured = Measured()
        self.last = arms[0]  # in its state the Trainer ends: with the guards on, which end too
        blocks = [(arm, False) for _ in range(turns.rounds) for arm in arms]
        self.blocks = iter([*blocks, *((arm, True) for arm in counted)])
        self.block: tuple[Arm, bool] | None = None
        self.done = 0
        self.began = time.perf_counter()
        self.foreign = 0  # graphs that the bare loop compiled

    def on_train_begin(self, args, state, control, **kwargs):
        self.graphs_before, self.graphs_at_3 = counters["stats"]["unique_graphs"], None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            synchronize(self.scale)
            self.measured.first_step = time.perf_counter() - self.began
        if state.global_step == 3:
            self.graphs_at_3 = self._graphs()
        if state.global_step < self.warm:
            return
        if self.block is None or self._is_over():
            self._next(control)
        arm, is_counted = self.block or (None, False)
        if arm is not None and self.done == 1:
            if is_counted:
                self.counter = SyncCounter(self.scale.is_cuda)
                self.counter.start()
            else:
                self._start_clock()
        self.done += 1

    def _graphs(self) -> int:
        return counters["stats"]["unique_graphs"] - self.graphs_before - self.foreign

    def _is_over(self) -> bool:
        """After a step that is not timed, and the block's."""
        arm, is_counted = self.block
        steps = COUNTED_STEPS if is_counted else self.steps
        if self.done < steps + 1:
            return False
        if is_counted:
            self.counter.stop()
            self.measured.host_reads[arm.name] = {
                name: count / steps for name, count in self.counter.by_caller.most_common()
            }
        else:
            self._stop_clock(arm, steps)
        self.put(self.measured.as_dict(self.scale))
        return True

    def _start_clock(self) -> None:
        if self.scale.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        synchronize(self.scale)
        self.started = time.perf_counter()

    def _stop_clock(self, arm: Arm, steps: int) -> None:
        synchronize(self.scale)
        self.measured.seconds[arm.name].append((time.perf_counter() - self.started) / steps)
        if self.scale.is_cuda:
            peak = (torch.cuda.max_memory_allocated() - self.others()) / 2**30
            self.measured.peak[arm.name] = max(peak, self.measured.peak.get(arm.name, 0.0))

    def _next(self, control) -> None:
        """The next block that is the Trainer's own; those of other loops run here."""
        self.done = 0
        while (block := next(self.blocks, None)) is not None and block[0].alone is not None:
            arm, before = block[0], counters["stats"]["unique_graphs"]
            arm.enter()
            arm.alone(1)
            self._start_clock()
            arm.alone(self.steps)
            self._stop_clock(arm, self.steps)
            self.measured.peak.pop(arm.name, None)  # beside the Trainer's weights it would mean nothing
            self.foreign += counters["stats"]["unique_graphs"] - before
        self.block = block
        if block is None:
            self.last.enter()
            self.measured.graphs = self._graphs()
            if self.graphs_at_3 is not None:
                self.measured.graphs_late = self._graphs() - self.graphs_at_3
            control.should_training_stop = True
        else:
            block[0].enter()


class BareLoop:
    """The model, torch.compile, autocast, fused AdamW and clipping, on tokens that are on the device already. Built
    and compiled when it first runs."""

    def __init__(self, scale: Scale):
        self.scale, self.model, self.bytes = scale, None, 0

    def arm(self) -> Arm:
        return Arm(BARE, lambda: use_tf32(self.scale, True), self.run)

    def _build(self) -> None:
        before = allocated(self.scale)
        self.own = build_model(self.scale)
        is_possible = why_not_compile() is None
        self.model = torch.compile(self.own, backend=self.scale.compile_backend) if is_possible else self.own
        self.optimizer = torch.optim.AdamW(
            self.own.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=self.scale.is_cuda or None
        )
        scale = self.scale
        self.batches = itertools.cycle(
            batch_of(scale, scale.micro_batch, scale.block_size, first=number * scale.micro_batch * scale.block_size)
            for number in range(2 * scale.accumulation)
        )
        self.run(1)
        self.optimizer.zero_grad(set_to_none=True)
        self.bytes = allocated(self.scale) - before

    def run(self, steps: int) -> None:
        if self.model is None:
            self._build()
        with torch.enable_grad():
            for _ in range(steps):
                for _ in range(self.scale.accumulation):
                    rows = next(self.batches)
                    with autocast(self.scale, self.scale.is_cuda):
                        loss = self.model(input_ids=rows, labels=rows).loss / self.scale.accumulation
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(self.own.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)


def allocated(scale: Scale) -> int:
    """Bytes on the device, once what nobody names any more is gone: a Trainer and its callbacks name each other."""
    gc.collect()
    return torch.cuda.memory_allocated() if scale.is_cuda else 0


# --- the recipe


def recipe_arms(scale: Scale, report: Report, folder: Path, bare: BareLoop, is_compiled: bool, turns: Turns) -> dict:
    name = COMPILED if is_compiled else EAGER
    use_tf32(scale, True)
    resident = allocated(scale) - bare.bytes
    keys = {"max_steps": STEPS_MADE, "torch_compile": str(is_compiled).lower(), "logging_steps": STEPS_MADE}
    run = build_run(scale, folder / name.replace(", ", "-"), **keys)
    switch, parts = Switch(run.trainer, run.guards), defaultdict(float)
    for part, (owner, method) in PARTS.items():
        setattr(owner, method, with_timer(UNTIMED[part], parts, part))
    own = [Arm(name + ON, switch.on), Arm(name + OFF, switch.off)]
    counted = own if scale.is_cuda or not is_compiled else []  # a dispatch mode and a compiled model do not mix

    def found(figures: dict) -> dict:
        watched = max(1, switch.steps_on)
        about = {"parts of the guards, host ms a step": {n: 1e3 * s / watched for n, s in parts.items()}}
        return {**figures, **about, "ratios": ratios(figures["seconds a step"])}

    put = partial(_put, report, name, found)
    blocks = TakeTurns(scale, [*own, bare.arm()], turns, put, counted, lambda: resident + bare.bytes)
    run.trainer.callback_handler.callbacks.insert(0, blocks)
    run.trainer.callback_handler.callbacks.insert(1, switch.counter)
    run.trainer.train()
    result = found(blocks.measured.as_dict(scale))
    result["findings"] = [finding.id for finding in run.guards.findings if finding.severity != "info"]
    result["guards' failure"] = run.guards.failure
    let_go(run.trainer.model)
    return result


def _put(report: Report, name: str, found: Callable[[dict], dict], figures: dict) -> None:
    report.put(name, found(figures))


class Switch:
    """Takes the guards off the trainer and puts them back, between steps, as `Clock` does."""

    def __init__(self, trainer, guards):
        self.clock = Clock(trainer, guards, block=0)
        self.steps_on, self.counter = 0, _StepsOn(self)

    def on(self) -> None:
        if not self.clock.is_on:
            self.clock.switch()

    def off(self) -> None:
        if self.clock.is_on:
            self.clock.switch()


class _StepsOn(TrainerCallback):
    def __init__(self, switch: Switch):
        self.switch = switch

    def on_step_end(self, args, state, control, **kwargs):
        self.switch.steps_on += self.switch.clock.is_on


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Of the seconds of neighbouring blocks: median, smallest, largest."""
    found = {}
    for (first, ours), (second, others) in itertools.permutations(seconds.items(), 2):
        pairs = [a / b for a, b in zip(ours, others, strict=False)]
        is_wanted = second == BARE or (first.endswith(ON) and second.endswith(OFF))
        if pairs and is_wanted:
            found[f"{first} / {second}"] = {"median": statistics.median(pairs), "all": pairs}
    return found


# --- stock Trainer


class Blocks(torch.utils.data.Dataset):
    """Rows of the repo's token ids; labels are the same ids, unshifted."""

    def __init__(self, scale: Scale):
        rows = batch_of(Scale("cpu", scale.is_tiny), 8 * scale.rows_per_step, scale.block_size)
        self.rows = rows

    def __len__(self):
        return 100_000

    def __getitem__(self, i):
        row = self.rows[i % len(self.rows)]
        return {"input_ids": row, "labels": row}


def stock_arms(scale: Scale, report: Report, folder: Path, bare: BareLoop, is_tuned: bool, turns: Turns) -> dict:
    """transformers.Trainer as it comes: fp32 without TF32, eager, its own defaults. `is_tuned`: bf16 and compiled."""
    name = STOCK_TUNED if is_tuned else STOCK
    resident = allocated(scale) - bare.bytes
    arguments = {"bf16": scale.is_cuda, "torch_compile": why_not_compile() is None} if is_tuned else {}
    if arguments.get("torch_compile"):
        arguments["torch_compile_backend"] = scale.compile_backend
    model = build_model(scale, attention="sdpa")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "stock"),
            per_device_train_batch_size=scale.micro_batch,
            gradient_accumulation_steps=scale.accumulation,
            max_steps=STEPS_MADE,
            learning_rate=1e-3,
            logging_steps=STEPS_MADE,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not scale.is_cuda,
            **arguments,
        ),
        train_dataset=Blocks(scale),
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    own = Arm(name, lambda: use_tf32(scale, is_tuned))
    turns = turns._replace(warm=0)

    def found(figures: dict) -> dict:
        return {**figures, "ratios": ratios(figures["seconds a step"])}

    put = partial(_put, report, name, found)
    blocks = TakeTurns(scale, [own, bare.arm()], turns, put, [], lambda: resident + bare.bytes)
    trainer.callback_handler.callbacks.insert(0, blocks)
    trainer.train()
    let_go(model)
    return found(blocks.measured.as_dict(scale))


def utilization(values: dict) -> dict[str, dict[str, float]]:
    """MFU of every arm by both counts, against the bf16 rate that this part measured."""
    rate = values.get("bf16 matrix rate")
    if not isinstance(rate, float) or not math.isfinite(rate):
        return {}
    speeds = {
        arm: speed
        for name in (COMPILED, EAGER, STOCK, STOCK_TUNED)
        for arm, speed in values.get(name, {}).get("tokens/s", {}).items()
    }
    counts = values["FLOPs a token"]
    return {
        arm: {way: speed * count / (rate * 1e12) for way, count in counts.items()} for arm, speed in speeds.items()
    }
