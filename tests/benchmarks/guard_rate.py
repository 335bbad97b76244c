"""What the guards cost at a GPU's rate of tokens: one rank's real work, with the messages of the others.

Simulated steps of 12 micro-batches of 4 rows of 1,024 tokens a rank, one every 98 ms: 0.5M tokens/s for each rank. The
model does not run. The other ranks' messages are what the same code makes of other rows. What the guards call on the
device, also within forward and backward pass, is counted on a tiny model that is trained (`device_operations`).
"""

import pickle
import statistics
import time
from collections import Counter
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipe.guards import RegressionCallback, worker
from recipe.guards.batches import send_tokens
from recipe.guards.repetition import Repetition
from recipe.guards.session import Session
from recipe.guards.taps import LocalStep, PendingStep

MICRO_BATCHES, ROWS, BLOCK, VOCABULARY = 12, 4, 1024, 32_000
TOKENS = MICRO_BATCHES * ROWS * BLOCK
RATE = 500_000  # tokens/s of a rank
CLOCKS = 20  # reads of the clock, of which the mean is taken
FIRST = 101  # between the steps at which all weights are read or the probes run again
STEPS = range(FIRST + 11, FIRST + 27)  # after those that a guard measures from its first on
LOSS = torch.tensor(10.3)
COUNTED = range(24, 48)  # in which each micro-batch has its turn
# As many parameters as the 180M model has.
MODEL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=24, num_attention_heads=2)


class SimulatedRanks:
    """Of `world_size` ranks one is here. `others`: what the others send with the next step. `sent`: bytes of each
    message of this rank."""

    def __init__(self, world_size: int):
        self.world_size, self.is_main, self.others, self.sent = world_size, True, [], []

    def gather(self, payload) -> list:
        self.sent.append(len(pickle.dumps(payload)))
        return [payload, *map(pickle.loads, self.others)]

    def broadcast(self, value):
        return value

    def close(self) -> None:
        pass


def measure(folder: str, world_size: int) -> dict:
    """Seconds of processor time of a step: `training`, on the training's own thread; `read` and `observe`, beside it,
    on every rank and on the main process. Of each the least and the median over STEPS. `bytes` of a rank's message;
    windows `kept`."""
    torch.set_num_threads(1)
    session, rng = open_session(folder, world_size), np.random.default_rng(world_size)
    spent = {"training": [], "read": [], "observe": []}
    steps, others = range(FIRST, STEPS.stop), range(1, world_size)
    messages = {step: [message(session, rank, rng, step) for rank in others] for step in steps}
    with (
        mock.patch.object(worker, "read", timed(worker.read, spent["read"])),
        mock.patch.object(worker, "observe", timed(worker.observe, spent["observe"])),
    ):
        for step in steps:
            batches = [micro_batch(rng) for _ in range(MICRO_BATCHES)]
            session.ranks.others = messages[step]
            timed(train_step, spent["training"])(session, batches, step)
            session._worker.wait()  # in the rest of the 98 ms the model is busy
    assert session.failure is None and not session.runner.failed, (session.failure, session.runner.failed)
    steady = {name: values[STEPS.start - FIRST :] for name, values in spent.items()}
    found = {name: [min(values), statistics.median(values)] for name, values in steady.items()}
    kept = repetition_of(session).ledger.tables["windows"].size / len(steps)
    return {**found, "bytes": statistics.median(session.ranks.sent), "kept": kept}


def train_step(session: Session, batches: list[dict], step: int) -> None:
    """All that the callback does in a step on the training's own thread."""
    for inputs in batches:
        tokens = session.before_micro_step(inputs, None)
        session.after_micro_step(LOSS, inputs, tokens)
    session.before_step([(1e-3, 1e-3)], [1e-3])
    session.after_step()
    session.flush(is_final=False)
    session.end_step(step)


def open_session(folder: str, world_size: int) -> Session:
    """A session that is set up, on a tiny model; its run believes in `world_size` ranks."""
    torch.manual_seed(0)
    given = dict(max_steps=10_000, gradient_accumulation_steps=MICRO_BATCHES, use_cpu=True, report_to=[])
    arguments = TrainingArguments(folder, **given, learning_rate=1e-3, lr_scheduler_type="constant")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **MODEL))
    trainer = Trainer(model, arguments, train_dataset=[0])
    trainer.create_optimizer_and_scheduler(10_000)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guards = RegressionCallback(trainer=trainer)
    trainer.add_callback(guards)
    trainer.state.max_steps = 10_000
    guards.on_train_begin(arguments, trainer.state, trainer.control)
    session = guards.session
    session.begin(micro_batch(np.random.default_rng(0), 16), None, None, None)
    assert session.failure is None, session.failure
    session.ranks, session.run.world_size = SimulatedRanks(world_size), world_size
    session.run.step_size = TOKENS * world_size, MICRO_BATCHES * ROWS * world_size
    session.local.step = FIRST - 1
    repetition_of(session).setup(session.run)
    return session


def repetition_of(session: Session) -> Repetition:
    return next(guard for guard in session.runner.guards if isinstance(guard, Repetition))


def micro_batch(rng, length: int = BLOCK) -> dict:
    ids = torch.from_numpy(np.minimum(rng.zipf(1.3, (ROWS, length)), VOCABULARY) - 1)
    return {"input_ids": ids, "labels": ids.clone()}


def message(session: Session, rank: int, rng, step: int) -> bytes:
    """What another rank sends: the same code on other rows."""
    local = LocalStep(step=step - 1, losses=[LOSS] * MICRO_BATCHES)
    local.tokens = [send_tokens(micro_batch(rng), None) for _ in range(MICRO_BATCHES)]
    session.run.rank = repetition_of(session).rank = rank
    values, faults, fault = worker.read(session, PendingStep({"step": step}, local, {}))
    session.run.rank = repetition_of(session).rank = 0
    assert not faults and fault is None, (faults, fault)
    return pickle.dumps({**values, "findings": [], "passes": [], "stop": False, "failed": {}, "failure": None})


def timed(function, spent: list[float]):
    """`spent`: processor time of the thread that calls it, without that of reading the clock."""
    started = time.thread_time()
    for _ in range(CLOCKS):
        last = time.thread_time()
    clock = (last - started) / CLOCKS

    def measured(*arguments):
        started = time.thread_time()
        try:
            return function(*arguments)
        finally:
            spent.append(time.thread_time() - started - clock)

    return measured


class Operations(TorchDispatchMode, TrainerCallback):
    """Counts operations of the training's own thread, by step."""

    def __init__(self):
        super().__init__()
        self.by_step: Counter[int] = Counter()
        self.step = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_step[self.step] += 1
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def device_operations(folder: str) -> float:
    """Calls of torch's operations that the guards add to a step, mean over COUNTED. On a GPU each costs the training's
    thread some microseconds."""
    counts = []
    for callbacks in ([RegressionCallback()], []):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **{**MODEL, "num_hidden_layers": 1}))
        given = dict(max_steps=COUNTED.stop, gradient_accumulation_steps=MICRO_BATCHES, use_cpu=True, report_to=[])
        given |= dict(per_device_train_batch_size=ROWS, save_strategy="no", disable_tqdm=True)
        ids = np.random.default_rng(0).integers(0, 64, (COUNTED.stop * MICRO_BATCHES * ROWS, 32))
        rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(ids)]
        operations = Operations()
        arguments = TrainingArguments(folder, **given)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[operations, *callbacks])
        with operations:
            trainer.train()
        counts.append(statistics.fmean(operations.by_step[step] for step in COUNTED))
    return counts[0] - counts[1]
