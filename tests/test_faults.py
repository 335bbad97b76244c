"""The short version of `python -m tests.benchmarks.faults`: a fault of each kind."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.fault_run import wrong_rows
from tests.benchmarks.faults import QUICK

ROOT = Path(__file__).resolve().parent.parent


def test_every_kind_of_fault_is_survived():
    """In a process of its own, which forks: this one may hold threads."""
    command = [sys.executable, "-m", "tests.benchmarks.faults", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    cases = json.loads(done.stdout)
    assert [case["kind"] for case in cases] == [kind for kind, count in QUICK.items() for _ in range(count)]
    for case in cases:
        assert case["survived"] and case["is_equal"], case["note"] or case
        assert not (case["wrong_rows"] or case["has_hung"] or case["damage_accepted"]), case


def test_rows_are_counted(tmp_path):
    def count(*lines: str) -> int:
        (tmp_path / "rows").write_text("\n".join(lines))
        return wrong_rows(tmp_path / "rows", steps=3, rows_per_step=2)

    assert count("begin 0", "0 1", "2 3", "4 5") == 0
    assert count("begin 0", "0 1", "2 3", "begin 2", "2 3", "4 5") == 0
    assert count("begin 0", "0 1", "2 3", "begin 2", "4 5") == 2 + 2  # displaced, and missing
    assert count("begin 0", "0 1", "begin 4", "4 5") == 2 + 2  # the second step is lost
    assert count("begin 0", "0 1", "2 3", "2 3") == 2
