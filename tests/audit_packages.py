"""`python -m tests.audit_packages [CONSTRAINTS]`: known vulnerabilities of the pinned packages. Needs a network.

Runs pip-audit (`pip install pip-audit`, in any environment on the PATH), which asks a database about each pin, and
checks that it did: pip-audit itself exits with 0 where it has skipped packages.
Exit code 0: every pin was audited and none has a vulnerability that is not in `EXPLAINED`. 1: some has. 2: some pin
was not audited, for example without a network.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
SERVICES = ("osv", "pypi")
# Vulnerability id -> why the recipe is not affected. An entry that matches nothing any more is an error.
EXPLAINED: dict[str, str] = {}

Audited = dict[str, list[str]]  # package -> ids


def pinned(text: str) -> dict[str, str]:
    """Name -> version of each `name==version` line. Raises where a line is something else: nobody would audit it."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([\w.+!-]+)", line) for line in lines if line]
    if None in found or not found:
        raise ValueError(f"not a list of name==version: {[line for line in lines if line and '==' not in line][:3]}")
    return {canonical(match[1]): match[2] for match in found}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run_pip_audit(service: str, path: Path) -> Audited:
    """What pip-audit found of each package that it did not skip. Raises `OSError` where it does not run."""
    words = ["--requirement", str(path), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(["pip-audit", "--vulnerability-service", service, *words], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        raise OSError((done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]) from error
    return {
        canonical(each["name"]): [v["id"] for v in each["vulns"]] for each in packages if "skip_reason" not in each
    }


def audit(pins: dict[str, str], services: Iterable[Callable[[], Audited]], explained: dict[str, str]) -> int:
    """Takes the first service that audits something; prints what was found; returns the exit code."""
    found: Audited = {}
    for ask in services:
        try:
            found = ask()
        except OSError as error:
            print(f"pip-audit failed: {error}")
        if found:
            break
    missing = sorted(pins.keys() - found.keys())
    known = {name for names in found.values() for name in names}
    open_ones = [(package, name) for package, names in found.items() for name in names if name not in explained]
    stale = sorted(explained.keys() - known) if not missing else []
    for package, name in open_ones:
        print(f"VULNERABLE {package} {pins.get(package)}: {name}")
    for name in stale:
        print(f"EXPLAINED, but not found any more: {name}")
    print(
        f"{len(pins) - len(missing)} of {len(pins)} pins audited, {len(known)} vulnerabilities, {len(open_ones)} open"
    )
    if missing:
        print(f"NOT AUDITED: {', '.join(missing)}")
    return 2 if missing else 1 if open_ones or stale else 0


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else CONSTRAINTS
    services = [lambda service=service: run_pip_audit(service, path) for service in SERVICES]
    return audit(pinned(path.read_text(encoding="utf-8")), services, EXPLAINED)


if __name__ == "__main__":
    sys.exit(main())
