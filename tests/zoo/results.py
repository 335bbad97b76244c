"""RESULTS.md: what was scored, in short. results.json holds all of it: of each bug its source, setting, losses and
when each tool spoke; of each healthy run what was said; why a guard did not judge."""

from collections import Counter

from recipe.guards import FINDING_IDS
from tests.benchmarks.results import format_table
from tests.zoo.remains import WHY_MISSED
from tests.zoo.score import MATTERS, OURS, SOON, summarize_all

TOOLS = ("trainproof", "losslint", "torch-audit", "trainsight", "watchdog")
PART_TITLES = {
    "held_out_5": "Held out, by authors who had seen neither guards nor other parts (held_out_5/first_score.json)",
    "held_out_4": "Held out at first, then used: guards were fixed by its first score (held_out_4/first_score.json)",
    "held_out_3": "Held out at first, then known when later guards were made (held_out_3/first_score.json)",
    "held_out_2": "Held out at first, then used: guards were fixed by its first score (held_out_2/first_score.json)",
    "held_out": "Held out at first, then used: guards were fixed by its first score (held_out/first_score.json)",
    "development": "Development: what thresholds were chosen on",
}
NOTE = """Probes judge before step 1, before step 21 and when a curve finding asks them: their share of steps is small.
No run here is one for which a reference was recorded (`tests/test_demo.py` has one), and none is compiled (`pytest -m
slow` has some)."""
HEADER = """# The zoo

Written by `python -m tests.zoo`, which runs all of it again. What bugs, twins and columns are: docs/zoo.md. Details of
each run (source, setting, losses, what other tools said and when) are in results.json."""
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
    "recall_matters": "95 %",
    "named_first": "95 %",
    "before_step_1": "50 %",
    "soon": "95 %",
    "false_alarms": "0",
}


def format_results(results: dict) -> str:
    parts = {part: results["parts"][part] for part in PART_TITLES if part in results["parts"]}
    parts = {part: scored for part, scored in parts.items() if scored["bugs"] or scored["healthy"]}
    sections = [HEADER, _environment(results)]
    sections += ["## All parts together", _summary(summarize_all(parts.values(), TOOLS))]
    for part, scored in parts.items():
        sections += [f"## {PART_TITLES[part]}", _intro(part, scored), _summary(scored["summary"])]
    bugs = [row for scored in parts.values() for row in scored["bugs"]]
    if bugs:
        sections += ["## Bugs caught, by area", _areas(bugs)]
    for part, scored in parts.items():
        if scored["bugs"]:
            sections += [f"## Bugs of `{part}`", _bugs(scored["bugs"]), "### Not caught", _missed(scored["bugs"])]
    sections += ["## Alarms on healthy runs, by kind", _alarms(parts.values()), *_crashes(results)]
    sections += ["## How often each guard judged, in all healthy runs", *_judged(results["judged"])]
    return "\n\n".join(sections) + "\n"


def _environment(results: dict) -> str:
    environment, versions = results["environment"], results["environment"]["versions"]
    return (
        f"{environment['date']}, commit {environment['commit']}, {environment['cpus']} CPUs, Python "
        f"{environment['python']}, {', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"{results['runs']} runs in {results['seconds'] / 60:.1f} minutes."
        + "".join(map(_added, results.get("added", ())))
    )


def _added(added: dict) -> str:
    environment = added["environment"]
    return (
        f"\n\nAdded without running the others again: {len(added['names'])} bugs and healthy runs, "
        f"{environment['date']}, commit {environment['commit']}, {added['runs']} runs in "
        f"{added['seconds'] / 60:.1f} minutes."
    )


def _intro(name: str, part: dict) -> str:
    bugs, healthy = part["bugs"], part["healthy"]
    mechanisms = len({row["mechanism"] for row in bugs})
    early = [f"{row['name']} ({', '.join(row['early'])})" for row in bugs if row["early"]]
    return (
        f"`{name}`: {len(bugs)} bugs of {mechanisms} mechanisms, {len(healthy)} healthy runs (twins among them). "
        f"Alarms before a bug began: {', '.join(early) or 'none'}."
    )


def _summary(summary: dict) -> str:
    rows = []
    for measure, words in MEASURES.items():
        ours = {"these guards": _share(summary[OURS][measure], measure), "target": TARGETS.get(measure, "-")}
        others = {tool: _hits(summary.get(tool, {}).get(measure)) for tool in TOOLS}
        rows.append({"": words, **ours, **others})
    return format_table(rows)


def _share(share: dict | None, measure: str) -> str:
    """With the one-sided 95 % bound that matters: from above for false alarms, else from below."""
    if share is None or not share["of"]:
        return "-"
    bound = f"< {100 * share['high']:.1f} %" if measure == "false_alarms" else f"> {100 * share['low']:.1f} %"
    return f"{share['hits']} of {share['of']} = {100 * share['share']:.1f} % ({bound})"


def _hits(share: dict | None) -> str:
    return f"{share['hits']} of {share['of']}" if share and share["of"] else "-"


def _areas(bugs: list[dict]) -> str:
    rows = []
    for area in dict.fromkeys(row["area"] for row in bugs):
        own = [row for row in bugs if row["area"] == area]
        ours = {"bugs": len(own), "caught": sum(row["is_caught"] for row in own)}
        ours["named first"] = sum(row["is_named"] for row in own)
        rows.append({"area": area, **ours, **{tool: _caught_by(tool, own) for tool in TOOLS}})
    return format_table(rows)


def _caught_by(tool: str, bugs: list[dict]) -> int | None:
    steps = [row["others"][tool] for row in bugs if tool in row["others"]]
    return sum(step is not None for step in steps) if steps else None


def _bugs(bugs: list[dict]) -> str:
    return format_table(
        [
            {
                "bug": row["name"],
                "first finding": row["first"],
                "step": row["step"],
                "onset": row["onset"],
                "named": _named(row),
                "learned, nats": _nats(row["learned"]),
            }
            for row in bugs
        ]
    )


def _named(row: dict) -> str:
    if not row["is_caught"]:
        return "-"
    return "yes" if row["is_named"] else f"no ({(*row['names'], 'no id fits')[0]})"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _missed(bugs: list[dict]) -> str:
    missed = [row for row in bugs if not row["is_caught"]]
    rows = [
        {
            "bug": row["name"],
            "learned, nats": _nats(row["learned"])
            + (f" ± {row['learned_error']:.3f}" if row.get("learned_error") is not None else ""),
            "reported, nats": _nats(row["reported"]),
            "why it stays unseen": WHY_MISSED.get(row["name"], "-"),
        }
        for row in sorted(missed, key=lambda row: -abs(row["learned"] or 0))
    ]
    return format_table(rows) if rows else "None."


def _alarms(parts) -> str:
    """A twin that parts share was one run, as in the summary."""
    runs = {row["setting"]: row for part in parts for row in part["healthy"]}.values()
    counts = Counter((OURS, finding) for row in runs for finding, _, _ in row["alarms"])
    counts += Counter((tool, what) for row in runs for tool in TOOLS for what in row["others"].get(tool, ()))
    rows = [{"tool": tool, "alarm": what, "runs": count} for (tool, what), count in counts.most_common()]
    return format_table(sorted(rows, key=lambda row: (OURS, *TOOLS).index(row["tool"]))) if rows else "None."


def _crashes(results: dict) -> list[str]:
    counts = Counter(crash["tool"] for crash in results.get("crashes", ()))
    return [f"Crashes of other tools: {', '.join(f'{tool} {count}' for tool, count in counts.items())}."] * bool(
        counts
    )


def _judged(judged: dict[str, dict]) -> list[str]:
    rows = [
        {
            "guard": name,
            "runs with something to judge": judged[name]["meant"],
            "judged, % of them": _percent(judged[name]["runs"]),
            "of their steps, % (median)": _percent(judged[name]["steps"]),
        }
        for name in FINDING_IDS
        if name in judged
    ]
    return [format_table(rows), NOTE]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"
