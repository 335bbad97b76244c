"""A tiny run in a process of its own, which a fault ends or disturbs at a given moment."""

import gc
import json
import math
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

STEPS, ROWS = 8, 4
TIMEOUT = 120.0  # seconds; more is a hang
PHASES = ("forward", "backward", "optimizer", "write", "commit", "rename", "rotation", "evaluation")
START = "start"  # data, model, probes: before the first step
PHASE_BYTES = 16
ROWS_PER_GROUP = 2  # documents: small, so that reading goes on all through the run


@dataclass(frozen=True)
class Fault:
    """`step`: in which it comes, from 1. `share`: where inside the phase, 0 to 1. `action`: `kill` (SIGKILL), `full`
    (no space left on the device), `nan`, or names of signals, one after the other; `group` before them: to all
    processes of its group; `later` between two: as if a person had repeated it. `rank`: of several, the first time
    that they run."""

    phase: str
    step: int
    share: float = 0.0
    action: str = "kill"
    rank: int = 0

    def strike(self) -> None:
        from recipe import errors

        if self.action == "full":
            raise OSError(28, "No space left on device")
        if "STRUCK" in os.environ:
            Path(os.environ["STRUCK"]).touch()
        send = signal.raise_signal
        for name in self.action.split():
            if name == "group":
                send = partial(os.killpg, os.getpgrp())
            elif name == "later":
                errors._last_ending = -math.inf
            else:
                send(signal.SIGKILL if name == "kill" else signal.Signals[name])


def write_setting(folder: Path, **changes) -> Path:
    """Data, tokenizer, model and configuration of the tiny run; returns the configuration's path."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import TokenizersBackend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    TokenizersBackend(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "tokenizer")
    words = random.Random(0)
    texts = [f"<{i}> " + " ".join(f"w{words.randrange(97)}" for _ in range(3 + i * 5 % 23)) for i in range(300)]
    (folder / "data").mkdir()
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts}), folder / "data/a.parquet", row_group_size=ROWS_PER_GROUP, **plain)
    model = {"model_type": "llama", "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model |= {"max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": 256, "bos_token_id": None}
    (folder / "model.json").write_text(json.dumps(model))
    config = {"model_config": str(folder / "model.json"), "tokenizer": str(folder / "tokenizer"), "block_size": 32}
    config |= {"source": str(folder / "data/a.parquet"), "max_steps": STEPS, "eval_skip": 280, "eval_documents": 10}
    config |= {"num_lanes": 4, "per_device_train_batch_size": ROWS, "learning_rate": 0.003, "save_steps": 2}
    config |= {"eval_strategy": "steps", "eval_steps": 4, "dataloader_num_workers": 0, "use_cpu": True}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder / "config.json"


def warm_up() -> None:
    """Import and fill, before the forks, what each of them would take most of a second for."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    import recipe.train  # noqa: F401

    disable_progress_bar()
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)  # compiles the patterns of transformers' renamed weights
    gc.collect()
    gc.freeze()


def in_child(
    action: Callable[[], int | None], log: Path, is_time_to_kill: Callable[[], bool] = lambda: False
) -> int | None:
    """Run `action` in a forked process, so that nothing is imported again. Returns its exit code, negative for a
    signal; None where it hung and was killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = action() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    start = time.monotonic()
    while time.monotonic() - start < TIMEOUT:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if is_time_to_kill():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def train(words: list[str], fault: Fault | None, rows: Path) -> int:
    """The command, in this process. Each batch that is read is added to `rows`."""
    import logging
    import sys

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s | %(message)s")
    record_rows(rows)
    without_samples()
    if fault is not None:
        install(fault)
    from recipe.__main__ import run

    return run(["train", *words])


def record_rows(path: Path) -> None:
    from recipe.data.loader import BatchLoader

    advance, file = BatchLoader._advance, []

    def advance_and_record(self, batch):
        if not file:
            file.append(path.open("a"))
            file[0].write(f"begin {self.position['rows']}\n")
        file[0].write(" ".join(str(row.number) for row in batch) + "\n")
        file[0].flush()
        advance(self, batch)

    BatchLoader._advance = advance_and_record


def without_samples() -> None:
    from recipe.trainer import SampleCallback

    SampleCallback.on_evaluate = lambda *arguments, **known: None


def record_phases(path: Path) -> None:
    """Keep the name of the phase that this process is in, in a file that `phase_in` reads after it was killed."""
    from torch.optim import optimizer

    from recipe import checkpoints, train
    from recipe.data.loader import BatchLoader
    from recipe.trainer import PretrainTrainer

    path.write_bytes(START.encode().ljust(PHASE_BYTES))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), PHASE_BYTES)

    def begin(name: str) -> None:
        memory[:] = name.encode().ljust(PHASE_BYTES)

    def record(owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def recorded(*arguments, **known):
            if phase == "forward" and not is_step(*arguments[:2]):
                return function(*arguments, **known)
            before = memory[:].decode().strip()
            begin(phase)
            try:
                return function(*arguments, **known)
            finally:
                begin("callbacks" if before == START else before)

        setattr(owner, name, recorded)

    record(PretrainTrainer, "training_step", "backward")  # what is not forward of it
    record(PretrainTrainer, "compute_loss", "forward")
    record(PretrainTrainer, "_write_files", "write")
    record(PretrainTrainer, "evaluate", "evaluation")
    record(checkpoints, "commit", "commit")
    record(checkpoints, "rotate", "rotation")
    record(checkpoints.os, "rename", "rename")
    record(BatchLoader, "_read_step", "reading")
    record(train, "conclude", "end")
    optimizer.register_optimizer_step_pre_hook(lambda *known: begin("optimizer"))
    optimizer.register_optimizer_step_post_hook(lambda *known: begin("callbacks"))


def is_step(trainer, model) -> bool:
    """And no evaluation, nor one of the guards' probes, which run on a copy of the trainer."""
    return model.training and "training_step" in vars(trainer)


def phase_in(path: Path) -> str:
    return path.read_bytes().decode().strip() if path.exists() else START


def install(fault: Fault) -> None:
    """Replace, in this process, what the phase runs through."""
    from recipe import checkpoints
    from recipe.trainer import PretrainTrainer

    now = {"step": 0, "calls": 0}
    compute = PretrainTrainer.compute_loss

    def compute_loss(self, model, inputs, *arguments, **known):
        loss = compute(self, model, inputs, *arguments, **known)
        if not is_step(self, model):
            return loss
        now["step"] = self.state.global_step + 1
        if now["step"] == fault.step and fault.phase == "forward":
            if fault.action == "nan":
                return loss * float("nan")
            fault.strike()
        if now["step"] == fault.step and fault.phase == "backward":
            loss.register_hook(lambda gradient: fault.strike())
        return loss

    PretrainTrainer.compute_loss = compute_loss
    {
        "optimizer": _in_optimizer,
        "write": _in_write,
        "commit": _in_commit,
        "rename": _in_rename,
        "rotation": _in_rotation,
        "evaluation": _in_evaluation,
    }.get(fault.phase, lambda *known: None)(fault, now, checkpoints)


def _in_optimizer(fault: Fault, now: dict, checkpoints) -> None:
    from torch.optim import optimizer

    register = (
        optimizer.register_optimizer_step_pre_hook
        if fault.share < 0.5
        else optimizer.register_optimizer_step_post_hook
    )
    register(lambda *arguments: fault.strike() if now["step"] == fault.step else None)


def _in_write(fault: Fault, now: dict, checkpoints) -> None:
    """Half of one of the files that torch writes: arguments, optimizer, scheduler or generators."""
    import torch

    save = torch.save

    def torch_save(value, path, *arguments, **known):
        save(value, path, *arguments, **known)
        if now["step"] >= fault.step:
            now["calls"] += 1
            if now["calls"] == 1 + int(4 * fault.share):
                os.truncate(path, os.path.getsize(path) // 2)
                fault.strike()

    torch.save = torch_save


def _in_commit(fault: Fault, now: dict, checkpoints) -> None:
    sync = checkpoints._sync

    def sync_and_strike(path):
        sync(path)
        if now["step"] >= fault.step:
            now["calls"] += 1
            if now["calls"] == 1 + int(15 * fault.share):
                fault.strike()

    checkpoints._sync = sync_and_strike


def _in_rename(fault: Fault, now: dict, checkpoints) -> None:
    rename = os.rename

    def rename_and_strike(source, target):
        is_hit = now["step"] >= fault.step and not now["calls"]
        now["calls"] += is_hit
        if is_hit and (fault.share < 0.5 or fault.action == "full"):
            fault.strike()
        rename(source, target)
        if is_hit:
            fault.strike()

    checkpoints.os.rename = rename_and_strike


def _in_rotation(fault: Fault, now: dict, checkpoints) -> None:
    remove = checkpoints.shutil.rmtree

    def strike_while_deleting(path, *arguments, **known):
        if now["step"] < fault.step:
            return remove(path, *arguments, **known)
        names = sorted(each for each in Path(path).rglob("*") if each.is_file())
        for name in names[: int(fault.share * len(names))]:
            name.unlink()
        fault.strike()

    checkpoints.shutil.rmtree = strike_while_deleting


def _in_evaluation(fault: Fault, now: dict, checkpoints) -> None:
    from recipe.trainer import PretrainTrainer

    predict = PretrainTrainer.prediction_step

    def prediction_step(self, *arguments, **known):
        now["calls"] += now["step"] >= fault.step
        if now["calls"] == 1 + int(2 * fault.share):
            fault.strike()
        return predict(self, *arguments, **known)

    PretrainTrainer.prediction_step = prediction_step


def parts_of(rows: Path) -> list[tuple[int, list[int]]]:
    """Of each process that wrote to `rows`, the row from which it began and those that it read."""
    parts: list[tuple[int, list[int]]] = []
    for line in rows.read_text().splitlines() if rows.exists() else ():
        if line.startswith("begin "):
            parts.append((int(line.split()[1]), []))
        else:
            parts[-1][1].extend(map(int, line.split()))
    return parts


def wrong_rows(rows: Path, steps: int = STEPS, rows_per_step: int = ROWS, rank: int = 0, ranks: int = 1) -> int:
    """Of one rank, rows that the steps of the finished run did not train on in the canonical order: lost, repeated or
    displaced. Of a process that was killed, what came after the checkpoint that the next one began from does not
    count."""
    history: list[int] = []
    for begin, numbers in parts_of(rows):
        history = history[: begin // ranks] + numbers
    expected = list(range(rank, steps * rows_per_step, ranks))
    return sum(a != b for a, b in zip(history, expected, strict=False)) + abs(len(history) - len(expected))


def steps_again(rows: Path) -> int:
    """Steps whose rows were read once more, after a process had ended in them or after them."""
    parts = parts_of(rows)
    ends = [(numbers[-1] // ROWS + 1) if numbers else begin // ROWS for begin, numbers in parts]
    return sum(end - begin // ROWS for end, (begin, _) in zip(ends, parts[1:], strict=False))


def main() -> None:
    """`FAULT='{"phase": ...}' python -m tests.benchmarks.fault_run train CONFIG ...`, also under torchrun: the
    recipe's command, with a fault on one rank, the first time that it runs."""
    fault = Fault(**json.loads(os.environ["FAULT"]))
    if "ROWS" in os.environ:
        record_rows(Path(f"{os.environ['ROWS']}-{os.environ.get('RANK', '0')}"))
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if is_first and fault.rank == int(os.environ.get("RANK", "0")):
        install(fault)
    elif not is_first and "AGAIN" in os.environ:
        Path(os.environ["AGAIN"]).touch()
    from recipe.__main__ import main as recipe_main

    recipe_main()


if __name__ == "__main__":
    main()
