"""The short version of `python -m tests.benchmarks.faults`: a fault of each kind."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.fault_cases import Case
from tests.benchmarks.fault_run import steps_again, wrong_rows
from tests.benchmarks.faults import COUNTS, QUICK, is_good, read_kept

ROOT = Path(__file__).resolve().parent.parent


def test_every_kind_of_fault_is_survived():
    """In a process of its own, which forks: this one may hold threads."""
    command = [sys.executable, "-m", "tests.benchmarks.faults", "--quick", "--json", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    cases = [Case(**case) for case in json.loads(done.stdout or "[]")]
    assert [case.kind for case in cases] == [kind for kind, count in QUICK.items() for _ in range(count)], done.stderr
    assert [case for case in cases if not is_good(case)] == [] and done.returncode == 0


def test_one_round_has_what_was_promised():
    kills = {kind.removeprefix("kill: "): count for kind, count in COUNTS.items() if kind.startswith("kill: ")}
    assert sum(kills.values()) >= 100
    assert all(kills[phase] >= 10 for phase in ("backward", "optimizer", "write", "rename", "rotation", "evaluation"))
    assert sum(kills[phase] for phase in ("write", "commit", "rename", "rotation")) >= 30
    others = {"flipped bit": 60, "cut, emptied or deleted": 40, "full disk: one write": 10, "network script": 20}
    others |= {"lost rank": 10, "NaN": 10, "rollback": 10}
    assert all(COUNTS[kind] >= count for kind, count in others.items())


def test_results_are_kept_but_for_the_line_that_was_cut(tmp_path):
    case = Case("NaN", 3, survived=True)
    assert read_kept(None) == read_kept(tmp_path / "none") == []
    (tmp_path / "kept").write_text(json.dumps(vars(case)) + "\n" + json.dumps(vars(case))[:-4])
    assert read_kept(tmp_path / "kept") == [case]


def test_rows_are_counted(tmp_path):
    def count(*lines: str) -> int:
        (tmp_path / "rows").write_text("\n".join(lines))
        return wrong_rows(tmp_path / "rows", steps=3, rows_per_step=2)

    (tmp_path / "rows").write_text("begin 0\n0 1 2 3\n4 5 6 7\n8 9 10 11\nbegin 4\n4 5 6 7\nbegin 0\n")
    assert steps_again(tmp_path / "rows") == 2 + 2  # from step 3 to the end of step 1; from step 2 to the beginning

    assert count("begin 0", "0 1", "2 3", "4 5") == 0
    assert count("begin 0", "0 1", "2 3", "begin 2", "2 3", "4 5") == 0
    assert count("begin 0", "0 1", "2 3", "begin 2", "4 5") == 2 + 2  # displaced, and missing
    assert count("begin 0", "0 1", "begin 4", "4 5") == 2 + 2  # the second step is lost
    assert count("begin 0", "0 1", "2 3", "2 3") == 2
