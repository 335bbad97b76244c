"""What a run writes: `run.json` when it starts; verdict, final model and report when it ends."""

import json
import logging
import math
import shlex
import shutil
import signal
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from recipe import checkpoints, rundir
from recipe.arguments import Config, format_config
from recipe.data.loader import count_bad, whole_position
from recipe.data.pipeline import Data, unigram_entropy
from recipe.data.source import counted
from recipe.data.stream import Part
from recipe.guards import GUARDS, RegressionCallback
from recipe.guards.guard import shorten
from recipe.internals import save_whole_model
from recipe.model import count_flops_per_token, describe_device, describe_kernels
from recipe.model_card import write_model_card
from recipe.next_steps import next_commands
from recipe.progress import format_seconds
from recipe.report import write_report
from recipe.signals import SignalCallback
from recipe.trainer import PretrainTrainer
from recipe.verdict import Verdict, describe_guards, verdict

logger = logging.getLogger(__name__)

GOOD, STOPPED_BY_GUARD = 0, 3
CHANGE = "lower learning_rate (--allow_change learning_rate) or drop the documents that the finding names"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, and the JSON-able summary that is also in `run.json`."""

    code: int
    result: dict
    is_main: bool


def say_sources(data: Data) -> None:
    for part in data.loader.dataset.parts:
        source = part.source
        share = part.weight / sum(data.loader.dataset.weights)
        documents = counted(source.num_divided or source.num_documents, "document")
        if source.num_divided not in (0, source.num_documents):
            documents += f", divided into {source.num_documents:,} pieces"
        rows = f" | {share:.0%} of the rows" if share < 1 else ""
        logger.info(
            f"source {source.name}: {documents}, {source.num_bytes / 1e6:.2g} MB, fingerprint "
            f"{source.fingerprint[:16]}{rows} | held out: {describe_hold_out(part)}"
        )


def describe_run(
    config: Config, output_dir: Path, data: Data, model, checkpoint: Path | None, lineage: list[dict]
) -> None:
    """Log what will run, and store it in `run.json`."""
    training = config.training
    kernels = describe_kernels(model, training)
    if not training.should_save:
        return
    total = training.max_steps * config.tokens_per_step
    logger.info("configuration %s\n%s", config.path, format_config(config))
    say_sources(data)
    lanes = counted(data.loader.dataset.num_lanes, "lane")
    logger.info(f"eval: {counted(len(data.eval_rows), 'row')} of {config.data.block_size:,} tokens | {lanes}")
    logger.info(
        f"model: {model.num_parameters() / 1e6:.1f}M parameters | {training.max_steps:,} steps of "
        f"{config.tokens_per_step:,} tokens, {total:,} in all | {kernels}"
    )
    environment = rundir.describe_environment()
    if environment["is_dirty"]:
        logger.info("the code of the recipe was changed and not committed, so no reference can come from this run")
    rundir.write_json(
        output_dir / "run.json",
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": None,
            "resumed_from": str(checkpoint) if checkpoint else None,
            "lineage": lineage,
            "config_path": str(config.path),
            "arguments": config.to_dict(),
            **environment,
            "device": describe_device(training, kernels),
            "model": {
                "parameters": model.num_parameters(),
                "vocab_size": model.config.vocab_size,
                "block_size": config.data.block_size,
                "flops_per_token": count_flops_per_token(model, config.data.block_size),
            },
            "source": describe_sources(data),
            "trajectory": None,
        },
    )


def describe_hold_out(part: Part) -> str:
    """By the documents of the files; by its share of the text where these were divided."""
    source, (first, stop) = part.source, part.split.hold_out
    if source.num_divided not in (0, source.num_documents):
        size = sum(chunk.num_bytes for chunk in source.chunks[first:stop])
        return f"{'the last ' * (stop == source.num_documents)}{size / source.num_bytes:.1%} of the text"
    return f"documents {first:,} to {stop - 1:,}" if stop - first > 1 else f"document {first:,}"


def describe_sources(data: Data) -> dict:
    """The mixture as one source, for reference and report, and each of its parts."""
    parts = [
        {
            "name": part.source.name,
            "weight": part.weight,
            "documents": part.source.num_divided or part.source.num_documents,
            "bytes": part.source.num_bytes,
            "content_hash": part.source.fingerprint,
        }
        for part in data.loader.dataset.parts
    ]
    return {
        "name": " + ".join(part["name"] for part in parts),
        "documents": sum(part["documents"] for part in parts),
        "bytes": sum(part["bytes"] for part in parts),
        "content_hash": "+".join(part["content_hash"] for part in parts),
        "parts": parts,
        "num_lanes": data.loader.dataset.num_lanes,
    }


def conclude(
    config: Config,
    output_dir: Path,
    data: Data,
    trainer: PretrainTrainer,
    guards: RegressionCallback,
    signals: SignalCallback,
    seconds: float,
) -> Outcome:
    """Evaluate, save the model, write report and verdict. An interrupted or stopped run only keeps its checkpoint."""
    is_hopeless = trainer.skips.is_hopeless
    is_whole = signals.agreed is None and guards.stopped_by is None and not is_hopeless
    metrics = final_evaluation(trainer) if is_whole else {}
    entropy = unigram_entropy(data.eval_rows)
    if is_whole:
        save_whole_model(trainer, str(output_dir / "final"))  # `write_results` uploads it with its card
    received = signal.Signals(signals.agreed).name if signals.agreed else None
    judged = verdict(guards, received, metrics.get("eval_loss"), entropy)
    code = GOOD if is_whole else 128 + signals.agreed if signals.agreed else STOPPED_BY_GUARD
    result = {
        "verdict": judged.text,
        "verdict_kind": judged.kind,
        "exit_code": code,
        "steps": trainer.state.global_step,
        "tokens_seen": guards.tokens_seen,
        "skipped_steps": trainer.skips.num_skipped,
        "train_seconds": round(seconds, 1),
        "passes": 1 + max(data.loader.passes(number) for number in range(len(data.sources))),
        "tokens_by_source": {
            source.name: rows * config.data.block_size
            for source, rows in zip(data.sources, data.loader.position["rows_by_source"], strict=True)
        },
        "bad_documents_skipped": count_bad(whole_position(data.loader.position, config.training.world_size)),
        "unigram_entropy": entropy,
        **metrics,
        "guards": describe_guards(guards),
    }
    if trainer.is_world_process_zero():
        if not is_whole:
            say_how_to_continue(config, output_dir, trainer)
        elif trainer.is_rotation_due and trainer.last_saved and math.isfinite(metrics["eval_loss"]):
            trainer.rotate(result["steps"] + 1)  # the last checkpoint is good
        write_results(config, output_dir, data, guards, result, is_whole)
        if is_whole and config.training.push_to_hub:
            trainer.push_to_hub()
    if config.training.world_size > 1:
        torch.distributed.barrier()  # if a rank exits with 3, torchrun kills rank 0 while it writes the results
    return Outcome(code, {"run_dir": str(output_dir), **result}, trainer.is_world_process_zero())


def final_evaluation(trainer: PretrainTrainer) -> dict:
    """The last step's evaluation, run now unless the training ended with it."""
    last = trainer.state.global_step
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == last]
    metrics = logged[-1] if logged else trainer.evaluate()
    names = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_next_token_accuracy")
    return {name: metrics[name] for name in names}


def write_results(
    config: Config, output_dir: Path, data: Data, guards: RegressionCallback, result: dict, is_whole: bool
) -> None:
    reference = guards.reference and asdict(guards.reference)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    rundir.update_json(output_dir / "run.json", {"finished": finished, "trajectory": reference, "result": result})
    report = write_report(output_dir)
    if is_whole:
        save_tokenizer(data.tokenizer, config.model.tokenizer, output_dir / "final")
        write_model_card(output_dir, output_dir / "final")
    rundir.write_exit(result["exit_code"], result["verdict"], output_dir)
    if "eval_loss" in result:
        logger.info(
            f"eval loss {result['eval_loss']:.4f} nats per token | unigram entropy of the same tokens "
            f"{result['unigram_entropy']:.4f} | bits per byte {result['eval_bits_per_byte']:.4f}"
        )
    curves = {name for guard in GUARDS if guard.judges_curve for name in guard.ids}
    is_judged = curves & set(result["guards"]["judged"])
    unjudged = "" if is_judged else " (the loss curve was not judged)"
    counts = Counter(finding.severity for finding in guards.findings)
    words = ", ".join(counted(counts[name], name) for name in ("error", "warning")) + f", {counts['info']} info"
    logger.info(
        shorten(f"verdict: {result['verdict']}{unjudged}"),
        extra={"colour": Verdict(result["verdict_kind"], result["verdict"]).colour},
    )
    num_judged, num_unjudged = len(result["guards"]["judged"]), len(guards.cannot_judge)
    logger.info(
        f"{num_judged} guards judged, {num_unjudged} could not | findings: {words} | "
        f"{guards.tokens_seen:,} tokens in {format_seconds(result['train_seconds'])}"
    )
    logger.info(f"report: {report}")
    if is_whole:
        logger.info("what you can do now:\n  %s", "\n  ".join(next_commands(output_dir)))


def save_tokenizer(tokenizer, name: str, folder: Path) -> None:
    """With what transformers leaves out and llama.cpp's converter needs, where the tokenizer came from a folder that
    has it: SentencePiece's file, for the scores of the pieces, and whether texts begin with BOS."""
    tokenizer.save_pretrained(folder)
    pieces, config = Path(name) / "tokenizer.model", Path(name) / "tokenizer_config.json"
    if pieces.is_file():
        shutil.copyfile(pieces, folder / pieces.name)
    if config.is_file():
        given = json.loads(config.read_text(encoding="utf-8"))
        left_out = {key: given[key] for key in ("add_bos_token", "add_eos_token") if key in given}
        rundir.update_json(folder / config.name, left_out)


def say_how_to_continue(config: Config, output_dir: Path, trainer: PretrainTrainer) -> None:
    """And from which checkpoint: of the last step, or, after steps that were not finite, the newest good one."""
    saved, name = trainer.last_saved, ""
    again = f"bash run_clm.sh {config.path}{_repeated(config.overrides)} --output_dir {output_dir}"
    if trainer.skips.is_hopeless:
        good, moved = checkpoints.abandon_unproven(output_dir, trainer.skips.last_applied, trainer.lineage)
        if moved:
            logger.warning("no step after them was finite: the newest checkpoints are now %s", ", ".join(moved))
        if good is None:
            logger.warning(
                "no checkpoint is known to be good: start a new run with a lower learning_rate or other data"
            )
            return
        logger.warning("the last good checkpoint is %s; %s", good.name, CHANGE)
        name = "after that "
    elif saved is not None and checkpoints.step_of(saved) == trainer.state.global_step:
        name = f"{saved.name} is saved; "
    else:
        logger.warning("no checkpoint of the last step could be saved; the last one before it is still there")
    logger.info(f"{name}to continue: {again} --resume_from_checkpoint latest")


def _repeated(overrides: tuple[str, ...]) -> str:
    """The words of the command line, without those that a resumed run sets again."""
    words, kept = list(overrides), []
    while words:
        taken = [words.pop(0)]
        while words and not words[0].startswith("--"):
            taken.append(words.pop(0))
        if taken[0].split("=")[0] not in ("--output_dir", "--resume_from_checkpoint"):
            kept += taken
    return f" {shlex.join(kept)}" if kept else ""
