"""`python -m tests.benchmarks.faults [--rounds N] [--json]`: kills, damages, NaNs, rollbacks, ... of a tiny run.

Each case ends or disturbs a run, lets `--resume_from_checkpoint auto` finish it, and compares it with one that nothing
disturbed: final weights bit for bit, and every row that was trained on. Writes its section of RESULTS.md.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tests.benchmarks import fault_run
from tests.benchmarks.fault_run import PHASES, ROWS, STEPS, TIMEOUT, Fault, in_child, train, wrong_rows
from tests.benchmarks.results import RESULTS, Result, format_section, write_section

# Cases of one round, by kind.
COUNTS = {f"kill: {phase}": 13 for phase in PHASES} | {"flipped bit": 60, "cut, emptied or deleted": 40}
COUNTS |= {"full disk": 10, "NaN": 10, "rollback": 10, "lost rank": 10}
QUICK = {kind: 1 for kind in COUNTS} | {"flipped bit": 2, "cut, emptied or deleted": 2, "lost rank": 0}


@dataclass
class Case:
    """`steps_lost`: that were trained again. `damage_accepted`: a damaged checkpoint was resumed from."""

    kind: str
    survived: bool = False
    steps_lost: int = 0
    wrong_rows: int = 0
    is_equal: bool = False
    has_hung: bool = False
    damage_accepted: bool = False
    seconds_to_end: float = 0.0
    note: str = ""


@dataclass
class Bench:
    """`folder`: of all cases. `reference`: the run directory of the run that nothing disturbed."""

    folder: Path
    chance: random.Random
    num_cases: int = 0
    reference: Path = field(default_factory=Path)
    of_two: Path | None = None

    def begin(self) -> None:
        (self.folder / "setting").mkdir()
        assert in_child(lambda: fault_run.write_setting(self.folder / "setting"), self.folder / "setting.log") == 0
        self.reference = self.new_folder() / "run"
        assert self.run(self.reference) == 0, (self.reference.parent / "log").read_text()[-2000:]

    def new_folder(self) -> Path:
        self.num_cases += 1
        folder = self.folder / f"case-{self.num_cases}"
        folder.mkdir()
        return folder

    def run(self, run_dir: Path, fault: Fault | None = None, resume: str = "auto", *words: str) -> int | None:
        """The exit code; negative for a signal, None where it hung."""
        config = str(self.folder / "setting/config.json")
        command = [config, "--output_dir", str(run_dir), "--resume_from_checkpoint", resume, "--use_cpu", "true"]
        command, folder = [*command, *words], run_dir.parent
        return in_child(lambda: train(command, fault, folder / "rows"), folder / "log")

    def run_two(self, run_dir: Path, fault: Fault) -> int | None:
        """On two ranks. The exit code that rank 0 reports, -9 where it could not; None where it hung."""
        folder, exit_file = run_dir.parent, run_dir.parent / "exit.json"
        exit_file.write_text("")
        files = {"ROWS": folder / "rows", "STRUCK": folder / "struck", "RECIPE_EXIT_FILE": exit_file}
        known = {
            "FAULT": json.dumps(vars(fault)),
            "OMP_NUM_THREADS": "1",
            **{key: str(at) for key, at in files.items()},
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "tests.benchmarks.fault_run", "train", str(self.folder / "setting/config.json")]
        command += ["--output_dir", str(run_dir), "--resume_from_checkpoint", "auto", "--use_cpu", "true"]
        command += ["--per_device_train_batch_size", str(ROWS // 2)]
        with (folder / "log").open("a") as log:
            try:
                subprocess.run(command, env=os.environ | known, stdout=log, stderr=log, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return None
        return json.loads(exit_file.read_text() or '{"code": -9}')["code"]

    def finish(self, case: Case, run_dir: Path) -> Case:
        """Let it go on, and compare."""
        before = last_step(run_dir.parent / "rows")
        code = self.run(run_dir)
        log = (run_dir.parent / "log").read_text()
        case.has_hung |= code is None
        case.survived = code == 0 and "Traceback" not in log
        resumed = json.loads((run_dir / "run.json").read_text())["resumed_from"]
        case.steps_lost = before - (int(resumed.rsplit("-", 1)[1]) if resumed else 0)
        case.wrong_rows = wrong_rows(run_dir.parent / "rows")
        case.is_equal = code == 0 and weights(run_dir) == weights(self.reference)
        if not case.survived:
            case.note = log[-1500:]
        return case


def last_step(rows: Path) -> int:
    """The step whose rows were read last."""
    last = rows.read_text().splitlines()[-1].split()
    return int(last[1]) // ROWS if last[0] == "begin" else int(last[-1]) // ROWS + 1


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final/model.safetensors").read_bytes()


# --- the cases


def kill(bench: Bench, phase: str) -> Case:
    run_dir = bench.new_folder() / "run"
    steps = {"evaluation": (1, 5), "rotation": (5, 7)}.get(phase, range(1, STEPS + 1))
    if phase in ("write", "commit", "rename"):
        steps = range(1, STEPS)
    fault = Fault(phase, bench.chance.choice(list(steps)), bench.chance.random())
    code = bench.run(run_dir, fault, "auto", "--save_total_limit", "2")
    case = bench.finish(Case(f"kill: {phase}"), run_dir)
    case.has_hung |= code is None
    if code != -9:
        case.survived, case.note = False, f"{fault} did not strike ({code}): {case.note}"
    return case


def damage(bench: Bench, kind: str) -> Case:
    """Of one file of the newest checkpoint of a finished run, whose results are gone."""
    folder = bench.new_folder()
    run_dir = folder / "run"
    shutil.copytree(bench.reference, run_dir)
    shutil.copy(bench.reference.parent / "rows", folder / "rows")
    shutil.rmtree(run_dir / "final")
    newest = run_dir / f"checkpoint-{STEPS}"
    path = bench.chance.choice(sorted(each for each in newest.rglob("*") if each.is_file()))
    data = bytearray(path.read_bytes())
    if kind == "flipped bit":
        data[bench.chance.randrange(len(data))] ^= 1 << bench.chance.randrange(8)
        path.write_bytes(data)
    elif (how := bench.chance.randrange(3)) == 0:
        path.unlink()
    else:
        path.write_bytes(data[: 0 if how == 1 else bench.chance.randrange(len(data))])
    case = bench.finish(Case(kind), run_dir)
    resumed = json.loads((run_dir / "run.json").read_text())["resumed_from"]
    case.damage_accepted = resumed is None or Path(resumed).name == newest.name
    return case


def full_disk(bench: Bench) -> Case:
    """In one of the saves; the run goes on to its end by itself, and then once more from the last checkpoint."""
    run_dir = bench.new_folder() / "run"
    phase = bench.chance.choice(["write", "commit", "rename"])
    code = bench.run(run_dir, Fault(phase, bench.chance.randrange(1, STEPS), bench.chance.random(), "full"))
    case = Case("full disk", has_hung=code is None)
    log = (run_dir.parent / "log").read_text()
    case.survived = code == 0 and "no checkpoint, training goes on" in log
    case.note = "" if case.survived else f"{phase} {code} {log[-1500:]}"
    case.wrong_rows = wrong_rows(run_dir.parent / "rows")
    case.is_equal = code == 0 and weights(run_dir) == weights(bench.reference)
    case.damage_accepted = any(find_problems(path) for path in run_dir.glob("checkpoint-*"))
    return case


def find_problems(path: Path) -> list[str]:
    from recipe.checkpoints import problems_of

    return problems_of(path, is_deep=True)


def not_finite(bench: Bench) -> Case:
    """The loss of one step. `is_equal`: the weights after it are those before it."""
    run_dir = bench.new_folder() / "run"
    step = bench.chance.randrange(2, STEPS + 1)
    code = bench.run(run_dir, Fault("forward", step, action="nan"), "auto", "--save_steps", "1")
    case = Case("NaN", survived=code == 0, has_hung=code is None, wrong_rows=wrong_rows(run_dir.parent / "rows"))
    files = [(run_dir / f"checkpoint-{each}/model.safetensors").read_bytes() for each in (step - 1, step)]
    case.is_equal = files[0] == files[1]
    case.note = "" if case.survived else (run_dir.parent / "log").read_text()[-1500:]
    return case


def rollback(bench: Bench) -> Case:
    """To an older checkpoint of a finished run, then killed; `auto` must not take the ones that were abandoned."""
    folder = bench.new_folder()
    run_dir = folder / "run"
    shutil.copytree(bench.reference, run_dir)
    shutil.copy(bench.reference.parent / "rows", folder / "rows")
    first = bench.chance.choice([2, 4])
    step = bench.chance.randrange(first + 1, STEPS + 1)
    bench.run(run_dir, Fault("backward", step), str(run_dir / f"checkpoint-{first}"))
    case = bench.finish(Case("rollback"), run_dir)
    resumed = int(json.loads((run_dir / "run.json").read_text())["resumed_from"].rsplit("-", 1)[1])
    expected = max(first, (step - 1) // 2 * 2)
    case.damage_accepted = resumed > expected
    if resumed != expected:
        case.survived, case.note = False, f"resumed from {resumed}, not {expected}"
    return case


def lost_rank(bench: Bench) -> Case:
    """Of two, SIGKILL to one; then `auto` finishes it. Held against a run of two ranks that nothing disturbed."""
    if bench.of_two is None:
        bench.of_two = bench.new_folder() / "run"
        assert bench.run_two(bench.of_two, Fault("none", 0)) == 0
    run_dir = bench.new_folder() / "run"
    phase = bench.chance.choice(["forward", "backward", "optimizer", "write", "evaluation"])
    step = bench.chance.randrange(1, 5) if phase == "evaluation" else bench.chance.randrange(1, STEPS)
    rank = 0 if phase == "write" else bench.chance.randrange(2)
    fault = Fault(phase, step, bench.chance.random() / 2, rank=rank)
    case = Case("lost rank", has_hung=bench.run_two(run_dir, fault) is None)
    case.seconds_to_end = time.time() - (run_dir.parent / "struck").stat().st_mtime
    code = bench.run_two(run_dir, Fault("none", 0))
    case.has_hung |= code is None
    case.survived = code == 0
    case.wrong_rows = sum(wrong_rows(run_dir.parent / f"rows-{rank}", rank=rank, ranks=2) for rank in range(2))
    case.is_equal = code == 0 and weights(run_dir) == weights(bench.of_two)
    case.note = "" if case.survived else f"{fault} {(run_dir.parent / 'log').read_text()[-1500:]}"
    return case


def make_cases(bench: Bench, counts: dict[str, int]) -> Iterator[Case]:
    actions: dict[str, Callable[[], Case]] = {f"kill: {phase}": lambda p=phase: kill(bench, p) for phase in PHASES}
    actions |= {kind: lambda k=kind: damage(bench, k) for kind in ("flipped bit", "cut, emptied or deleted")}
    actions |= {"full disk": lambda: full_disk(bench), "NaN": lambda: not_finite(bench)}
    actions |= {"rollback": lambda: rollback(bench), "lost rank": lambda: lost_rank(bench)}
    for kind, count in counts.items():
        for _ in range(count):
            case = actions[kind]()
            print(json.dumps(vars(case)), file=sys.stderr, flush=True)
            yield case


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
            "damaged accepted": sum(case.damage_accepted for case in each),
            "hangs": sum(case.has_hung for case in each),
            "steps trained again, mean": sum(case.steps_lost for case in each) / len(each),
            "most": max(case.steps_lost for case in each),
            "seconds to end, most": max(case.seconds_to_end for case in each) or None,
        }
        for kind, each in kinds.items()
    ]


def measure(counts: dict[str, int], seed: int = 0) -> list[Case]:
    import recipe.__main__
    import recipe.train  # noqa: F401  imported before the forks

    with tempfile.TemporaryDirectory(prefix="recipe-faults-") as folder:
        bench = Bench(Path(folder), random.Random(seed))
        bench.begin()
        return list(make_cases(bench, counts))


def measure_in_parallel(counts: dict[str, int], rounds: int, jobs: int) -> list[Case]:
    shares = [{kind: count // jobs + (job < count % jobs) for kind, count in counts.items()} for job in range(jobs)]
    seeds = [1000 * number + job for number in range(rounds) for job in range(jobs)]
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        cases = [case for part in pool.map(measure, shares * rounds, seeds) for case in part]
    return sorted(cases, key=lambda case: [*counts].index(case.kind))


MEASURED = (
    f"A run of {STEPS} steps with a checkpoint every two and two evaluations; each case in forked processes, with "
    "`auto` to finish it. Kills are SIGKILL in the phase that is named, at a random step and place in it; write, "
    "commit (syncs and hashes), rename and rotation are parts of a save. Damages: one file of the newest checkpoint, "
    "a random bit or length. Full disk: the error of a full device is injected into a save, and the run goes on "
    "without this checkpoint. NaN: the loss of one step; bit-equal are the weights before and after it. Rollback: to "
    "an older checkpoint, then killed. Lost rank: SIGKILL to one of two gloo ranks; seconds until torchrun ended. "
    "Survived: ended well, without a traceback. Rows: against the canonical order. "
    "Steps trained again: from the checkpoint to the step in which the run ended."
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.faults", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="each of all cases, with other random places")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share the cases")
    parser.add_argument("--json", action="store_true", help="print every case")
    parser.add_argument("--quick", action="store_true", help="one or two of each kind; writes nothing")
    arguments = parser.parse_args()
    begin = time.monotonic()
    counts = QUICK if arguments.quick else COUNTS
    cases = measure_in_parallel(counts, arguments.rounds, arguments.jobs)
    rows, minutes = summarize(cases), (time.monotonic() - begin) / 60
    command = f"python -m tests.benchmarks.faults --rounds {arguments.rounds}"
    result = Result("kills, damages, full disks, NaNs and rollbacks", MEASURED, rows, f"{minutes:.0f} minutes.")
    section = format_section("faults", result, command)
    print(json.dumps([vars(case) for case in cases], indent=1) if arguments.json else section, flush=True)
    if not arguments.quick:
        write_section("faults", section, RESULTS)


if __name__ == "__main__":
    main()
