"""`python -m tests.zoo [--only NAME ... | --add [NAME ...]] [--json]`: runs the zoo; writes RESULTS.md, results.json.

`--add`: runs only the bugs and healthy runs that results.json does not hold yet, and those named, and says so in
RESULTS.md. `--only`: bugs or healthy runs by name, a part such as `held_out_3`, or an area such as `data`; prints
what they found and writes nothing. `--json`: the last thing on stdout is one object, all else goes to stderr.
"""

import argparse
import difflib
import json
import math
import os
import platform
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from recipe.guards import FINDING_IDS
from tests.benchmarks.results import commit
from tests.zoo.bug import Bug
from tests.zoo.cases import PARTS, bugs_of, healthy_of
from tests.zoo.pool import Task, run_tasks
from tests.zoo.remains import NO_EFFECT
from tests.zoo.results import TOOLS, format_results
from tests.zoo.score import difference, judged_shares, over_seeds, score_bug, score_healthy, summarize
from tests.zoo.setting import Setting

FOLDER = Path(__file__).parent
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "trl")
PACKAGES += ("trainproof", "losslint", "torch-audit", "trainsight-preflight")
SEEDS = (1, 2)  # besides the setting's own, for bugs that nobody caught
say = partial(print, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", nargs="+", action="extend", metavar="NAME")
    parser.add_argument(
        "--add", nargs="*", metavar="NAME", help="run what results.json does not hold yet, and NAMEs again"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", type=int, help="runs at the same time; default: one a core")
    arguments = parser.parse_args()
    if arguments.processes is not None and arguments.processes < 1:
        parser.error(f"--processes {arguments.processes}: at least 1")
    parts = {part: (bugs_of(part), healthy_of(part)) for part in PARTS}
    if arguments.only:
        check_names(arguments.only, parts, parser)
        parts = {part: chosen(part, *parts[part], set(arguments.only)) for part in parts}
    if arguments.add is not None and arguments.only:
        parser.error("--add and --only: choose one")
    if arguments.add is not None:
        check_names(arguments.add, parts, parser)
        recorded = json.loads((FOLDER / "results.json").read_text())
        results = add_missing(recorded, parts, {*arguments.add}, arguments.processes)
    else:
        results = run_zoo(parts, arguments.processes)
    if not arguments.only:
        (FOLDER / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        (FOLDER / "RESULTS.md").write_text(format_results(results))
    if arguments.json:
        print(json.dumps(results, allow_nan=False))
    elif arguments.only:
        print(format_results(results))
    for problem in results["problems"]:
        say(f"PROBLEM {problem}")
    return 1 if results["problems"] else 0


def check_names(names: list[str], parts: dict, parser: argparse.ArgumentParser) -> None:
    bugs = [bug for part_bugs, _ in parts.values() for bug in part_bugs]
    known = {*PARTS, *(bug.name for bug in bugs), *(bug.area for bug in bugs)}
    known |= {name for _, healthy in parts.values() for name in healthy}
    for name in names:
        if name not in known:
            close = [each for each in known if each.startswith(name)][:3] or difflib.get_close_matches(
                name, known, n=3
            )
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            parser.error(f"--only {name!r}: no bug, healthy run, part or area is called so{hint}")


def chosen(part: str, bugs: list[Bug], healthy: dict[str, Setting], names: set[str]):
    if part in names:
        return bugs, healthy
    kept = [bug for bug in bugs if bug.name in names or bug.area in names]
    return kept, {name: setting for name, setting in healthy.items() if name in names}


def run_zoo(
    parts: dict[str, tuple[list[Bug], dict[str, Setting]]], processes: int | None = None, *, only_guards: bool = False
) -> dict:
    """Every bug, its healthy twin (one for all bugs of a setting) and every healthy run of the parts, scored.
    `only_guards`: without other tools and without `measure_missed`."""
    start = time.perf_counter()
    tasks = [task for bugs, healthy in parts.values() for task in tasks_of(bugs, healthy)]
    if only_guards:
        tasks = [task._replace(with_others=False) for task in tasks]
    records, problems = run_all(list({task.key: task for task in tasks}.values()), processes)
    results = {"environment": environment(), "runs": len(records), "parts": {}, "problems": problems}
    for part, (bugs, healthy) in parts.items():
        rows, problems_of_bugs = score_bugs(bugs, records)
        results["problems"] += problems_of_bugs
        silent = score_all_healthy(bugs, healthy, records)
        results["parts"][part] = {"bugs": rows, "healthy": silent}
    healthy_records = [records[task.key] for task in tasks if task.bug is None and "error" not in records[task.key]]
    if not only_guards:
        results["runs"] += measure_missed(parts, results, records, processes)
    for part in results["parts"].values():
        part["summary"] = summarize(part["bugs"], part["healthy"], TOOLS)
    results["judged"] = judged_shares(healthy_records, FINDING_IDS)
    results["crashes"] = [{"run": key, **crash} for key, run in records.items() for crash in run.get("crashes", ())]
    results["seconds"] = time.perf_counter() - start
    return finite(results)


def add_missing(recorded: dict, parts: dict, again: set[str], processes: int | None) -> dict:
    """Runs what the recorded results lack, and the names `again`. All else stays as it was found, by the guards of its
    own commit."""
    empty = {"bugs": [], "healthy": []}
    old = {part: recorded["parts"].get(part, empty) for part in parts}
    names = {part: {row["name"] for row in rows["bugs"] + rows["healthy"]} - again for part, rows in old.items()}
    missing = {
        part: (
            [bug for bug in bugs if bug.name not in names[part]],
            {name: setting for name, setting in healthy.items() if name not in names[part]},
        )
        for part, (bugs, healthy) in parts.items()
    }
    new = run_zoo(missing, processes)
    results = {**recorded, "parts": {}, "problems": recorded["problems"] + new["problems"]}
    for part, (bugs, _) in parts.items():
        rows = {row["name"]: row for row in old[part]["bugs"] + new["parts"][part]["bugs"]}
        healthy = {_healthy_key(row): row for row in old[part]["healthy"] + new["parts"][part]["healthy"]}
        results["parts"][part] = {
            "bugs": [rows[bug.name] for bug in bugs if bug.name in rows],
            "healthy": list(healthy.values()),
        }
        results["parts"][part]["summary"] = summarize(*results["parts"][part].values(), TOOLS)
    added = {name: new[name] for name in ("environment", "runs", "seconds")}
    results["added"] = [*recorded.get("added", ()), {**added, "names": sorted(_names(missing))}]
    return results


def _healthy_key(row: dict) -> str:
    """Twins go by their setting, which several bugs may share; others by name: settings may read the same."""
    return row["setting"] if row["name"].startswith("twin of ") else f"healthy {row['name']}"


def _names(parts: dict) -> set[str]:
    return {name for bugs, healthy in parts.values() for name in (*(bug.name for bug in bugs), *healthy)}


def tasks_of(bugs: list[Bug], healthy: dict[str, Setting]) -> list[Task]:
    """Without doubles: bugs of one setting share a twin, and a healthy run may be one."""
    tasks = [Task(bug.setting, bug) for bug in bugs] + [Task(bug.setting) for bug in bugs]
    tasks += [Task(setting) for setting in healthy.values()]
    return list({task.key: task for task in tasks}.values())


def run_all(tasks: list[Task], processes: int | None) -> tuple[dict[str, dict], list[str]]:
    records, problems = {}, []
    for number, (task, record) in enumerate(run_tasks(tasks, processes), 1):
        records[task.key] = record
        name = task.bug.name if task.bug else f"healthy ({task.setting.describe()})"
        if "error" in record:
            problems.append(f"{name}: {record['error']}")
        said = [f"{each['id']} {each['step']}" for each in record.get("findings", []) if each["severity"] != "info"]
        seconds = record.get("seconds", math.nan)
        say(f"{number:3d}/{len(tasks)} {seconds:5.1f} s  {name}: {', '.join(said) or record.get('error', 'silent')}")
    return records, problems


def score_bugs(bugs: list[Bug], records: dict[str, dict]) -> tuple[list[dict], list[str]]:
    rows, problems = [], []
    for bug in bugs:
        record, twin = records[Task(bug.setting, bug).key], records[Task(bug.setting).key]
        if "error" in record or "error" in twin:
            continue
        row = score_bug(bug.names, bug.onset, record, twin)
        about = {"name": bug.name, "what": bug.what, "names": bug.names, "area": bug.area, "mechanism": bug.mechanism}
        rows.append({**about, "source": bug.source, "onset": bug.onset, "setting": bug.setting.describe(), **row})
        problems += [f"{bug.name}: {problem}" for problem in without_effect(rows[-1])]
    return rows, problems


def without_effect(row: dict) -> list[str]:
    """A bug that does nothing measures nothing, unless that is what its report is about."""
    if not row["took_effect"]:
        return ["its code never ran"]
    if row["is_same_as_twin"] and not row["is_caught"] and row["name"] not in NO_EFFECT:
        return ["its code ran and changed nothing: losses, weights and evaluations are those of its healthy twin"]
    return []


def measure_missed(parts: dict, results: dict, records: dict[str, dict], processes: int | None) -> int:
    """Bugs that nobody caught run with more seeds, beside their twins: what they change in what is learned is then a
    mean with its error, since on one seed a change of order or of rounding moves the loss by some hundredths too."""
    missed = {row["name"]: row for part in results["parts"].values() for row in part["bugs"] if not row["is_caught"]}
    bugs = {bug.name: bug for part_bugs, _ in parts.values() for bug in part_bugs if bug.name in missed}
    settings = {name: [bug.setting.changed(seed=seed) for seed in SEEDS] for name, bug in bugs.items()}
    tasks = [Task(setting, bugs[name]) for name in bugs for setting in settings[name]]
    tasks += [Task(setting) for name in bugs for setting in settings[name]]
    more, problems = run_all(
        [task for task in {t.key: t for t in tasks}.values() if task.key not in records], processes
    )
    results["problems"] += problems
    known = {**records, **more}
    for name, bug in bugs.items():
        pairs = [(known[Task(each, bug).key], known[Task(each).key]) for each in (bug.setting, *settings[name])]
        pairs = [pair for pair in pairs if not any("error" in record for record in pair)]
        missed[name].update(over_seeds([difference(*(each["learned_loss"] for each in pair)) for pair in pairs]))
    return len(more)


def score_all_healthy(bugs: list[Bug], healthy: dict[str, Setting], records: dict[str, dict]) -> list[dict]:
    named = {Task(setting).key: (name, setting) for name, setting in healthy.items()}
    for bug in bugs:
        named.setdefault(Task(bug.setting).key, (f"twin of {bug.name}", bug.setting))
    about = {key: {"name": name, "setting": setting.describe()} for key, (name, setting) in named.items()}
    return [{**about[key], **score_healthy(records[key])} for key in about if "error" not in records[key]]


def environment() -> dict:
    versions = {package: version(package) for package in PACKAGES}
    when = {"date": date.today().isoformat(), "commit": commit()}
    return {**when, "cpus": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def finite(value):
    """JSON has no infinity: weights that are no numbers are a loss of 999."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else 999.0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        sys.exit(130)
