"""The files of a training in someone's own Trainer: `run.json` when it starts, verdict and report when it ends.

They lie in `output_dir/_recipe`, beside the records of the guards: Trainer's `push_to_hub` uploads no `_*`.
"""

import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from transformers import Trainer

from recipe import rundir
from recipe.guards import RegressionCallback
from recipe.guards.guard import shorten
from recipe.model import describe_device, describe_kernels
from recipe.report import write_report
from recipe.verdict import context_of, describe_guards, verdict

logger = logging.getLogger("recipe.guards")
ENDED, FAILED, STOPPED_BY_GUARD, BY_CTRL_C = 0, 1, 3, 130


def describe(guards: RegressionCallback, trainer: Trainer, checkpoint: Path | None) -> None:
    """Writes `run.json` of a training that begins."""
    args, model = trainer.args, trainer.model
    described = {
        "started": _now(),
        "finished": None,
        "resumed_from": checkpoint.name if checkpoint is not None else None,
        "arguments": args.to_dict(),
        "versions": rundir.versions(),
        "device": describe_device(args, describe_kernels(model, args)),
        "model": {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        "trajectory": None,
    }
    rundir.write_json(guards.output_dir / "run.json", described)


def conclude(guards: RegressionCallback, interrupted_by: str | None = None) -> None:
    """Logs the verdict, and where the report is. Completes `run.json` and writes the report. `interrupted_by`: the
    name of an exception."""
    judged, folder, facts = verdict(guards, interrupted_by), guards.output_dir, guards.facts
    last = guards.history[-1] if guards.history else {"step": 0}
    result = {
        "verdict": judged.text,
        "verdict_kind": judged.kind,
        "exit_code": _exit_code(guards, interrupted_by),
        "interrupted_by": interrupted_by,
        "steps": last["step"],
        "tokens_seen": guards.tokens_seen,
        "train_seconds": round(guards.seconds, 1),
        "unigram_entropy": context_of(guards)["unigram_of_run"],
        "guards": describe_guards(guards),
    }
    model = {name: facts.get(name) for name in ("parameters", "vocab_size", "block_size")}
    ended = {"finished": _now(), "model": model, "trajectory": guards.reference and asdict(guards.reference)}
    try:
        rundir.update_json(folder / "run.json", {**ended, "result": result})
        where = f"report: {write_report(folder)}"
    except OSError as error:
        where = f"no report: {error}"
    said = f"verdict: {judged.text}"
    whole = f"{said} | {where}"
    for line in [whole] if shorten(whole) == whole else [said, where]:
        is_path = line == where
        logger.info("%s", line if is_path else shorten(line), extra={"colour": judged.colour})


def _exit_code(guards: RegressionCallback, interrupted_by: str | None) -> int:
    if interrupted_by is not None:
        return BY_CTRL_C if interrupted_by == KeyboardInterrupt.__name__ else FAILED
    return STOPPED_BY_GUARD if guards.stopped_by is not None else ENDED


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
