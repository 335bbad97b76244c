"""`python -m tests.audit [--only CLASS ...] [--json]`: silent faults in the model classes of transformers.

Without --only it audits all classes, goes on where a killed run stopped, and writes `docs/audit.md` and
`tests/audit/results.json`."""

import argparse
import json
import shutil
import sys

from tests.audit.classes import find_entries
from tests.audit.faults import confirm
from tests.audit.page import write_page
from tests.audit.pool import PROGRESS, audit_all
from tests.audit.results import summarize, write_results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these classes; writes no files")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    entries = find_entries()
    if unknown := set(given.only or ()) - set(entries):
        parser.error(f"no class in the mappings: {', '.join(sorted(unknown))}")
    chosen = [entries[name] for name in given.only or entries]
    reports, seconds = audit_all(chosen, given.processes, keep=not given.only)
    results = summarize(reports, confirm(reports), seconds)
    if not given.only:
        write_results(results)
        shutil.rmtree(PROGRESS)
        write_page(results)
    if given.json:
        print(json.dumps(results, indent=1))
    for row in results["classes"] if given.only and not given.json else []:
        print(f"{row['class']}: {row['verdict']}" + "".join(f"\n  {line}" for line in row["evidence"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
