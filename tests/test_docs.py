"""What the docs say exists."""

import json
import re
from pathlib import Path

import pytest

import recipe
from recipe.arguments import parse_config
from recipe.guards import FINDING_IDS
from recipe.guards.trajectory import load_reference

ROOT = Path(recipe.__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tokenizer" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
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


def test_every_finding_id_is_in_the_docs_once():
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+)$", text, flags=re.M)
    reserved = re.findall(r"`(\w+)`", text.split("## Reserved")[1])
    assert sorted([*(name for name in sections if name != "Reserved"), *reserved]) == sorted(FINDING_IDS)


def test_every_guard_that_can_speak_has_a_section():
    """The log line points at it."""
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "recipe").rglob("*.py"))
    spoken = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    assert {"missing_label_shift", "loss_off_reference", "source_exhausted"} <= spoken
    assert all(f"## {name}\n" in text for name in spoken)


def test_the_keys_in_readme_are_keys(tmp_path):
    config = parse_config(ROOT / "recipe" / "configs" / "cpu_demo.json", ["--use_cpu", "true"])
    table = README.split("## The keys worth editing")[1].split("##")[0]
    keys = [name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", row)]
    assert len(keys) >= 12 and set(keys) <= set(config.to_dict())


def test_the_figures_in_readme_are_those_of_the_recorded_runs():
    """Measured once, by runs that the demo's reference names; whoever records it again must come here."""
    reference = load_reference(ROOT / "recipe" / "trajectories" / "cpu_demo.json")
    run = reference.provenance["runs"][0]
    assert f"{run['eval_loss']:.2f}" in README and run["corpus"][:16] in README
    demo = json.loads((ROOT / "recipe" / "configs" / "cpu_demo.json").read_text(encoding="utf-8"))
    assert f"{demo['train_tokens'] / 1e6:.1f}M tokens" in README


def test_readme_is_short():
    assert len(README.splitlines()) < 200 and "@@" not in README
