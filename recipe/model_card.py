"""A run directory -> README.md of its trained model."""

from pathlib import Path

from recipe.report import key_figures, load_run, render


def write_model_card(run_dir: Path, model_dir: Path) -> Path:
    """Writes `README.md` for the trained model into `model_dir`, from the run's files only, and returns its path.

    The card is meant to be published: it has no path of this machine (`load_run` removes them).
    """
    run = load_run(run_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    values = {"run": run, "figures": key_figures(run), "arguments": run.part("arguments")}
    return render("model_card.md.j2", values, model_dir / "README.md")
