"""A run directory -> README.md of its trained model."""

import re
from dataclasses import replace
from pathlib import Path

from recipe.report import key_figures, load_run, render, write_page

# The folders of a path on this machine: "/data/web/" of "/data/web/*.parquet". URLs and relative names have none.
FOLDERS = re.compile(r"(?<![\w:/.<])[~.]{0,2}/(?:[^\s/\"']+/)*")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(run_dir: Path, model_dir: Path) -> Path:
    """Writes `README.md` for the trained model into `model_dir`, from the run's files only, and returns its path.

    The card is meant to be published: it has no path of this machine.
    """
    run = load_run(run_dir)
    run = replace(run, info=without_folders(run.info))
    model_dir.mkdir(parents=True, exist_ok=True)
    hub_name = str(run.part("arguments").get("hub_model_id") or "")
    values = {
        "run": run,
        "figures": key_figures(run),
        "arguments": run.part("arguments"),
        "name": hub_name if HUB_NAME.fullmatch(hub_name) else ".",
    }
    return write_page(render("model_card.md.j2", values), model_dir / "README.md")


def without_folders(value):
    """A copy of a JSON-able value in which paths of this machine are names."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value
