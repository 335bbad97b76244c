"""What the docs say exists."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import recipe
from recipe import verdict
from recipe.arguments import parse_config
from recipe.guards import FINDING_IDS, GUARDS
from recipe.guards.trajectory import load_reference

ROOT = Path(recipe.__file__).resolve().parent.parent
TOP_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tokenizer/README.md")]
PAGES = [*TOP_PAGES, *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|<img src=\")([^)#\"]+?)(?:#[^)]*)?[)\"]", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:recipe|docs|tests|tokenizer)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_docs_name_exist(page):
    file = None
    for name, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page.read_text(encoding="utf-8")):
        file = ROOT / "tests" / name if name else file
        if name:
            assert file.exists(), name
        if test:
            assert f"def {test}(" in file.read_text(encoding="utf-8"), f"{file.name}::{test}"


def sections_of_findings() -> dict[str, str]:
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    names, bodies = re.findall(r"^## (.+)$", text, flags=re.M), re.split(r"^## .+$", text, flags=re.M)[1:]
    assert len(set(names)) == len(names)
    return dict(zip(names, bodies, strict=True))


def test_every_finding_id_has_a_section_in_order():
    """The log line points at it."""
    sections = sections_of_findings()
    assert tuple(sections) == FINDING_IDS
    for name, body in sections.items():
        parts = re.findall(r"^\*\*(Means|When|Measured|Try|Cannot see)\*\* ", body, flags=re.M)
        assert parts == ["Means", "When", "Measured", "Try", "Cannot see"], name


def test_every_guard_is_in_the_table_in_order():
    table = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8").split("## The guards")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == FINDING_IDS


def spellings(number: float) -> set[str]:
    """The ways in which the pages write a number."""
    return {f"{number:,}", f"{number:g}", f"{100 * number:g} %", f"{number:.0e}".replace("e-0", "e-"), f"{number:.1f}"}


def numbers_of(guard) -> dict[str, list[float]]:
    """The numeric constants of a guard's class."""
    found = {}
    for name, value in vars(guard).items():
        values = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else [value]
        flat = [each for value in values for each in (value if isinstance(value, tuple) else [value])]
        if name.isupper() and flat and all(type(each) in (int, float) for each in flat):
            found[name] = flat
    return found


# Thresholds that the pages write in words ("half", "a quarter", "three steps"), or leave out.
IN_WORDS = {
    "AccumulationMismatch.MIN_LABELS",
    "AccumulationMismatch.MIN_OWN_LABELS",
    "AccumulationMismatch.WEIGHT_STEPS",
    "CompiledMismatch.SUM_ROOM",
    "FrozenParameters.FROZEN_SHARE",
    "GradNorm.MIN_STEPS",
    "LearningRate.MIN_STEPS",
    "LearningRate.TOLERANCE",
    "LossSpike.FALL_SHARE",
    "LossTarget.FOLLOWED",
    "LossTarget.LABEL_MAJORITY",
    "LossTarget.MAJORITY",
    "LossTarget.MAX_ELSEWHERE",
    "LossTarget.MAX_ELSEWHERE_SAMPLED",
    "LossTarget.MIN_LOSSES",
    "OptimizerOff.ROUNDING",
    "PaddingIsTarget.MOST",
    "Repetition.ALIGNED_SPREAD",
    "Repetition.WARN_SHARE",
    "SlowPath.MIN_WEIGHTS",
}


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_the_thresholds_in_findings_are_those_of_the_code(guard):
    text = "\n".join(sections_of_findings()[name] for name in guard.ids).replace("\n", " ")
    missing = {
        f"{guard.__name__}.{name}"
        for name, numbers in numbers_of(guard).items()
        for number in numbers
        if not any(re.search(rf"(?<![\d.,]){re.escape(way)}(?![\d]|[.,]\d)", text) for way in spellings(number))
    }
    assert missing == {name for name in IN_WORDS if name.startswith(f"{guard.__name__}.")}


def test_the_numbers_of_the_verdict_in_findings_are_those_of_the_code():
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    text = page.split("**The verdict**")[1].split("**Several")[0]
    numbers = (verdict.ENOUGH_STEPS, verdict.ENOUGH_RATE, verdict.TOKENS_PER_ENTRY, verdict.CONTEXT_HELPS)
    for number in (*numbers, verdict.LAST_STEPS, verdict.PREQUENTIAL_MARGIN):
        assert re.search(rf"(?<![\d.]){re.escape(str(number))}(?![\d.])", text), number
    assert all(words in text for words in (verdict.HEALTHY, verdict.NOTHING_LEARNED, verdict.NOT_JUDGED))


def test_the_keys_in_readme_are_keys(tmp_path):
    config = parse_config(ROOT / "recipe" / "configs" / "cpu_demo.json", ["--use_cpu", "true"])
    table = README.split("## Train on your own text")[1].split("\n## ")[0]
    keys = [name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)]
    assert len(keys) >= 12 and set(keys) <= set(config.to_dict())


def test_the_figures_in_readme_are_those_of_the_recorded_runs():
    """Measured once, by runs that the demo's reference names; whoever records it again must come here."""
    reference = load_reference(ROOT / "recipe" / "trajectories" / "cpu_demo.json")
    run = reference.provenance["runs"][0]
    assert f"{run['eval_loss']:.2f}" in README and run["corpus"][:16] in README
    demo = json.loads((ROOT / "recipe" / "configs" / "cpu_demo.json").read_text(encoding="utf-8"))
    assert f"{demo['train_tokens'] / 1e6:.1f}M tokens" in README


def test_the_minimum_versions_in_readme_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(re.match(r"(\w+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    words = [f"{name} {lowest[name]}" for name in ("torch", "transformers", "accelerate", "datasets")]
    first_screen = " ".join(README.splitlines()[:20])
    assert all(word in first_screen for word in [f"Python {project['requires-python'].removeprefix('>=')}", *words])


def test_the_steps_in_readme_are_those_of_its_picture():
    picture = (ROOT / "docs" / "demo_loss.svg").read_text(encoding="utf-8")
    steps = dict(re.findall(r">(\w+), step (\d+)</text>", picture))
    caption = " ".join(README.split("demo_loss.svg)")[1].split("##")[0].split())
    assert steps["missing_label_shift"] == "0" and "before step 1" in caption
    assert f"steps {steps['loss_off_reference']} and {steps['loss_below_envelope']}" in caption


def test_readme_is_short():
    lines = README.splitlines()
    prose = [line for line in lines if not line.startswith(("|", "bash "))]
    assert len(lines) < 200 and max(map(len, prose)) <= 120 and "@@" not in README
