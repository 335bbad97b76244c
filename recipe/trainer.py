"""What the recipe adds to `transformers.Trainer`: its own loader, checkpoints that hold the stream's position,
samples, progress."""

import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from recipe import checkpoints
from recipe.data.files import first_line
from recipe.data.loader import BatchLoader, merge_positions
from recipe.data.source import Source
from recipe.errors import DataError, is_disk_error
from recipe.generate import Sampling, has_finite_logits, sample_tokens
from recipe.guards import RegressionCallback
from recipe.guards.guard import LINE_LENGTH
from recipe.guards.records import append_line, keep_until
from recipe.internals import reset_logged_loss
from recipe.muon import make_muon
from recipe.publish import upload, upload_checkpoint
from recipe.resume import keep_configured, loading
from recipe.rundir import versions, write_json
from recipe.skipping import SkipCallback

logger = logging.getLogger(__name__)
WORDS_CHARS = 1 << 20  # of a text, searched for words at once
SAMPLE_TOKENS = 64  # of each continuation
# Entries that `trainer_state.json` keeps; steps.jsonl and evals.jsonl have all. Of 400,000 each save took 10 s.
LOGGED = 1000
PREFIX, MIN_COLUMNS = "INFO recipe.trainer | ", 100  # of a line of the log


class PretrainTrainer(Trainer):
    """Trainer that reads the recipe's loader directly: the stream, not accelerate, divides the rows over ranks. It
    commits checkpoints whole (`recipe.checkpoints`), with the states of `guards` and `stream` inside.

    `lineage`: the parts of the run, for the manifests. `last_saved`: the last checkpoint of this part, which exists.
    """

    def __init__(
        self, *args, train_loader: BatchLoader, guards: RegressionCallback, stream: "StreamCallback", **kwargs
    ):
        super().__init__(*args, train_dataset=train_loader.dataset, **kwargs)
        self.train_loader, self.guards, self.stream = train_loader, guards, stream
        self.skips = next(each for each in self.callback_handler.callbacks if isinstance(each, SkipCallback))
        self.add_callback(RotationCallback(self))
        train_loader.batches_per_step = self.args.gradient_accumulation_steps
        train_loader.remember(3 * self.args.gradient_accumulation_steps)  # two steps, one of them being prefetched
        self.lineage = checkpoints.begin_part(None)
        self.last_saved: Path | None = None
        self.is_rotation_due = self.args.save_total_limit is not None
        self._saved_step = -1
        self._loss_sum: torch.Tensor | None = None  # of the micro-batches of this step
        self._staging: Path | None = None

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.train_loader.close()

    def get_train_dataloader(self) -> BatchLoader:
        return self.train_loader

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.optim == "muon":
            self.optimizer = make_muon(self.model if model is None else model, self)
        return super().create_optimizer(model)

    @property
    def newest_step(self) -> int:
        """Of the newest checkpoint of the run."""
        return checkpoints.step_of(self.last_saved) if self.last_saved else self.lineage[-1]["step"]

    def save_after_failure(self) -> None:
        """A checkpoint of the last whole step, after the loader raised on all ranks."""
        if self.state.global_step > self.lineage[-1]["step"]:
            self.control.should_training_stop = True
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def push_to_hub(self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs):
        """Uploads the files of a model in `final`, and nothing else of the run directory."""
        return upload(self, Path(self.args.output_dir) / "final", commit_message, blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the folder will be renamed while it is uploaded. `_save_checkpoint` pushes what is committed."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2
        self.skips.total, self._loss_sum = self._loss_sum + whole, None
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with loading(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        """Not of tied weights, which are saved under one of their names."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in named.items() if name not in missing}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if id(named.get(name)) not in loaded]
        super()._issue_warnings_after_load(load_result)

    def _load_rng_state(self, checkpoint):
        with loading(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        configured = [dict(group) for group in self.optimizer.param_groups]
        with loading(checkpoint, "optimizer or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            keep_configured(self.optimizer, self.lr_scheduler, configured, self.state.global_step)

    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        del self.state.log_history[:-LOGGED]
        if not math.isfinite(logs.get("loss", 0.0)):
            reset_logged_loss(self)

    def _save_checkpoint(self, model, trial):
        """On every rank. A disk that fails costs this checkpoint and no other; the training goes on."""
        step = self.state.global_step
        if step == self._saved_step:  # whoever asks again in the same step, such as a stop that arrives while saving
            return
        self._saved_step = step
        self.skips.settle(self.optimizer, self.lr_scheduler)
        self.guards.begin_save(self.control)
        # No step from this state was finite yet. Where the training goes on, there will be a better one.
        self.skips.is_save_due = bool(self.skips.in_a_row)
        if self.skips.is_hopeless or (self.skips.is_save_due and not self.control.should_training_stop):
            if self.is_world_process_zero():
                logger.warning("step %d | no checkpoint: the step was not finite", step)
            return
        if not all(gather_all(is_finite(self.model, self.optimizer))):
            if self.is_world_process_zero():
                logger.error("step %d | no checkpoint: weights or optimizer state are not finite", step)
            return
        staged = checkpoints.staging_of(Path(self.args.output_dir), step)
        problem = failure_of(self._write_files, staged, model, trial)
        problems, positions = zip(*gather_all((problem, self.train_loader.position)), strict=True)
        position = self.stream.agree(positions)
        problem = next(filter(None, problems), None)
        if self.is_world_process_zero():
            problem = problem or failure_of(self._commit, staged, position)
            if problem is not None:
                logger.warning("step %d | no checkpoint, training goes on: %s", step, problem)
                shutil.rmtree(staged, ignore_errors=True)
        if gather_all(problem)[0] is None:
            self.last_saved = Path(self.args.output_dir) / staged.name
            if self.args.push_to_hub:
                upload_checkpoint(self, self.last_saved)

    def _write_files(self, staged: Path, model, trial) -> None:
        staged.mkdir(parents=True, exist_ok=True)
        # Trainer would look for the best checkpoint beside the staged one.
        best, self.state.best_global_step = self.state.best_global_step, None
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.state.best_global_step = None, best
        best_checkpoint = Path(self.args.output_dir) / f"checkpoint-{best}"
        if best and (best == self.state.global_step or best_checkpoint.is_dir()):
            self.state.best_model_checkpoint = str(best_checkpoint)
        if self.is_world_process_zero():
            self.state.save_to_json(str(staged / "trainer_state.json"))
        self.guards.save(staged)

    def _get_output_dir(self, trial):
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _commit(self, staged: Path, position: dict) -> None:
        state = {**self.stream.belongs_to, "position": position}
        state |= {"skipped_steps": self.skips.num_skipped, "last_applied_step": self.skips.last_applied}
        write_json(staged / checkpoints.STREAM_STATE, state)
        checkpoints.commit(staged, self.lineage, versions())
        self.rotate(self.skips.last_applied)

    def rotate(self, applied: int) -> None:
        """Delete checkpoints over the limit, on the main process. `applied`: the last step that was finite."""
        known = (self.args.save_total_limit, self.state.best_model_checkpoint, self.lineage, applied)

        def delete() -> None:
            self.is_rotation_due = checkpoints.rotate(Path(self.args.output_dir), *known)

        if (problem := failure_of(delete)) is not None:
            logger.warning("an older checkpoint could not be deleted: %s", problem)

    def _finalize_training(self, *args):
        # With a limit of 1 Trainer would delete the newest checkpoint where another one is the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit


class RotationCallback(TrainerCallback):
    """Deletes checkpoints that were kept only until a step after a newer one was finite."""

    def __init__(self, trainer: PretrainTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        applied = self.trainer.skips.last_applied
        if state.is_world_process_zero and self.trainer.is_rotation_due and applied > self.trainer.newest_step:
            self.trainer.is_rotation_due = False  # a disk that fails is not asked in each step
            self.trainer.rotate(applied)


def gather_all(value) -> list:
    """The value of each rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether all weights and the optimizer's state on this rank are. Waits for the device."""
    tensors = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    tensors = [value.detach() for value in tensors if isinstance(value, torch.Tensor) and value.is_floating_point()]
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    return bool(torch.stack([value.isfinite().all().to(tensors[0].device) for value in tensors]).all())


def failure_of(write: Callable, *arguments) -> str | None:
    """What the disk said; other errors are raised."""
    try:
        write(*arguments)
        return None
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_error(error):
            raise
        return first_line(error)


# --- the stream's position


class StreamCallback(TrainerCallback):
    """The stream's position for checkpoints. Announces the end of each source's first pass once: when a lane of this
    rank wraps, or at the next checkpoint if it was a lane of another rank."""

    def __init__(self, loader: BatchLoader, belongs_to: dict, guards: RegressionCallback):
        self.loader = loader
        self.belongs_to = belongs_to  # what is saved with the position, for `recipe.resume`
        self.guards = guards

    def agree(self, positions: Sequence[dict]) -> dict:
        """One position from those of all ranks."""
        position = merge_positions(positions, len(positions)) if len(positions) > 1 else positions[0]
        self._announce(position)
        return position

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


# --- samples


class SampleCallback(TrainerCallback):
    """A few continuations of held-out text at each evaluation, with the share of their words that the source has."""

    def __init__(self, prompts: list[list[int]], tokenizer, sources: Sequence[Source], guards: RegressionCallback):
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.sources = sources
        self.guards = guards
        self._known_words: set[str] | None = None
        self._last_step = -1

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            keep_until(Path(args.output_dir) / "samples.jsonl", state.global_step or -1)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero or state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        if self._known_words is None:
            try:
                self._known_words = words_of_sources(self.sources, self.tokenizer)
            except DataError as error:  # the training may need none of these chunks
                logger.warning("step %d | words are not compared with the source: %s", state.global_step, error)
        if not has_finite_logits(model, self.prompts[0]):
            logger.warning("step %d | no sample: the model's logits are not finite", state.global_step)
            return
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf  # learned ones have no more
        for number, prompt in enumerate(self.prompts):
            count = max(1, min(SAMPLE_TOKENS, longest - len(prompt)))
            ids = sample_tokens(model, self.tokenizer, prompt, Sampling(count, seed=args.seed + number))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            record = {
                "step": state.global_step,
                "tokens_seen": self.guards.tokens_seen,
                "prompt": self.tokenizer.decode(prompt),
                "text": text,
                "words_in_corpus": share_of_known_words(text, self._known_words),
            }
            append_line(Path(args.output_dir) / "samples.jsonl", record)
        logger.info("%s", sample_line(record))


def sample_line(record: dict) -> str:
    """One line of a log, of a terminal if it is wide enough; `samples.jsonl` has all of it."""
    share = record["words_in_corpus"]
    known = "" if share is None else f" ({share:.0%} of its words occur in the corpus)"
    head, columns = f"step {record['step']} | sample: ", LINE_LENGTH
    if sys.stderr.isatty():
        columns = max(MIN_COLUMNS, min(LINE_LENGTH, shutil.get_terminal_size().columns - 1))
    text = " ".join(f"{record['prompt']} >> {record['text']}".split())
    text = "".join(char if char.isprintable() else "\ufffd" for char in text)  # no escape codes for the terminal
    room = columns - len(PREFIX) - len(head) - len(known)
    return head + (text if len(text) <= room else f"{text[: room - 1]}…") + known


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]{2,}", text.lower())


def words_of_sources(sources: Sequence[Source], tokenizer, max_bytes: int = 1 << 25) -> set[str]:
    """Distinct words in the first 32 MB of the sources, equal amounts of each."""
    words = set()
    for source in sources:
        size = 0
        for chunk in source.chunks:
            for content in source.read_chunk(chunk):
                text = content if isinstance(content, str) else tokenizer.decode(content.ids)
                for start in range(0, len(text), WORDS_CHARS):
                    words.update(words_of(text[start : start + WORDS_CHARS]))
            size += chunk.num_bytes
            if size >= max_bytes / len(sources):
                break
    return words


def share_of_known_words(text: str, known: set[str] | None) -> float | None:
    """Share of the words in `text` that are in `known`, None without words. The first and last word may be cut."""
    words = words_of(text)[1:-1]
    return sum(word in known for word in words) / len(words) if words and known is not None else None
