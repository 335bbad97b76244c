"""A run directory -> README.md of its trained model."""

import re
from pathlib import Path

from recipe.report import key_figures, load_run, render, write_page

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write_model_card(run_dir: Path, model_dir: Path) -> Path:
    """Writes `README.md` for the trained model into `model_dir`, from the run's files only, and returns its path.

    The card is meant to be published: it has no path of this machine (`load_run` removes them).
    """
    run = load_run(run_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    hub_name = str(run.part("arguments").get("hub_model_id") or "")
    values = {
        "run": run,
        "figures": key_figures(run),
        "arguments": run.part("arguments"),
        "name": hub_name if HUB_NAME.fullmatch(hub_name) else ".",
    }
    return write_page(render("model_card.md.j2", values), model_dir / "README.md")
