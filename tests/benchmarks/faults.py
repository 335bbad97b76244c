"""`python -m tests.benchmarks.faults [--rounds N] [--json]`: kills, damages, disks, networks, NaNs, ...

Each case ends or disturbs a tiny run, lets it finish, and compares it with one that nothing disturbed: final weights
bit for bit, and every row that was trained on. Results are kept in runs/faults/ as they come, so that a command that
was cut short goes on where it was, if the code is the same. Writes its section of RESULTS.md when all cases are done.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.benchmarks import fault_cases as cases_of
from tests.benchmarks.fault_cases import Bench, Case, run_case
from tests.benchmarks.fault_run import PHASES, STEPS, warm_up
from tests.benchmarks.results import RESULTS, ROOT, Result, format_section, write_section

# Cases of one round, by kind.
COUNTS = {f"kill: {phase}": 11 for phase in PHASES} | {
    cases_of.ANY_MOMENT: 20, cases_of.FLIPPED: 60, cases_of.CUT: 40, cases_of.FULL_DISK: 10, cases_of.DISK: 10,
    cases_of.NETWORK: 20, cases_of.NAN: 10, cases_of.ROLLBACK: 10, cases_of.LOST_RANK: 10,
}  # fmt: skip
QUICK = {kind: 1 for kind in COUNTS} | {cases_of.NETWORK: 2, cases_of.LOST_RANK: 0}


def measure(counts: dict[str, int], rounds: int, jobs: int, minutes: float, kept: Path | None) -> list[Case]:
    """The cases that are in `kept` already, and those that `minutes` suffice for, which are added to it."""
    warm_up()
    end = time.monotonic() + 60 * minutes
    wanted = [(kind, number) for kind, count in counts.items() for number in range(count * rounds)]
    done = {(case.kind, case.number): case for case in read_kept(kept)}
    missing = [each for each in wanted if each not in done]
    with tempfile.TemporaryDirectory(prefix="recipe-faults-") as folder:
        bench = Bench(Path(folder))
        if missing:
            bench.begin({kind for kind, _ in missing})
        for case in run_cases(bench, missing, jobs, end):
            print(f"{len(done) + 1} of {len(wanted)} | {json.dumps(vars(case))}", file=sys.stderr, flush=True)
            done[case.kind, case.number] = case
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps(vars(case)) + "\n")
    return [done[each] for each in wanted if each in done]


def run_cases(bench: Bench, missing: list[tuple[str, int]], jobs: int, end: float) -> Iterator[Case]:
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        futures = [pool.submit(_run_until, end, bench, *each) for each in missing]
        for future in as_completed(futures):
            if (case := future.result()) is not None:
                yield case


def _run_until(end: float, bench: Bench, kind: str, number: int) -> Case | None:
    return run_case(bench, kind, number) if time.monotonic() < end else None


def kept_file() -> Path:
    """Named after what decides the results: the recipe's code, and that of the faults."""
    code = [*(ROOT / "recipe").rglob("*.py"), *Path(__file__).parent.glob("fault*.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()[:12]
    path = ROOT / f"runs/faults/{digest}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_kept(path: Path | None) -> list[Case]:
    if path is None or not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Case(**json.loads(line)) for line in lines if line.endswith("\n")]


# --- the report


def summarize(cases: list[Case]) -> list[dict]:
    kinds = defaultdict(list)
    for case in cases:
        kinds[case.kind].append(case)
    kinds["all"] = cases
    return [
        {
            "fault": kind,
            "cases": len(each),
            "survived": sum(case.survived for case in each),
            "weights bit-equal": sum(case.is_equal for case in each),
            "rows lost or repeated": sum(case.wrong_rows for case in each),
            "damage accepted": sum(case.damage_accepted for case in each),
            "hangs": sum(case.has_hung for case in each),
            "steps lost, mean": sum(case.steps_lost for case in each) / len(each),
            "most": max(case.steps_lost for case in each),
        }
        for kind, each in kinds.items()
    ]


def describe(cases: list[Case]) -> str:
    """Which moments and files the cases met."""

    def count(*kinds: str) -> str:
        found = Counter(case.what.split(": ")[0] for case in cases if case.kind in kinds)
        return ", ".join(f"{name} {number}" for name, number in found.most_common())

    seconds = [case.seconds_to_end for case in cases if case.seconds_to_end is not None]
    again = f"\n\nLost ranks were started again after {min(seconds)} to {max(seconds)} seconds." if seconds else ""
    return (
        f"Kills at any moment came in: {count(cases_of.ANY_MOMENT)}.\n\nDamaged files: "
        f"{count(cases_of.FLIPPED, cases_of.CUT)}.{again}"
    )


MEASURED = f"""A run of {STEPS} steps with a checkpoint every two and two evaluations; each case in forked
processes, with `auto` to finish it. Survived: ended well, without a traceback. Rows: against the canonical order.
Steps lost: from the checkpoint to the step in which the run ended, trained again.

- kill: SIGKILL in the phase that is named, at a random step and place in it; write, commit (syncs and hashes), rename
  and rotation are parts of a save. Any moment: by the clock, from outside, in the time from the first step to the end.
- flipped bit; cut, emptied or deleted: one file of the newest checkpoint, at a random place. The files take turns.
- full disk, one write: the error of a full device is raised in a save; the run goes on without this checkpoint.
- disk script: no file can grow beyond a limit (RLIMIT_FSIZE), for a while or for good, or the output directory is
  deleted. Where it stays the run ends with exit code 4, and is resumed without the limit.
- network script: a loopback HTTP server fails in ten ways, for two requests or for good. Where it stays the run ends
  with exit code 4 and at most three lines of error, and is resumed.
- NaN: the loss of one step; bit-equal are the weights before and after it.
- rollback: to an older checkpoint, then killed.
- lost rank: SIGKILL to one of two gloo ranks; torchrun starts both again."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="each of all cases, with other random places")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share the cases")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop then; the same command goes on")
    parser.add_argument("--json", action="store_true", help="print every case")
    parser.add_argument("--quick", action="store_true", help="one or two of each kind; writes nothing")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.jobs) < 1:
        parser.error("--rounds and --jobs must be at least 1")
    counts, kept = (QUICK, None) if arguments.quick else (COUNTS, kept_file())
    cases = measure(counts, arguments.rounds, arguments.jobs, arguments.minutes, kept)
    is_whole = len(cases) == sum(counts.values()) * arguments.rounds
    if is_whole:
        minutes = sum(case.seconds for case in cases) / 60
        note = f"{describe(cases)}\n\nAll cases together, one after the other: {minutes:.0f} minutes."
        result = Result(
            "kills, damages, disks, networks, NaNs, rollbacks, lost ranks", MEASURED, summarize(cases), note
        )
        section = format_section("faults", result, f"python -m tests.benchmarks.faults --rounds {arguments.rounds}")
        print(section, file=sys.stderr)
        if kept is not None:
            write_section("faults", section, RESULTS)
            kept.unlink()  # the next command measures again
    if arguments.json:
        print(json.dumps([vars(case) for case in cases]))
    sys.exit(not is_whole or not all(is_good(case) for case in cases))


def is_good(case: Case) -> bool:
    bad = case.wrong_rows or case.has_hung or case.damage_accepted
    return case.survived and case.is_equal and not bad


if __name__ == "__main__":
    main()
