"""RESULTS.md: what was scored, as tables a person reads; results.json holds all of it."""

from recipe.guards import FINDING_IDS
from tests.benchmarks.results import format_table
from tests.zoo.remains import WHY_MISSED
from tests.zoo.score import MATTERS, OURS, SOON, summarize_all

TOOLS = {"trainproof": "trainproof 0.22.0", "losslint": "losslint 0.4.1", "watchdog": "loss watchdog"}
PART_TITLES = {
    "held_out_3": "Held out: written when the guards were frozen, without sight of them",
    "held_out_2": "Held out at first, then used: guards were fixed by its first score (held_out_2/first_score.json)",
    "held_out": "Held out at first, then used: guards were fixed by its first score (held_out/first_score.json)",
    "development": "Development: what thresholds were chosen on",
}
NOTE = """Probes judge before step 1, before step 21 and when a curve finding asks them: their share of steps is small.
No run here is one for which a reference was recorded (`tests/test_demo.py` has one), and none is compiled (`pytest -m
slow` has some)."""
HEADER = """# The zoo

Written by `python -m tests.zoo`, which runs all of it again. What bugs, twins and columns are: docs/zoo.md."""
MEASURES = {
    "recall": "bugs caught",
    "recall_matters": f"of those that change what is learned by more than {MATTERS} nat",
    "recall_with_id": "of those whose cause has a finding id",
    "named_first": "caught: the first finding names the cause",
    "before_step_1": "caught before the first step that it spoils",
    "soon": f"caught within {SOON} steps of the onset",
    "false_alarms": "healthy runs with an alarm",
}
TARGETS = {
    "recall_matters": "100 %",
    "named_first": "95 %",
    "before_step_1": "50 %",
    "soon": "95 %",
    "false_alarms": "0",
}


def format_results(results: dict) -> str:
    parts = [HEADER, _environment(results)]
    parts += ["## All parts together", _summary(summarize_all(results["parts"].values(), TOOLS))]
    for part, title in PART_TITLES.items():
        if results["parts"][part]["bugs"] or results["parts"][part]["healthy"]:
            parts += [f"## {title}", *_part(results["parts"][part])]
    parts += ["## How often each guard judged, in all healthy runs", *_judged(results["judged"])]
    return "\n\n".join(parts) + "\n"


def _environment(results: dict) -> str:
    environment, versions = results["environment"], results["environment"]["versions"]
    return (
        f"{environment['date']}, commit {environment['commit']}, {environment['cpus']} CPUs, Python "
        f"{environment['python']}, {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"{results['runs']} runs in {results['seconds'] / 60:.1f} minutes."
    )


def _part(part: dict) -> list[str]:
    bugs, healthy = part["bugs"], part["healthy"]
    mechanisms = len({row["mechanism"] for row in bugs})
    intro = f"{len(bugs)} bugs of {mechanisms} mechanisms, {len(healthy)} healthy runs (twins among them)."
    missed = [row for row in bugs if not row["is_caught"]]
    early = [f"{row['name']} ({', '.join(row['early'])})" for row in bugs if row["early"]]
    intro += f" Alarms before a bug began: {', '.join(early) or 'none'}."
    sections = [intro, _summary(part["summary"])]
    if bugs:
        sections += ["### By area", _areas(bugs), "### Bugs", _bugs(bugs)]
        sections += ["### Not caught", _missed(missed) if missed else "None."]
    if healthy:
        sections += ["### Healthy runs", _healthy(healthy)]
    return sections


def _summary(summary: dict) -> str:
    rows = []
    for measure, words in MEASURES.items():
        cells = {tool: _share(summary[tool][measure], measure) for tool in (OURS, *TOOLS)}
        ours = {"these guards": cells[OURS], "target": TARGETS.get(measure, "-")}
        rows.append({"": words, **ours, **{title: cells[tool] for tool, title in TOOLS.items()}})
    return format_table(rows)


def _share(share: dict | None, measure: str) -> str:
    """With the one-sided 95 % bound that matters: from above for false alarms, else from below."""
    if share is None or not share["of"]:
        return "-"
    bound = f"< {100 * share['high']:.1f} %" if measure == "false_alarms" else f"> {100 * share['low']:.1f} %"
    return f"{share['hits']} of {share['of']} = {100 * share['share']:.1f} % ({bound})"


def _areas(bugs: list[dict]) -> str:
    rows = []
    for area in dict.fromkeys(row["area"] for row in bugs):
        own = [row for row in bugs if row["area"] == area]
        counts = {TOOLS[tool]: sum(row["others"].get(tool) is not None for row in own) for tool in TOOLS}
        named = sum(row["is_named"] for row in own)
        rows.append(
            {"area": area, "bugs": len(own), "caught": sum(r["is_caught"] for r in own), "named": named, **counts}
        )
    return format_table(rows)


def _bugs(bugs: list[dict]) -> str:
    return format_table([_bug(row) for row in bugs])


def _bug(row: dict) -> dict:
    is_known = "" if row["is_named"] or not row["is_caught"] else f" (not {(*row['names'], 'named by any id')[0]})"
    others = [f"{tool} {row['others'][tool]}" for tool in TOOLS if row["others"].get(tool) is not None]
    return {
        "bug": row["name"],
        "what is wrong": row["what"],
        "source": row["source"],
        "first finding": f"{row['first']}{is_known}" if row["is_caught"] else "-",
        "onset": row["onset"],
        "step": row["step"],
        "tokens": row["tokens"],
        "loss then: bug, twin": _pair(row["loss_when_caught"]),
        "loss at the end": _pair(row["loss_at_end"]),
        "learned, nats": _nats(row["learned"]),
        "reported, nats": _nats(row["reported"]),
        "others, step": ", ".join(others) or "-",
    }


def _pair(pair: list | None) -> str:
    return ", ".join("-" if value is None else f"{value:.2f}" for value in pair) if pair else "-"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _missed(rows: list[dict]) -> str:
    return format_table(
        [
            {
                "bug": row["name"],
                "what is wrong": row["what"],
                "learned, nats": _nats(row["learned"])
                + (f" ± {row['learned_error']:.3f}" if row.get("learned_error") is not None else ""),
                "reported, nats": _nats(row["reported"]),
                "hints (information)": ", ".join(row["hints"]) or "-",
                "why it stays unseen": WHY_MISSED.get(row["name"], "-"),
            }
            for row in sorted(rows, key=lambda row: -abs(row["learned"] or 0))
        ]
    )


def _healthy(rows: list[dict]) -> str:
    return format_table(
        [
            {
                "run": row["name"],
                "setting": row["setting"],
                "steps": row["steps"],
                "tokens": row["tokens"],
                "loss at the end": "-" if row["loss_at_end"] is None else f"{row['loss_at_end']:.2f}",
                "alarms": "; ".join(f"{name} at step {step}: {found}" for name, step, found in row["alarms"])
                or "none",
                "others": ", ".join(
                    f"{tool}: {', '.join(row['others'][tool])}" for tool in TOOLS if row["others"][tool]
                )
                or "none",
            }
            for row in rows
        ]
    )


def _judged(judged: dict[str, dict]) -> list[str]:
    rows = [
        {
            "guard": name,
            "runs with something to judge": judged[name]["meant"],
            "judged, % of them": _percent(judged[name]["runs"]),
            "of their steps, % (median)": _percent(judged[name]["steps"]),
            "else, because": "; ".join(f"{reason} ({count})" for reason, count in judged[name]["reasons"].items())
            or "-",
        }
        for name in FINDING_IDS
    ]
    return [format_table(rows), NOTE]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"
