"""The run as a table of contents: run directory, data, model, guards, training, results."""

import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from recipe import checkpoints, rundir
from recipe.announce import FirstStepsCallback, announce_data, announce_run, announce_training
from recipe.arguments import Config
from recipe.data.loader import start_server
from recipe.data.pipeline import Data, build_data
from recipe.data.stream import HeldOutRows
from recipe.errors import DataError, UserError, exit_code_of, is_disk_error, message_of
from recipe.guards import RegressionCallback
from recipe.guards.checkpoint import restore_findings
from recipe.guards.trackers import contain
from recipe.guards.trajectory import load_reference
from recipe.internals import load_weights
from recipe.memory import check_fits
from recipe.metrics import NextTokenMetrics, token_byte_lengths
from recipe.model import agree_on_tf32, build_model, choose_attention, read_model_config, why_not_compile
from recipe.progress import ProgressBarCallback
from recipe.publish import check_login
from recipe.redact import redact_all
from recipe.results import Outcome, conclude, describe_run
from recipe.resume import check_readable, check_settings, load_position, loading, read_stream_state, settings_of
from recipe.signals import SignalCallback
from recipe.skipping import SkipCallback
from recipe.trainer import PretrainTrainer, SampleCallback, StreamCallback, gather_all

logger = logging.getLogger(__name__)

NUM_PROMPTS, PROMPT_TOKENS = 3, 12


def run_training(config: Config) -> Outcome:
    """One run from configuration to verdict. Raises `UserError` and `DataError`; all else is in the outcome."""
    output_dir = open_run(config)
    with rundir.claim(output_dir, config.training.process_index):
        return run_claimed(config, output_dir)


def run_claimed(config: Config, output_dir: Path) -> Outcome:
    is_main = config.training.process_index == 0
    if is_main and (left := checkpoints.clean(output_dir)):
        logger.warning("removed what a killed run left half written or half deleted: %s", ", ".join(left))
    try:
        run = assemble(config, output_dir)
    except BaseException as error:  # run.json is still that of the run which is to be resumed
        rundir.write_exit(exit_code_of(error), message_of(error), output_dir)
        raise
    data, guards, trainer = run.data, run.guards, run.trainer
    trainer.lineage = checkpoints.begin_part(run.checkpoint)
    describe_run(config, output_dir, data, trainer.model, run.checkpoint, trainer.lineage)
    first = trainer.lineage[-1]["step"]
    if is_main:
        announce_run(config, None if run.checkpoint else output_dir)
        announce_training(config)
    if is_main and (moved := checkpoints.abandon(output_dir, first)):
        logger.warning("the run goes on from step %d; its later checkpoints are now %s", first, ", ".join(moved))
    try:
        seconds = train(trainer, guards, run.checkpoint)
        return conclude(config, output_dir, data, trainer, guards, run.signals, seconds)
    except BaseException as error:
        failure = error
        if is_disk_error(error):  # which seldom says whose
            places = f"output_dir is {output_dir}, temporary files are in {tempfile.gettempdir()}"
            failure = DataError(f"{message_of(error)} ({places})")
        if isinstance(failure, DataError) and (last := checkpoints.newest_whole(output_dir)):
            failure.args = (f"{message_of(failure)}; --resume_from_checkpoint latest then continues from {last.name}",)
        rundir.write_failure(exit_code_of(failure), message_of(failure), output_dir)
        if failure is not error:
            raise failure from error
        raise


@dataclass(frozen=True)
class Assembled:
    """A run that is ready to start. `checkpoint`: the one to resume from."""

    data: Data
    guards: RegressionCallback
    trainer: PretrainTrainer
    signals: SignalCallback
    checkpoint: Path | None


def assemble(config: Config, output_dir: Path) -> Assembled:
    """Data, model, guards and trainer, at the position of the checkpoint if there is one."""
    checkpoint = choose_checkpoint(config, output_dir)
    if checkpoint is not None:
        check_readable(checkpoint, config.max_steps)
    disable_progress_bar()
    set_seed(config.training.seed)
    attention = choose_attention(config.model.attn_implementation, config.data.document_masking)
    check_fits(
        read_model_config(config.model.model_config, config.model.model_name_or_path),
        str(getattr(config.training.optim, "value", config.training.optim)),
        config.training.device,
    )
    if config.training.dataloader_num_workers:
        start_server()
    if config.training.process_index == 0:
        announce_data(config)
    data = build_data(config, flash_attention=attention.startswith("flash"))
    model = build_model(
        model_config=config.model.model_config,
        model_name_or_path=config.model.model_name_or_path,
        tokenizer=data.tokenizer,
        block_size=config.data.block_size,
        attn_implementation=config.model.attn_implementation,
        document_masking=config.data.document_masking,
    )
    settings = settings_of(config, model, data.tokenizer)
    if checkpoint is not None:
        check_settings(checkpoint, settings, config.data.allow_change)
        with loading(checkpoint, "stream_state.json"):
            data.loader.position = load_position(
                checkpoint,
                data.identity,
                start=data.loader.dataset.start(),
                on_changed_stream=config.data.on_changed_stream,
                allow_change=config.data.allow_change,
            )
    guards = build_guards(config)
    guards.documents_of = data.loader.documents_of
    stream = StreamCallback(data.loader, {"identity": data.identity, **settings}, guards)
    trainer, signals = build_trainer(config, data, model, guards, stream)
    if checkpoint is not None:
        saved, step = read_stream_state(checkpoint), checkpoints.step_of(checkpoint)
        trainer.skips.resume(step, saved["skipped_steps"], saved.get("last_applied_step", step))
    return Assembled(data, guards, trainer, signals, checkpoint)


def choose_checkpoint(config: Config, output_dir: Path) -> Path | None:
    """As rank 0 does, which alone reads the files."""
    chosen = problem = None
    if config.training.process_index == 0:
        try:
            chosen = checkpoints.choose(config.training.resume_from_checkpoint, output_dir)
        except UserError as error:
            problem = str(error)
    chosen, problem = gather_all((chosen, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return chosen


# --- the run directory


def open_run(config: Config) -> Path:
    """Decide what depends on machine or disk: compilation, steps, the run directory (the same on every rank)."""
    training = config.training
    if training.n_gpu > 1:
        raise UserError(
            f"{training.n_gpu} GPUs and one process: start with torchrun, as run_clm.sh does, or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if training.world_size != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError("several processes were started, but this machine has no GPU for them; add --use_cpu true")
    if config.guards.trajectory not in ("auto", "none"):
        load_reference(config.guards.trajectory)  # report a bad file now, not when the training starts
    if training.push_to_hub and training.process_index == 0:
        check_login(training.hub_token)
    is_default = training.output_dir == f"runs/{config.path.stem}"
    chosen = [rundir.choose_output_dir(training.output_dir, is_default, training.resume_from_checkpoint)]
    if training.world_size > 1:
        torch.distributed.broadcast_object_list(chosen)
    if training.torch_compile and (reason := why_not_compile()):
        logger.warning("torch_compile is on but does not work here: %s; running uncompiled", reason)
        training.torch_compile, training.torch_compile_backend, training.torch_compile_mode = False, None, None
    # Set in place: `dataclasses.replace` would run TrainingArguments' `__post_init__` a second time.
    training.output_dir, training.max_steps = str(chosen[0]), config.max_steps
    if training.hub_token is not None:  # TrainingArguments are saved with the model
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    training.dataloader_pin_memory = training.device.type == "cuda"  # without CUDA it only causes a warning
    if training.device.type == "cuda":
        agree_on_tf32()
    return chosen[0]


def choose_prompts(rows: HeldOutRows, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The first whole words of a few held-out documents, preferring those that start with prose rather than code."""
    prompts = []
    for row in rows.rows:
        for start in np.flatnonzero(row.input_ids == tokenizer.eos_token_id) + 1:
            prompt = row.input_ids[start : start + PROMPT_TOKENS + 1].tolist()
            if len(prompt) > PROMPT_TOKENS and tokenizer.eos_token_id not in prompt:
                prompts.append(_whole_words(prompt, tokenizer))
    prose = [prompt for prompt in prompts if prompt and _is_prose(tokenizer.decode(prompt))]
    return prose[:NUM_PROMPTS] or [rows.rows[0].input_ids[:PROMPT_TOKENS].tolist()]


def _whole_words(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut before a token that begins a word, with a space: \u2581 in SentencePiece, \u0120 in byte-level pieces."""
    begins_word = [piece[0] in "\u2581\u0120" for piece in tokenizer.convert_ids_to_tokens(prompt)]
    return prompt[: max((place for place, begins in enumerate(begins_word) if begins), default=0)]


def _is_prose(text: str) -> bool:
    return sum(char.isalpha() or char == " " for char in text) > 0.9 * len(text)


# --- guards and trainer


def build_guards(config: Config) -> RegressionCallback:
    guards = RegressionCallback(
        trajectory=config.guards.trajectory,
        on_regression=config.guards.on_regression,
        disabled_guards=config.guards.disabled_guards,
        facts={
            "source": redact_all(config.data.source),
            "is_new_model": config.model.model_config is not None,
            "train_tokens": config.max_steps * config.tokens_per_step,
        },
    )
    guards.is_saved_by_trainer = True
    return guards


def build_trainer(config: Config, data: Data, model, guards: RegressionCallback, stream: StreamCallback):
    metrics = NextTokenMetrics(token_byte_lengths(data.tokenizer))
    signals = SignalCallback()
    prompts = choose_prompts(data.eval_rows, data.tokenizer)
    trainer = PretrainTrainer(
        model=model,
        args=config.training,
        train_loader=data.loader,
        guards=guards,
        stream=stream,
        data_collator=data.collator,
        eval_dataset=data.eval_rows,
        processing_class=data.tokenizer,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        callbacks=[
            SkipCallback(),
            stream,  # a pass that has begun is known before its step is judged
            guards,
            SampleCallback(prompts, data.tokenizer, data.sources, guards),
            signals,
            ProgressBarCallback(guards),
            FirstStepsCallback(),
        ],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    contain(trainer)
    return trainer, signals


def train(trainer: PretrainTrainer, guards: RegressionCallback, checkpoint: Path | None) -> float:
    """Run the training; returns its seconds.

    A checkpoint at the last step, of a run killed before its results were written, needs no training; Trainer would
    take one more step.
    """
    start = time.perf_counter()
    if checkpoint is not None and checkpoints.step_of(checkpoint) >= trainer.args.max_steps:
        if trainer.is_fsdp_enabled:  # accelerate shards a model together with its optimizer only
            raise UserError(
                f"{checkpoint} is at the last step, and a sharded model is evaluated in a training only; "
                "give more --max_steps"
            )
        logger.info("%s is at the last step: nothing left to train", checkpoint)
        load_weights(trainer, str(checkpoint))
        trainer.state.global_step = checkpoints.step_of(checkpoint)
        guards.open_files(trainer.args, trainer.state)
        if guards.is_main:
            restore_findings(guards.reporter, checkpoint)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (DataError, UserError):  # raised on every rank, see `BatchLoader`
            trainer.save_after_failure()
            raise
    return time.perf_counter() - start
