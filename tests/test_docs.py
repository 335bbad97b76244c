"""What the docs say exists."""

import ast
import json
import re
import tomllib
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens

import pytest

import recipe
from recipe.arguments import parse_config
from recipe.guards import FINDING_IDS
from recipe.guards import thresholds as t
from recipe.guards.trajectory import TRAJECTORIES, load_reference

ROOT = Path(recipe.__file__).resolve().parent.parent
TOP_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tokenizer/README.md")]
PAGES = [*TOP_PAGES, *sorted((ROOT / "docs").glob("*.md"))]
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
        *(t.PREFLIGHT_MAX_ROWS, t.MIN_POSITIONS, t.POSITIONS, t.MAX_POSITIONS // t.POSITIONS),
        *(t.LABELS_TO_LEARN, t.LABEL_CLEAR, f"{t.FUSED_EVERY}th"),
    ),
    "wrong_loss_target": (percent(t.MAX_UNSCORED), t.SURE),
    "non_causal_attention": (t.ATTENTION_MIN_ROWS, t.ATTENTION_MAX_ROWS, "1e-5", t.UNPROVEN, t.UNPROVEN_FP32),
    "accumulation_mismatch": (
        *(percent(limit) for limit in t.GRADIENT_ERROR.values()),
        t.GRADIENT_STEPS,
        t.WEIGHTS,
        t.UNEVEN,
        t.WEIGHTED_LOSS,
    ),
    "init_loss_off": (t.INIT_BELOW, f"{t.INIT_ABOVE:g}"),
    "loss_below_envelope": (
        *(t.ORDERS, t.BELOW_WINDOW, t.BELOW_MARGIN, t.TOKENS_PER_TYPE),
        t.UNTRAINED_SHARE,
    ),
    "loss_above_envelope": (
        *(t.ABOVE_WINDOW, t.ABOVE_MIN_STEPS, t.LEARNING_RATE_SUM, t.UNIGRAM_MARGIN),
        *(t.CONTEXT_HELPS, t.STILL_FALLING, 2 * t.ABOVE_WINDOW),
    ),
    "loss_off_reference": [
        *(percent(t.TOLERANCES[name]) for name in ("parameters", "learning_rate")),
        *(load_reference(TRAJECTORIES / f"{name}.json").window for name in ("cpu_demo", "original_180m")),
    ],
    "loss_spike": (t.JUMP_WINDOW, t.RECENT, t.JUMP_WINDOW + t.RECENT, t.JUMP_SDS, t.RISE_NATS),
    "grad_norm_off": (
        t.JUMP_WINDOW,
        t.RECENT,
        t.JUMP_WINDOW + t.RECENT,
        t.NORM_FACTOR,
        t.UNCLIPPED,
        t.CLIPPED_AWAY,
        *t.CHECKSUM_STEPS,
    ),
    "repeated_data": (
        *(t.LEDGER_WINDOW, t.LEDGER_EVERY, t.LEDGER_MIN_ROWS, t.LEDGER_MIN_TOKENS, t.RECENT_ROWS, t.RECENT_TOKENS),
        *(t.FEW_MICRO_STEPS, t.ALIGNED_ROWS, percent(t.ALIGNED_SHARE), percent(t.WHOLE_SHARE), t.WHOLE_NATS),
        percent(t.WARN_SHARE_NEAR),
    ),
    "train_eval_overlap": (
        t.EVAL_ROWS_READ,
        f"{t.EVAL_SECONDS:g} seconds",
        t.OVERLAP_ROWS,
        percent(t.OVERLAP_WARN),
        percent(t.OVERLAP_ERROR),
    ),
    "resume_replay": (t.REPLAY_ROWS,),
    "resume_jump": ("1e-3", "1e-2"),
    "learning_rate_off": ("1e-3",),
    "wrong_gradient": (
        *(percent(t.GRADIENT_OFF), percent(t.GRADIENT_FAR_OFF), percent(t.CHECKPOINTED), percent(t.SMALL_MOVE)),
        *(t.GRADIENT_STEP, t.SAME_SLOPE),
    ),
    "optimizer_off": (t.ADAM_STEPS, t.ADAM_EVERY, t.PER_TENSOR, percent(t.ADAM_ERROR)),
    "frozen_parameters": (t.FROZEN_STEPS, "1e-6", t.PER_TENSOR, t.STOPPED_STEPS),
    "lost_updates": (
        t.FROZEN_STEPS,
        t.SMALL_UPDATE,
        t.QUIET_STEPS,
        t.LOST_STEPS,
        t.LOST_SPACINGS,
        t.LOST_SHARE,
        t.LOST_ELEMENTS,
        t.CAST_COLUMNS,
        percent(t.STALE_SHARE),
    ),
    "token_budget_off": (t.BUDGET_STEPS, t.BUDGET_SHARE),
    "double_bos": (t.BOS_TEXTS, t.BOS_SHARE),
    "padding_is_target": (
        t.FILLED_ROWS,
        t.FILLED_TOKENS,
        percent(t.FILLED_SHARE),
        t.PADDING_SCORED,
        percent(t.PADDING_SHARE),
    ),
    "eos_never_target": (t.EOS_SEEN, t.EOS_ABSENT_TOKENS),
    "eval_not_repeatable": ("2e-5", "2e-6"),
    "eval_train_mismatch": (percent(t.EVALUATED), percent(t.REPORTED)),
    "train_eval_gap": (t.GAP_NATS, t.GAP_WARNING, t.GAP_RATIO, t.GAP_STEPS),
    "compiled_mismatch": [percent(limit) for limits in t.COMPILED.values() for limit in limits],
    "rank_divergence": t.CHECKSUM_STEPS,
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_thresholds_in_findings_are_those_of_the_code(name):
    text = sections_of_findings()[name]
    for number in THRESHOLDS[name]:
        shown = number if isinstance(number, str) else f"{number:,}"
        assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?![\d]|[.,]\d)", text), f"{name}: {shown}"


def test_small_thresholds_are_written_as_in_the_code():
    """Those that `THRESHOLDS` has as text."""
    small = (t.ROUNDING, t.RATE_TOLERANCE, t.MOVING_RATE, t.REPEATED, t.REPEATED_FP32)
    assert small == (1e-5, 1e-3, 1e-6, 2e-5, 2e-6)
    assert set(t.RESUME_TOLERANCE.values()) == {1e-3, 1e-2} and t.EVAL_ROWS == 2


GUARDS = ROOT / "recipe" / "guards"
# Numbers of the implementation: ids and bits, constants of hashes, sizes of buffers, where to look first.
NO_THRESHOLDS = {
    "batches.py": ("LABEL_IS_NEXT", "LABEL_IS_TOKEN", "SCORED", "STARTS", "VALID"),
    "envelope.py": ("ONE_TYPE", "SLICE"),
    "ledger.py": ("CHUNK", "OVERFLOW", "_BASE", "_MIX"),
    "preflight.py": ("MAX_COPIED",),
    "probes/attention.py": ("GOLDEN", "PADDING"),
    "probes/targets.py": ("IGNORE_INDEX",),
}


def assignments(source: str) -> list[tuple[ast.stmt, list[str]]]:
    """Those of constants, also of several at once, with their names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            if names and all(name.isupper() for name in names):
                found.append((node, names))
    return found


def has_number(value: ast.expr) -> bool:
    return any(isinstance(part, ast.Constant) and type(part.value) in (int, float) for part in ast.walk(value))


def without_origin(source: str) -> list[str]:
    """Constants with a comment neither in their lines nor above. One above serves the lines that follow it, up to one
    that has its own."""
    comments = {token.start for token in generate_tokens(StringIO(source).readline) if token.type == COMMENT}
    bare, served = [], -1  # the last line that the comment above still serves
    for node, names in assignments(source):
        above = node.lineno - 1 in (served, *(line for line, column in comments if column == 0))
        inside = any(node.lineno <= line <= node.end_lineno for line, _ in comments)
        served = node.end_lineno if above and not inside else -1
        bare += names if not above and not inside else []
    return bare


def test_every_threshold_has_its_origin():
    source = (GUARDS / "thresholds.py").read_text(encoding="utf-8")
    names = [name for _, names in assignments(source) for name in names]
    assert len(names) > 100 and sorted(names) == sorted(name for name in vars(t) if name.isupper())
    assert without_origin(source) == []


def test_a_threshold_without_its_origin_is_seen():
    assert without_origin("# of both\nA = 1\nB, C = 2, 3\n\nD = 4\n") == ["D"]
    assert without_origin("# of A\nA = 1\nB = 2  # of B\nC = 3\n") == ["C"]


def test_thresholds_are_in_one_place():
    """Whoever adds a number elsewhere says here that it decides nothing."""
    found = {}
    for path in sorted(GUARDS.rglob("*.py")):
        constants = assignments(path.read_text(encoding="utf-8"))
        if numbers := sorted(name for node, names in constants if has_number(node.value) for name in names):
            found[path.relative_to(GUARDS).as_posix()] = tuple(numbers)
    del found["thresholds.py"]
    assert found == NO_THRESHOLDS


def test_every_threshold_is_used():
    sources = [path.read_text(encoding="utf-8") for path in GUARDS.rglob("*.py") if path.name != "thresholds.py"]
    used = set(re.findall(r"\w+", "\n".join(sources)))
    assert {name for name in vars(t) if name.isupper()} <= used


def test_every_guard_that_can_speak_has_a_section():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "recipe").rglob("*.py"))
    spoken = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    assert {"missing_label_shift", "loss_off_reference", "source_exhausted"} <= spoken
    assert spoken <= set(sections_of_findings())


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
