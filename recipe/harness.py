"""Tasks of lm-evaluation-harness, by its own API, where it is installed: `pip install lm-eval`."""

import logging
import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from recipe.data.files import first_line
from recipe.errors import DataError, UserError

logger = logging.getLogger(__name__)


def find_tasks(names: str, include_path: Path | None):
    """The harness's `TaskManager`, which knows all of `names` (with commas between). Raises `UserError` where the
    harness or a task is missing."""
    if find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, which is not installed: pip install lm-eval")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: no such folder; name the one that holds the task's yaml")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in split_names(names) if name not in manager.all_tasks]
    if unknown:
        own = f"; {include_path} has none of this name" if include_path else "; --include_path FOLDER adds your own"
        raise UserError(f"--tasks: the harness has no task {', '.join(unknown)}{own}; `lm_eval ls tasks` lists all")
    return manager


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def run_tasks(
    model, tokenizer, manager, options: Namespace, max_length: int | None, prefix_token_id: int | None
) -> list[dict]:
    """Each metric of each task, with the harness's standard error (None where it has none). JSON-able.

    `options`: `tasks`, `batch_size` and `limit` of the command line. `prefix_token_id`: stands before a text without
    context; None leaves it to the harness, which takes BOS. Raises `DataError` where a task's data cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    language_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        max_length=max_length,
        prefix_token_id=prefix_token_id,
    )
    try:
        found = lm_eval.simple_evaluate(
            language_model,
            tasks=split_names(options.tasks),
            task_manager=manager,
            limit=options.limit,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # the datasets library, which is asked for the task's data
        raise DataError(f"--tasks {options.tasks}: cannot be run ({first_line(error)})") from error
    return [record for name in found["results"] for record in records_of(name, found)]


def records_of(task: str, found: dict) -> list[dict]:
    """`found`: of `simple_evaluate`; a metric's name there is `acc,none`, with the filter behind the comma."""
    scores, records = found["results"][task], []
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = scores.get(f"{metric}_stderr,{filtered}")
            examples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
            records.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": value,
                    "standard_error": error if isinstance(error, (int, float)) else None,
                    "examples": examples,
                }
            )
    return records
