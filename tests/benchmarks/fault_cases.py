"""The cases of `python -m tests.benchmarks.faults`: each breaks a tiny run, lets it finish, and compares."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from tests.benchmarks import fault_run
from tests.benchmarks.fault_run import (
    PHASES,
    ROWS,
    START,
    STEPS,
    TIMEOUT,
    Fault,
    in_child,
    phase_in,
    steps_again,
    train,
    wrong_rows,
)

ANY_MOMENT, FLIPPED, CUT, FULL_DISK, NETWORK, DISK, NAN, ROLLBACK, LOST_RANK = (
    "kill: any moment", "flipped bit", "cut, emptied or deleted", "full disk: one write", "network script",
    "disk script", "NaN", "rollback", "lost rank",
)  # fmt: skip


@dataclass
class Case:
    """`what`: where it was broken. `steps_lost`: that were trained again. `wrong_rows`: lost, repeated or displaced.
    `damage_accepted`: a damaged checkpoint was resumed from, or an older one was damaged."""

    kind: str
    number: int
    what: str = ""
    survived: bool = False
    steps_lost: int = 0
    wrong_rows: int = 0
    is_equal: bool = False
    has_hung: bool = False
    damage_accepted: bool = False
    seconds_to_end: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass
class Bench:
    """`folder`: of all cases. `reference`: the run directory of the run that nothing disturbed; `of_two`: the same on
    two ranks. `seconds`: from the first step of the reference to its end. `network`, `disk`: of their scripts."""

    folder: Path
    reference: Path = Path()
    of_two: Path = Path()
    seconds: float = 0.0
    network: dict | None = None
    disk: dict | None = None

    def begin(self, kinds: set[str]) -> None:
        """What the cases of these kinds are compared with."""
        folder = self.new_folder("setting")
        assert in_child(lambda: fault_run.write_setting(folder) and None, folder / "log") == 0
        self.reference = self.new_folder("reference") / "run"
        phases, started = self.reference.parent / "phase", []
        watch = partial(_note_start, phases, started)
        code = self.run(self.reference, phases=phases, is_time_to_kill=watch)
        assert code == 0, (self.reference.parent / "log").read_text()[-2000:]
        self.seconds = time.monotonic() - started[0]
        if LOST_RANK in kinds:
            self.of_two = self.new_folder("of-two") / "run"
            assert self.run_two(self.of_two, Fault("none", 0)) == 0
        if NETWORK in kinds:
            from tests.benchmarks.fault_network import begin_network

            self.network = self.call(lambda folder: asdict(begin_network(folder)), self.new_folder("network"))
        if DISK in kinds:
            from tests.benchmarks.fault_disk import begin_disk

            self.disk = self.call(lambda folder: asdict(begin_disk(folder)), self.new_folder("disk"))

    def new_folder(self, name: str) -> Path:
        folder = self.folder / name.replace(" ", "-").replace(":", "").replace(",", "")
        folder.mkdir()
        return folder

    def run(self, run_dir: Path, fault: Fault | None = None, resume: str = "auto", *words: str, **watch) -> int | None:
        """The exit code; negative for a signal, None where it hung."""
        command = [str(self.folder / "setting/config.json"), "--output_dir", str(run_dir)]
        command, folder = [*command, "--resume_from_checkpoint", resume, *words], run_dir.parent
        phases = watch.pop("phases", None)

        def action() -> int:
            if phases is not None:
                fault_run.record_phases(phases)
            return train(command, fault, folder / "rows")

        return in_child(action, folder / "log", **watch)

    def call(self, function: Callable[[Path], dict], folder: Path) -> dict | None:
        """What the function returns, in a process of its own; None where it hung."""
        result, log = folder / "result.json", folder / "log"
        code = in_child(lambda: result.write_text(json.dumps(function(folder))) and None, log)
        assert code in (0, None), log.read_text()[-3000:]
        return None if code is None else json.loads(result.read_text())

    def run_two(self, run_dir: Path, fault: Fault) -> int | None:
        """On two ranks, which torchrun starts once more. The exit code that rank 0 reports; None where it hung."""
        folder, exit_file = run_dir.parent, run_dir.parent / "exit.json"
        exit_file.write_text("")
        files = {"ROWS": "rows", "STRUCK": "struck", "AGAIN": "again", "RECIPE_EXIT_FILE": "exit.json"}
        known = {"FAULT": json.dumps(vars(fault)), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        known |= {key: str(folder / name) for key, name in files.items()}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", "-m", "tests.benchmarks.fault_run", "train"]
        command += [str(self.folder / "setting/config.json"), "--output_dir", str(run_dir)]
        command += ["--resume_from_checkpoint", "auto", "--per_device_train_batch_size", str(ROWS // 2)]
        with (folder / "log").open("a") as log:
            try:
                subprocess.run(command, env=os.environ | known, stdout=log, stderr=log, timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                return None
        return json.loads(exit_file.read_text() or '{"code": -9}')["code"]

    def finish(self, case: Case, run_dir: Path) -> Case:
        """Let it go on, and compare."""
        code = self.run(run_dir)
        log, rows = (run_dir.parent / "log").read_text(), run_dir.parent / "rows"
        case.has_hung |= code is None
        case.survived = code == 0 and "Traceback" not in log
        case.steps_lost, case.wrong_rows = steps_again(rows), wrong_rows(rows)
        case.is_equal = code == 0 and weights(run_dir) == weights(self.reference)
        case.note = "" if case.survived else log[-1500:]
        return case


def _note_start(phases: Path, started: list[float]) -> bool:
    if not started and phase_in(phases) != START:
        started.append(time.monotonic())
    return False


def weights(run_dir: Path) -> bytes:
    return (run_dir / "final/model.safetensors").read_bytes()


def resumed_from(run_dir: Path) -> int | None:
    """The step of the checkpoint that the last process began from."""
    path = json.loads((run_dir / "run.json").read_text())["resumed_from"]
    return None if path is None else int(path.rsplit("-", 1)[1])


# --- the cases


def kill(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    run_dir, phase = folder / "run", case.kind.removeprefix("kill: ")
    steps = {"evaluation": (1, 5), "rotation": (5, 7)}.get(phase, range(1, STEPS + 1))
    if phase in ("write", "commit", "rename"):
        steps = range(1, STEPS)
    fault = Fault(phase, chance.choice(list(steps)), chance.random())
    case.what = f"step {fault.step}"
    code = bench.run(run_dir, fault, "auto", "--save_total_limit", "2")
    case.has_hung = code is None
    case = bench.finish(case, run_dir)
    if code != -9:
        case.survived, case.note = False, f"{fault} did not strike ({code}): {case.note}"
    return case


def kill_at_any_moment(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """By the clock, from outside; `what` is the phase that it was in. One that was too late counts as survived."""
    phases, started, delay = folder / "phase", [], chance.uniform(0.0, bench.seconds)

    def is_time() -> bool:
        _note_start(phases, started)
        return bool(started) and time.monotonic() - started[0] >= delay

    run_dir = folder / "run"
    code = bench.run(run_dir, None, "auto", "--save_total_limit", "2", phases=phases, is_time_to_kill=is_time)
    case.has_hung, case.what = code is None, phase_in(phases) if code == -9 else "after its end"
    return bench.finish(case, run_dir)


def damage(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """Of one file of the newest checkpoint of a finished run, whose results are gone. The files take turns."""
    run_dir = _copy_of_reference(bench, folder)
    shutil.rmtree(run_dir / "final")
    newest = run_dir / f"checkpoint-{STEPS}"
    files = sorted(each for each in newest.rglob("*") if each.is_file())
    path = files[case.number % len(files)]
    data = bytearray(path.read_bytes())
    how = "a bit" if case.kind == FLIPPED else chance.choice(["deleted", "emptied", "cut"])
    if how == "a bit":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes(data[: 0 if how == "emptied" else chance.randrange(len(data))])
    case.what = f"{path.relative_to(newest)}: {how}"
    case = bench.finish(case, run_dir)
    case.damage_accepted = resumed_from(run_dir) in (None, STEPS)
    return case


def _copy_of_reference(bench: Bench, folder: Path) -> Path:
    shutil.copytree(bench.reference, folder / "run")
    shutil.copy(bench.reference.parent / "rows", folder / "rows")
    return folder / "run"


def full_disk(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """In one of the saves; the run goes on to its end by itself."""
    from recipe.checkpoints import problems_of

    run_dir, phase = folder / "run", chance.choice(["write", "commit", "rename"])
    code = bench.run(run_dir, Fault(phase, chance.randrange(1, STEPS), chance.random(), "full"))
    log = (folder / "log").read_text()
    case.what, case.has_hung = phase, code is None
    case.survived = code == 0 and "no checkpoint, training goes on" in log and "Traceback" not in log
    case.note = "" if case.survived else f"{code} {log[-1500:]}"
    case.wrong_rows = wrong_rows(folder / "rows")
    case.is_equal = code == 0 and weights(run_dir) == weights(bench.reference)
    case.damage_accepted = any(problems_of(path, is_deep=True) for path in run_dir.glob("checkpoint-*"))
    return case


def not_finite(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """The loss of one step, the last, which is always saved. `is_equal`: the weights after it are those before it."""
    run_dir, step = folder / "run", chance.randrange(2, STEPS + 1)
    code = bench.run(
        run_dir, Fault("forward", step, action="nan"), "auto", "--save_steps", "1", "--max_steps", str(step)
    )
    case.what, case.survived, case.has_hung = f"step {step}", code == 0, code is None
    case.wrong_rows = wrong_rows(folder / "rows", steps=step)
    files = [(run_dir / f"checkpoint-{each}/model.safetensors").read_bytes() for each in (step - 1, step)]
    case.is_equal = files[0] == files[1]
    case.note = "" if case.survived else (folder / "log").read_text()[-1500:]
    return case


def rollback(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """To an older checkpoint of a finished run, then killed; `auto` must not take the ones that were abandoned."""
    run_dir = _copy_of_reference(bench, folder)
    first = chance.choice([2, 4])
    step = chance.randrange(first + 1, STEPS + 1)
    case.what = f"to step {first}, killed in step {step}"
    bench.run(run_dir, Fault("backward", step), str(run_dir / f"checkpoint-{first}"))
    case = bench.finish(case, run_dir)
    case.steps_lost -= STEPS - first  # that were to be trained again
    found, expected = resumed_from(run_dir), max(first, (step - 1) // 2 * 2)
    case.damage_accepted = found is None or found > expected
    if found != expected:
        case.survived, case.note = False, f"resumed from {found}, not {expected}"
    return case


def lost_rank(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    """Of two, SIGKILL to one; torchrun ends the other and starts both again. Held against two that nothing disturbed.
    `seconds_to_end`: until they are started again."""
    run_dir, phase = folder / "run", chance.choice(["forward", "backward", "optimizer", "write", "evaluation"])
    step = chance.randrange(1, 5) if phase == "evaluation" else chance.randrange(1, STEPS)
    rank = 0 if phase == "write" else chance.randrange(2)
    case.what = f"rank {rank}, {phase}, step {step}"
    code = bench.run_two(run_dir, Fault(phase, step, chance.random() / 2, rank=rank))
    log, times = (folder / "log").read_text(), [folder / name for name in ("struck", "again")]
    case.survived, case.has_hung = code == 0 and all(path.exists() for path in times), code is None
    if case.survived:
        struck, again = (path.stat().st_mtime for path in times)
        case.seconds_to_end = round(again - struck, 1)
    case.wrong_rows = sum(wrong_rows(folder / f"rows-{each}", rank=each, ranks=2) for each in range(2))
    case.steps_lost = steps_again(folder / f"rows-{rank}")
    case.is_equal = code == 0 and weights(run_dir) == weights(bench.of_two)
    case.note = "" if case.survived else log[-1500:]
    return case


def network_script(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    from tests.benchmarks.fault_network import run_network_script
    from tests.benchmarks.fault_scripts import Whole

    whole = Whole.of_json(bench.network)
    return _of_script(
        bench.call(lambda _: run_network_script(whole, case.number, folder / "run", chance), folder), case
    )


def disk_script(bench: Bench, case: Case, folder: Path, chance: random.Random) -> Case:
    from tests.benchmarks.fault_disk import run_disk_script
    from tests.benchmarks.fault_scripts import Whole

    whole = Whole.of_json(bench.disk)
    return _of_script(bench.call(lambda _: run_disk_script(whole, case.number, folder / "run"), folder), case)


def _of_script(figures: dict | None, case: Case) -> Case:
    if figures is None:
        case.has_hung = True
        return case
    known = {each.name for each in fields(Case)}
    for name, value in figures.items():
        if name in known:
            setattr(case, name, value)
    case.note = "" if case.survived else json.dumps(figures)
    return case


ACTIONS: dict[str, Callable] = {f"kill: {phase}": kill for phase in PHASES} | {
    ANY_MOMENT: kill_at_any_moment, FLIPPED: damage, CUT: damage, FULL_DISK: full_disk, DISK: disk_script,
    NETWORK: network_script, NAN: not_finite, ROLLBACK: rollback, LOST_RANK: lost_rank,
}  # fmt: skip


def run_case(bench: Bench, kind: str, number: int) -> Case:
    """Its random choices depend on kind and number alone, but for moments of the clock."""
    folder, begin = bench.new_folder(f"{kind}-{number}"), time.monotonic()
    case = ACTIONS[kind](bench, Case(kind, number), folder, random.Random(f"{kind} {number}"))
    case.seconds = round(time.monotonic() - begin, 2)
    shutil.rmtree(folder)
    return case
