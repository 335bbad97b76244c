"""`python -m tests.reports [--only NAME ...] [--json]`: runs programs of public reports and writes docs/reports.md.

`--only`: some reports by name; prints the page and writes nothing. `--json`: the last thing on stdout is one object.
The exit code is 1 where a run failed, or a report's code never ran.
"""

import argparse
import json
import sys
import time
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.results import commit
from tests.reports import found, given
from tests.reports.page import format_page
from tests.reports.report import Report
from tests.zoo.pool import run_tasks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reports.md"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "trl", "peft")
PARTS = {"given": given.REPORTS, "found": found.REPORTS}
say = partial(print, file=sys.stderr, flush=True)


def main() -> int:
    known = {report.name for reports in PARTS.values() for report in reports}
    parser = argparse.ArgumentParser(prog="python -m tests.reports", description=__doc__)
    parser.add_argument("--only", nargs="+", action="extend", metavar="NAME", choices=sorted(known))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", type=int, help="runs at the same time; default: one a core")
    arguments = parser.parse_args()
    wanted = set(arguments.only or known)
    parts = {part: [report for report in reports if report.name in wanted] for part, reports in PARTS.items()}
    results = run_reports(parts, arguments.processes)
    if not arguments.only:
        PAGE.write_text(format_page(results))
    if arguments.json:
        print(json.dumps(results))
    elif arguments.only:
        print(format_page(results))
    for problem in results["problems"]:
        say(f"PROBLEM {problem}")
    return 1 if results["problems"] else 0


def run_reports(parts: dict[str, list[Report]], processes: int | None = None) -> dict:
    """A row for each report, by part; JSON-able."""
    start = time.perf_counter()
    tasks = [task for reports in parts.values() for report in reports for task in report.tasks]
    records, problems = {}, []
    for task, record in run_tasks(list({task.key: task for task in tasks}.values()), processes):
        records[task.key] = record
        name = task.setting.change.__name__
        say(f"{record.get('seconds', 0):5.1f} s  {name}: {said(record) or record.get('error', 'silent')}")
        problems += [f"{name}: {record['error']}"] if "error" in record else []
        problems += [f"{name}: its code never ran"] if record.get("effects") == 0 else []
    rows = {part: [row_of(report, records) for report in reports] for part, reports in parts.items()}
    rows = {part: [row for row in each if row] for part, each in rows.items()}
    versions = {package: version(package) for package in PACKAGES}
    about = {"date": date.today().isoformat(), "commit": commit(), "versions": versions}
    return {**about, **rows, "minutes": (time.perf_counter() - start) / 60, "problems": problems}


def row_of(report: Report, records: dict[str, dict]) -> dict | None:
    record, beside = (records[task.key] for task in report.tasks)
    if "error" in record or "error" in beside:
        return None
    return {
        "name": report.name,
        "threads": report.threads,
        "says": report.says,
        "healthy": report.healthy,
        "what": report.what,
        "said": [said(record), said(beside)],
        "steps": [record["steps"], beside["steps"]],
        "judgement": report.judge(record, beside),
        "missed": report.missed,
    }


def said(record: dict) -> list[str]:
    """What the guards said, information included."""
    texts = ("{severity} `{id}`, step {step}: {found}".format(**each) for each in record.get("findings", []))
    return [text.replace("|", "/") for text in texts]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        sys.exit(130)
