"""What the recipe adds to `transformers.Trainer`: its own loader, checkpoints that hold the stream's position,
samples, progress."""

import contextlib
import json
import logging
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from recipe.data.loader import BatchLoader, merge_positions
from recipe.data.source import Source
from recipe.errors import UserError
from recipe.guards import RegressionCallback
from recipe.guards.records import append_line, keep_until
from recipe.rundir import STREAM_STATE, read_stream_state, write_json

logger = logging.getLogger(__name__)


class PretrainTrainer(Trainer):
    """Trainer that reads the recipe's loader directly: the stream, not accelerate, divides the rows over ranks."""

    def __init__(self, *args, train_loader: BatchLoader, **kwargs):
        super().__init__(*args, train_dataset=train_loader.dataset, **kwargs)
        self.train_loader = train_loader

    def get_train_dataloader(self) -> BatchLoader:
        return self.train_loader

    def _save_checkpoint(self, model, trial):
        # Trainer would delete older checkpoints now; `StreamCallback` does so once this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit


# --- the stream's position


class StreamCallback(TrainerCallback):
    """Saves the stream's position as the last file of each checkpoint, then deletes those over `save_total_limit`.

    Announces the end of each source's first pass once: when a lane of this rank wraps, or at the next checkpoint if it
    was a lane of another rank.
    """

    def __init__(self, loader: BatchLoader, identity: dict, settings: dict, guards: RegressionCallback):
        self.loader = loader
        self.belongs_to = {"identity": identity, "settings": settings}
        self.guards = guards

    def on_save(self, args, state, control, **kwargs):
        position = self.loader.position
        if args.world_size > 1:
            positions = [None] * args.world_size
            torch.distributed.all_gather_object(positions, position)
            position = merge_positions(positions, args.world_size)
        self._announce(position)
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / STREAM_STATE, {**self.belongs_to, "position": position})
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)

    def on_step_end(self, args, state, control, **kwargs):
        self._announce(self.loader.position)

    def _announce(self, position: dict) -> None:
        for number, lanes in enumerate(position["lanes"]):
            if not self.loader.position["is_exhausted"][number] and any(lane["pass"] > 0 for lane in lanes):
                self.loader.position["is_exhausted"][number] = position["is_exhausted"][number] = True
                self._announce_pass(number)

    def _announce_pass(self, number: int) -> None:
        source = self.loader.dataset.parts[number].source
        tokens = self.loader.position["rows_by_source"][number] * self.loader.dataset.block_size
        self.guards.begin_pass(
            tokens,
            source.name,
            f"{source.name}: pass 2 begins after {tokens:,} tokens, since the first lane has read its share of "
            f"{source.num_documents:,} documents; documents repeat from here on, in a new order",
        )


def load_position(checkpoint: Path, identity: dict, settings: dict, start: dict, on_changed_stream: str) -> dict:
    """The position to resume from: the one saved in a checkpoint, or `start` for `on_changed_stream` "restart".

    Raises `UserError` with the differences where it belongs to another stream and `on_changed_stream` is "refuse", or
    where settings differ that the checkpoint restores.
    """
    saved = read_stream_state(checkpoint)
    if saved is None or saved["position"].keys() != start.keys():
        raise UserError(f"{checkpoint / STREAM_STATE} is damaged; resume from another checkpoint, or latest")
    if differences := _differences(saved["settings"], settings):
        raise UserError(
            f"{checkpoint} restores these settings, so other values would be ignored:{differences}\n  restore the old "
            f"values, or start a new run from its weights: --model_name_or_path {checkpoint}"
        )
    position, differences = saved["position"], _differences(saved["identity"], identity)
    touched = [line for line in differences.splitlines() if ".modified:" in line]
    if touched and len(touched) == differences.count("\n"):  # copied, or touched
        logger.warning("files have another date than in %s; size and what was hashed are the same", checkpoint)
        return position
    if not differences:
        return position
    if on_changed_stream == "refuse":
        raise UserError(
            f"{checkpoint} was made on another stream, so its position is not valid here:{differences}\n  undo the "
            "change; or add --on_changed_stream continue (keep the position) or restart (from the new stream's start)"
        )
    logger.warning("%s was made on another stream:%s\n  %s", checkpoint, differences, CHANGED[on_changed_stream])
    if on_changed_stream == "restart":
        return start
    shapes = [[len(lanes) for lanes in where["lanes"]] for where in (position, start)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{checkpoint} has {shapes[0]} lanes by source, the config {shapes[1]}: no position can be kept; use "
            "--on_changed_stream restart"
        )
    return position


CHANGED = {
    "continue": "continuing at its position anyway: documents may be missed or read twice",
    "restart": "reading the new stream from its start",
}


def _differences(saved: dict, wanted: dict, inside: str = "") -> str:
    """A line for each value that differs, named by the keys that lead to it."""
    lines = ""
    for name in dict.fromkeys([*saved, *wanted]):
        before, after = saved.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _differences(before, after, f"{inside}{name}.")
        elif before != after:
            lines += f"\n  {inside}{name}: checkpoint {_shown(before)}, config {_shown(after)}"
    return lines


def _shown(value) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (dict, list)) else str(value)


# --- samples


class SampleCallback(TrainerCallback):
    """A few continuations of held-out text at each evaluation, with the share of their words that the source has."""

    def __init__(
        self, prompts: list[list[int]], tokenizer, sources: Sequence[Source], guards: RegressionCallback, new_tokens=64
    ):
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.sources = sources
        self.guards = guards
        self.new_tokens = new_tokens
        self._known_words: set[str] | None = None
        self._last_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_until(Path(args.output_dir) / "samples.jsonl", state.global_step or -1)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero or state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        self._known_words = self._known_words or words_of_sources(self.sources, self.tokenizer)
        if not has_finite_logits(model, self.prompts[0]):
            logger.warning("step %d | no sample: the model's logits are not finite", state.global_step)
            return
        for number, prompt in enumerate(self.prompts):
            text = generate(model, self.tokenizer, prompt, self.new_tokens, seed=args.seed + number)
            record = {
                "step": state.global_step,
                "tokens_seen": self.guards.tokens_seen,
                "prompt": self.tokenizer.decode(prompt),
                "text": text,
                "words_in_corpus": share_of_known_words(text, self._known_words),
            }
            append_line(Path(args.output_dir) / "samples.jsonl", record)
        share = record["words_in_corpus"]
        known = "" if share is None else f" ({share:.0%} of its words occur in the corpus)"
        sample = " ".join(f"{record['prompt']} >> {text}".split())
        logger.info("step %d | sample: %.85s%s", state.global_step, sample, known)  # samples.jsonl has all of it


def has_finite_logits(model, prompt: list[int]) -> bool:
    """Can the model be sampled from? Leaves its mode as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits
    model.train(was_training)
    return bool(logits.isfinite().all())


def generate(model, tokenizer, prompt: list[int], new_tokens: int, seed: int) -> str:
    """Sample a continuation (temperature 0.7, nucleus 0.95), keeping the generators and the model's mode unchanged."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        input_ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
            use_cache=True,
            remove_invalid_values=True,  # NaN at a later position would end the run in an error of the sampling
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{2,}", text.lower())


def words_of_sources(sources: Sequence[Source], tokenizer, max_bytes: int = 1 << 25) -> set[str]:
    """Distinct words in the first 32 MB of the sources, equal amounts of each."""
    words = set()
    for source in sources:
        size = 0
        for chunk in source.chunks:
            for content in source.read_chunk(chunk):
                words.update(words_of(content if isinstance(content, str) else tokenizer.decode(content.ids)))
            size += chunk.num_bytes
            if size >= max_bytes / len(sources):
                break
    return words


def share_of_known_words(text: str, known: set[str]) -> float | None:
    """Share of the words in `text` that are in `known`, None without words. The first and last word may be cut."""
    words = words_of(text)[1:-1]
    return sum(word in known for word in words) / len(words) if words else None


# --- signals and progress


class SignalCallback(TrainerCallback):
    """SIGINT and SIGTERM end the training after this step, with a checkpoint; a second one ends it immediately."""

    def __init__(self, guards: RegressionCallback):
        self.guards = guards
        self.received: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        logger.warning(
            "%s: saving a checkpoint after this step; repeat it to end immediately", signal.Signals(number).name
        )
        self.guards.ask_to_stop()


class ProgressBarCallback(TrainerCallback):
    """A bar with loss, tokens/s and ETA on a terminal; elsewhere a line per logged step."""

    def __init__(self, guards: RegressionCallback):
        self.guards = guards
        self._bar = None
        self._redirection = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
            self._redirection.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not into it

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
            if self.guards.history:
                now = self.guards.history[-1]
                self._bar.set_postfix_str(f"loss {now['loss']:.3f}, {now['tokens_per_second']:,.0f} tokens/s")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self._bar is not None or "loss" not in (logs or {}):
            return
        done = state.global_step - self._first
        seconds = time.perf_counter() - self._start
        left = seconds / max(1, done) * (state.max_steps - state.global_step)
        rate = self.guards.history[-1]["tokens_per_second"] if self.guards.history else 0
        logger.info(
            f"step {state.global_step} of {state.max_steps} | loss {logs['loss']:.3f} | learning rate "
            f"{logs['learning_rate']:.2e} | {rate:,.0f} tokens/s | {format_seconds(left)} left"
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero and metrics:
            parts = [
                f"{name.removeprefix('eval_').replace('_', ' ')} {metrics[name]:.4f}"
                for name in EVAL_METRICS
                if name in metrics
            ]
            logger.info("step %d | eval | %s", state.global_step, " | ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._redirection.close()


EVAL_METRICS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_next_token_accuracy")


def format_seconds(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
