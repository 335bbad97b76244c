"""What the docs say exists."""

import json
import re
from pathlib import Path

import pytest

import recipe
from recipe.arguments import parse_config
from recipe.guards import FINDING_IDS, callback, envelope, ledger, listener, preflight, updates, vitals, watch
from recipe.guards.probes import attention, equivalence, targets
from recipe.guards.trajectory import TOLERANCES, TRAJECTORIES, load_reference

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
        parts = re.findall(r"^\*\*(Means|Measured|Try|Cannot see)\*\* ", body, flags=re.M)
        assert parts == ["Means", "Measured", "Try", "Cannot see"], name


def test_every_guard_is_in_the_table_in_order():
    table = (ROOT / "docs" / "guards.md").read_text(encoding="utf-8").split("## The guards")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == FINDING_IDS


def percent(share: float) -> str:
    return f"{100 * share:g} %"


THRESHOLDS = {
    "missing_label_shift": (
        *(preflight.MAX_ROWS, targets.MIN_POSITIONS, listener.POSITIONS, listener.MAX_POSITIONS // listener.POSITIONS),
        *(watch.LABELS_TO_LEARN, watch.LABEL_CLEAR, f"{listener.FUSED_EVERY}th"),
    ),
    "non_causal_attention": (attention.MIN_ROWS, attention.MAX_ROWS, "1e-5", attention.UNPROVEN),
    "accumulation_mismatch": (equivalence.WEIGHTS, watch.UNEVEN, watch.WEIGHTED_LOSS),
    "init_loss_off": (vitals.INIT_BELOW, f"{vitals.INIT_ABOVE:g}"),
    "loss_below_envelope": (
        *(envelope.ORDERS, envelope.BELOW_WINDOW, envelope.BELOW_MARGIN, envelope.TOKENS_PER_TYPE),
        envelope.UNTRAINED_SHARE,
    ),
    "loss_above_envelope": (
        *(envelope.ABOVE_WINDOW, envelope.ABOVE_MIN_STEPS, envelope.LEARNING_RATE_SUM, envelope.UNIGRAM_MARGIN),
        *(envelope.CONTEXT_HELPS, envelope.STILL_FALLING, 2 * envelope.ABOVE_WINDOW),
    ),
    "loss_off_reference": [
        *(percent(TOLERANCES[name]) for name in ("parameters", "learning_rate")),
        *(load_reference(TRAJECTORIES / f"{name}.json").window for name in ("cpu_demo", "original_180m")),
    ],
    "loss_spike": (vitals.WINDOW, vitals.RECENT, vitals.WINDOW + vitals.RECENT, vitals.JUMP_SDS, vitals.RISE_NATS),
    "grad_norm_off": (vitals.WINDOW, vitals.RECENT, vitals.WINDOW + vitals.RECENT, vitals.NORM_FACTOR),
    "repeated_data": (
        *(ledger.WINDOW, ledger.EVERY, ledger.MIN_ROWS, ledger.MIN_TOKENS, ledger.RECENT_ROWS, ledger.RECENT_TOKENS),
        *(ledger.FEW_MICRO_STEPS, ledger.ALIGNED_ROWS, percent(ledger.ALIGNED_SHARE)),
        percent(ledger.WARN_SHARE_NEAR),
    ),
    "train_eval_overlap": (ledger.OVERLAP_ROWS, percent(ledger.OVERLAP_WARN), percent(ledger.OVERLAP_ERROR)),
    "resume_replay": (ledger.REPLAY_ROWS,),
    "resume_jump": ("1e-3", "1e-2"),
    "learning_rate_off": ("1e-3",),
    "frozen_parameters": (updates.FROZEN_STEPS, "1e-6", updates.PER_TENSOR),
    "lost_updates": (updates.LOST_STEPS, updates.LOST_SPACINGS, updates.LOST_SHARE, updates.LOST_ELEMENTS),
    "token_budget_off": (vitals.BUDGET_STEPS, vitals.BUDGET_SHARE),
    "padding_is_target": (vitals.PADDING_SCORED, percent(vitals.PADDING_SHARE)),
    "eos_never_target": (vitals.EOS_SEEN, vitals.EOS_ABSENT_TOKENS),
    "eval_not_repeatable": ("2e-5",),
    "eval_train_mismatch": (percent(equivalence.EVALUATED), percent(equivalence.REPORTED)),
    "train_eval_gap": (vitals.GAP_NATS, vitals.GAP_WARNING, vitals.GAP_RATIO, vitals.GAP_STEPS),
    "compiled_mismatch": [percent(limit) for limits in equivalence.COMPILED.values() for limit in limits],
    "rank_divergence": callback.CHECKSUM_STEPS,
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_thresholds_in_findings_are_those_of_the_code(name):
    text = sections_of_findings()[name]
    for number in THRESHOLDS[name]:
        shown = number if isinstance(number, str) else f"{number:,}"
        assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?![\d]|[.,]\d)", text), f"{name}: {shown}"


def test_small_thresholds_are_written_as_in_the_code():
    """Those that `THRESHOLDS` has as text."""
    small = (attention.ROUNDING, vitals.RATE_TOLERANCE, updates.MOVING_RATE, equivalence.REPEATED)
    assert small == (1e-5, 1e-3, 1e-6, 2e-5)
    assert set(updates.RESUME_TOLERANCE.values()) == {1e-3, 1e-2} and preflight.EVAL_ROWS == 2


def test_every_guard_that_can_speak_has_a_section():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "recipe").rglob("*.py"))
    spoken = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    assert {"missing_label_shift", "loss_off_reference", "source_exhausted"} <= spoken
    assert spoken <= set(sections_of_findings())


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
