"""The run as a table of contents: where, data, model, guards, train, results."""

import hashlib
import logging
import signal
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from recipe import model as model_module
from recipe import rundir
from recipe.arguments import Config, format_config
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.loader import BatchLoader
from recipe.data.source import Source, open_source
from recipe.data.stream import HeldOutRows, RowStream, train_and_eval_splits
from recipe.errors import UserError
from recipe.guards import RegressionCallback
from recipe.metrics import NextTokenMetrics, token_byte_lengths
from recipe.report import write_model_card, write_report
from recipe.trainer import (
    PretrainTrainer,
    ProgressBarCallback,
    SampleCallback,
    SignalCallback,
    StreamCallback,
    format_seconds,
    load_position,
)

logger = logging.getLogger(__name__)

GOOD, STOPPED_BY_GUARD = 0, 3
NUM_PROMPTS, PROMPT_TOKENS = 3, 12


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, and the JSON-able summary that is also in `run.json`."""

    code: int
    result: dict
    is_main: bool


@dataclass(frozen=True)
class Data:
    """Everything on the data's way to the model."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    loader: BatchLoader
    collator: DataCollatorForPackedRows
    eval_rows: HeldOutRows
    identity: dict


def run_training(config: Config) -> Outcome:
    """One run from configuration to verdict. Raises `UserError` and `DataError`; everything else is in the outcome."""
    config, output_dir = open_run(config)
    checkpoint = rundir.find_checkpoint(config.training.resume_from_checkpoint, output_dir)
    disable_progress_bar()
    set_seed(config.training.seed)
    data = build_data(config)
    model = model_module.build_model(
        model_config=config.model.model_config,
        model_name_or_path=config.model.model_name_or_path,
        tokenizer=data.tokenizer,
        block_size=config.data.block_size,
        attn_implementation=config.model.attn_implementation,
        document_masking=config.data.document_masking,
    )
    if checkpoint is not None:
        data.loader.position = load_position(checkpoint, data.identity)
    guards = build_guards(config)
    trainer, signals = build_trainer(config, data, model, guards)
    describe_run(config, output_dir, data, model, checkpoint)
    seconds = train(trainer, guards, checkpoint)
    return conclude(config, output_dir, data, trainer, guards, signals, seconds)


# --- where
# -------------------------------------------------------------------------------------------------------------


def open_run(config: Config) -> tuple[Config, Path]:
    """Settle what depends on the machine or the disk: the run directory (the same on every rank), steps,
    compilation."""
    training = config.training
    if training.n_gpu > 1:
        raise UserError(
            f"{training.n_gpu} GPUs and one process: start with torchrun, as run_clm.sh does, or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0"
        )
    is_default = training.output_dir == f"runs/{config.path.stem}"
    chosen = [rundir.choose_output_dir(training.output_dir, is_default, training.resume_from_checkpoint is not None)]
    if training.world_size > 1:
        torch.distributed.broadcast_object_list(chosen)
    if training.torch_compile and (reason := model_module.why_not_compile()):
        logger.warning("torch_compile is on but cannot work here: %s; running uncompiled", reason)
        training = replace_arguments(
            training, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None
        )
    is_pinned = training.device.type == "cuda"  # pinning without an accelerator only warns
    changes = {"output_dir": str(chosen[0]), "max_steps": config.max_steps, "dataloader_pin_memory": is_pinned}
    training = replace_arguments(training, **changes)
    return replace(config, training=training), chosen[0]


def replace_arguments(training, **changes):
    """`dataclasses.replace` for TrainingArguments, whose `__post_init__` must not run twice."""
    for name, value in changes.items():
        setattr(training, name, value)
    return training


# --- data
# --------------------------------------------------------------------------------------------------------------


def build_data(config: Config) -> Data:
    arguments, training = config.data, config.training
    source = open_source(arguments.source, arguments.text_column)
    tokenizer = load_tokenizer(config.model.tokenizer)
    train_split, eval_split = train_and_eval_splits(
        source,
        train_skip=arguments.train_skip,
        train_seed=arguments.train_seed,
        eval_skip=arguments.eval_skip,
        eval_seed=arguments.eval_seed,
        eval_documents=arguments.eval_documents,
    )
    stream = RowStream(
        source,
        train_split,
        tokenizer,
        arguments.block_size,
        arguments.num_lanes,
        rank=training.process_index,
        world_size=training.world_size,
    )
    collator = DataCollatorForPackedRows(tokenizer.eos_token_id, arguments.document_masking)
    loader = BatchLoader(stream, collator, training.per_device_train_batch_size, training.dataloader_num_workers)
    eval_rows = HeldOutRows(source, eval_split, tokenizer, arguments.block_size)
    return Data(source, tokenizer, loader, collator, eval_rows, identity_of(config, source, tokenizer))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer {name!r}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def identity_of(config: Config, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the canonical order depends on: a position in the stream means nothing where any of it differs."""
    keys = ("block_size", "train_seed", "train_skip", "eval_skip", "eval_documents", "num_lanes")
    vocabulary = repr(sorted(tokenizer.get_vocab().items())).encode()
    return {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
        **{key: getattr(config.data, key) for key in keys},
    }


def unigram_entropy(rows: HeldOutRows) -> float:
    """Entropy of the eval tokens' own frequencies, nats: the loss of a model that knows them and nothing of
    context."""
    counts = np.bincount(np.concatenate([row.input_ids for row in rows.rows]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def choose_prompts(rows: HeldOutRows, eos_token_id: int) -> list[list[int]]:
    """The first tokens of a few held-out documents."""
    prompts = []
    for row in rows.rows:
        for start in np.flatnonzero(row.input_ids == eos_token_id) + 1:
            prompt = row.input_ids[start : start + PROMPT_TOKENS].tolist()
            if len(prompt) == PROMPT_TOKENS and eos_token_id not in prompt:
                prompts.append(prompt)
    return prompts[:NUM_PROMPTS] or [rows.rows[0].input_ids[:PROMPT_TOKENS].tolist()]


# --- guards and trainer
# --------------------------------------------------------------------------------------------------


def build_guards(config: Config) -> RegressionCallback:
    return RegressionCallback(
        trajectory=config.guards.trajectory,
        on_regression=config.guards.on_regression,
        disabled_guards=config.guards.disabled_guards,
        facts={
            "source": config.data.source,
            "is_new_model": config.model.model_config is not None,
            "train_tokens": config.max_steps * config.tokens_per_step,
        },
    )


def build_trainer(config: Config, data: Data, model, guards: RegressionCallback):
    metrics = NextTokenMetrics(token_byte_lengths(data.tokenizer))
    signals = SignalCallback(guards)
    prompts = choose_prompts(data.eval_rows, data.tokenizer.eos_token_id)
    trainer = PretrainTrainer(
        model=model,
        args=config.training,
        train_loader=data.loader,
        data_collator=data.collator,
        eval_dataset=data.eval_rows,
        processing_class=data.tokenizer,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        callbacks=[
            guards,
            StreamCallback(data.loader, data.identity, guards),
            SampleCallback(prompts, data.tokenizer, data.source, guards),
            signals,
            ProgressBarCallback(guards),
        ],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer, signals


def describe_run(config: Config, output_dir: Path, data: Data, model, checkpoint: Path | None) -> None:
    """Print what is about to run, and store it in `run.json`."""
    training, source = config.training, data.source
    kernels = model_module.describe_kernels(model, training)
    if not training.should_save:
        return
    first, last = config.data.eval_skip, config.data.eval_skip + config.data.eval_documents - 1
    total = training.max_steps * config.tokens_per_step
    logger.info("configuration %s\n%s", config.path, format_config(config))
    logger.info(
        f"source {source.name}: {source.num_documents:,} documents, {source.num_bytes / 1e6:.1f} MB, fingerprint "
        f"{source.fingerprint[:16]} | eval: documents {first:,} to {last:,}, {len(data.eval_rows):,} rows of "
        f"{config.data.block_size:,} tokens"
    )
    logger.info(
        f"model: {model.num_parameters() / 1e6:.1f}M parameters | {training.max_steps:,} steps of "
        f"{config.tokens_per_step:,} tokens, {total / 1e6:.1f}M in all | {kernels}"
    )
    rundir.write_json(
        output_dir / "run.json",
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "resumed_from": str(checkpoint) if checkpoint else None,
            "config_path": str(config.path),
            "arguments": config.to_dict(),
            **rundir.describe_environment(),
            "device": describe_device(config, kernels),
            "model": {
                "parameters": model.num_parameters(),
                "vocab_size": model.config.vocab_size,
                "block_size": config.data.block_size,
                "flops_per_token": model_module.count_flops_per_token(model, config.data.block_size),
            },
            "source": {
                "name": source.name,
                "documents": source.num_documents,
                "bytes": source.num_bytes,
                "content_hash": source.fingerprint,
            },
            "trajectory": None,
        },
    )


def describe_device(config: Config, kernels: str) -> dict:
    training = config.training
    is_cuda = training.device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} threads",
        "type": training.device.type,
        "count": training.world_size,
        "kernels": kernels,
    }


# --- train
# ---------------------------------------------------------------------------------------------------------------


def train(trainer: PretrainTrainer, guards: RegressionCallback, checkpoint: Path | None) -> float:
    """Run the training; returns its seconds.

    A checkpoint at the last step, of a run killed before its results were written, has nothing left to train; Trainer
    would take one more step.
    """
    start = time.perf_counter()
    if checkpoint is not None and rundir.step_of(checkpoint) >= trainer.args.max_steps:
        logger.info("%s is the end of the run already: nothing left to train", checkpoint)
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state.global_step = rundir.step_of(checkpoint)
        guards.open_files(trainer.args, trainer.state)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return time.perf_counter() - start


# --- results
# -------------------------------------------------------------------------------------------------------------


def conclude(config, output_dir, data, trainer, guards, signals, seconds) -> Outcome:
    """Evaluate, save the model, write report and verdict. An interrupted or stopped run keeps its checkpoint and skips
    the rest."""
    is_whole = signals.received is None and guards.stopped_by is None
    metrics = final_evaluation(trainer) if is_whole else {}
    entropy = unigram_entropy(data.eval_rows)
    if is_whole:
        trainer.save_model(str(output_dir / "final"))
    code = GOOD if is_whole else 128 + signals.received if signals.received else STOPPED_BY_GUARD
    result = {
        "verdict": verdict(guards, signals.received),
        "exit_code": code,
        "steps": trainer.state.global_step,
        "tokens_seen": guards.tokens_seen,
        "train_seconds": round(seconds, 1),
        "passes": data.loader.passes + 1,
        "unigram_entropy": entropy,
        **metrics,
        "guards": {
            "judged": sorted(guards.judged - guards.disabled),
            "cannot_judge": guards.cannot_judge,
            "disabled": sorted(guards.disabled),
        },
    }
    if trainer.is_world_process_zero():
        write_results(config, output_dir, data, guards, result, is_whole)
    return Outcome(code, {"run_dir": str(output_dir), **result}, trainer.is_world_process_zero())


def final_evaluation(trainer: PretrainTrainer) -> dict:
    """The last step's evaluation, run now unless the training ended with it."""
    logged = [
        entry
        for entry in trainer.state.log_history
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step
    ]
    metrics = logged[-1] if logged else trainer.evaluate()
    names = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_next_token_accuracy")
    return {name: metrics[name] for name in names}


def verdict(guards: RegressionCallback, received: int | None) -> str:
    alarms = [finding for finding in guards.findings if finding.severity != "info"]
    if alarms:
        return "not to be trusted: " + ", ".join(dict.fromkeys(finding.id for finding in alarms))
    return f"interrupted by {signal.Signals(received).name}, healthy so far" if received else "healthy"


def write_results(
    config: Config, output_dir: Path, data: Data, guards: RegressionCallback, result: dict, is_whole: bool
) -> None:
    reference = None if guards.reference is None else reference_of(guards)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    rundir.update_json(output_dir / "run.json", {"finished": finished, "trajectory": reference, "result": result})
    report = write_report(output_dir)
    if is_whole:
        data.tokenizer.save_pretrained(output_dir / "final")
        write_model_card(output_dir, output_dir / "final")
    rundir.write_exit(result["exit_code"], result["verdict"], output_dir)
    if "eval_loss" in result:
        logger.info(
            f"eval loss {result['eval_loss']:.4f} nats per token | unigram entropy of the same tokens "
            f"{result['unigram_entropy']:.4f} | bits per byte {result['eval_bits_per_byte']:.4f}"
        )
    if not is_whole:
        again = f"bash run_clm.sh {config.path} --output_dir {output_dir} --resume_from_checkpoint latest"
        logger.info("a checkpoint is saved; to go on: %s", again)
    counts = Counter(finding.severity for finding in guards.findings)
    logger.info(
        f"verdict: {result['verdict']} | {len(result['guards']['judged'])} guards judged, {len(guards.cannot_judge)} "
        f"could not | findings: {counts['error']} errors, {counts['warning']} warnings, {counts['info']} info | "
        f"{guards.tokens_seen:,} tokens in {format_seconds(result['train_seconds'])} | {report}"
    )


def reference_of(guards: RegressionCallback) -> dict:
    """The reference as the report reads it: a step beside each point's tokens."""
    reference = guards.reference
    values = {field.name: getattr(reference, field.name) for field in fields(reference)}
    per_step = guards.facts["tokens_per_step"]
    points = [
        {"tokens": p.tokens, "step": p.tokens // per_step, "loss": p.loss, "low": p.low, "high": p.high}
        for p in reference.points
    ]
    return {**values, "points": points}
