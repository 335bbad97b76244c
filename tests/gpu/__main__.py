"""`python -m tests.gpu [--minutes 8] [--json OUT]`: all that needs a GPU, in one command, from the checkout's root.

Parts run in order of value, each in a process of its own and with its own share of the time; what no time is left for
is reported as not run. Prints a table, writes OUT after each part, and RESULTS.md at the end of a whole run on a GPU.
`--device cpu --tiny` runs the same code without a GPU in about a minute; its figures mean nothing. `--results OUT`
measures nothing: it writes RESULTS.md from a file that came back from another machine.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from multiprocessing import forkserver
from pathlib import Path

from tests.gpu.part import DONE, FAILED, NOT_RUN, Outcome, is_of_a_fork, measured, run_part

# Seconds of each part in a run of eight minutes: at most, and the least that it is begun with.
PARTS = {
    "environment": (65, 10),
    "throughput": (230, 40),
    "guards": (100, 30),
    "correctness": (90, 20),
    "assertions": (70, 20),
    "memory": (40, 15),
    "muon": (50, 15),
    "schedule": (120, 40),
}
MINUTES = 8.0
SPARED = 5  # seconds for the table
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Whether there is a GPU is asked of its driver's library then, which does not begin CUDA in the fork server.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts; default: %(default)g")
    parser.add_argument("--json", type=Path, default=Path("runs/gpu.json"), metavar="OUT", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, which show only that the code runs")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--results", type=Path, metavar="OUT", help="write RESULTS.md from this file and end")
    arguments = parser.parse_args()
    if arguments.results is not None:
        return write_again(arguments.results)
    check(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.json.stat().st_size:  # of an earlier run: minutes on a GPU are dear
        arguments.json.replace(arguments.json.with_name(arguments.json.name + ".before"))
    out = Suite(arguments).run()
    report(out, arguments.json)
    return out["exit_code"]


def check(arguments: argparse.Namespace) -> None:
    """Ends with one line and exit code 2 where the command cannot do what was asked."""
    if not 0 < arguments.minutes <= 600:
        fail(f"--minutes {arguments.minutes:g}: more than 0 and at most 600")
    if arguments.device == "cpu" and not arguments.tiny:
        fail("--device cpu takes --tiny: the full sizes need a GPU")
    if arguments.json.is_dir():
        fail(f"--json {arguments.json}: cannot be written (it is a folder)")
    try:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.touch()
        partial_of(arguments.json).touch()
        partial_of(arguments.json).unlink()
    except OSError as error:
        fail(f"--json {arguments.json}: cannot be written ({error.strerror})")
    os.environ.update(ENVIRONMENT)
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            fail(f"torch {torch.__version__} finds no CUDA device here; without one: --device cpu --tiny")
        # One GPU: Trainer would take all of them for itself.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


class Suite:
    """One run of the command. `out` is what OUT holds, complete at any time."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.started = arguments, time.monotonic()
        self.names = [name for name in PARTS if name in (arguments.only or PARTS)]
        self.share = arguments.minutes / MINUTES
        self.method = "forkserver"
        self.out = {"date": date.today().isoformat(), "commit": "unknown", "device": arguments.device}
        self.out |= {"is_tiny": arguments.tiny, "minutes": arguments.minutes, "seconds": 0.0, "exit_code": 0}
        self.out["parts"] = {}

    @property
    def left(self) -> float:
        return 60 * self.arguments.minutes - SPARED - (time.monotonic() - self.started)

    def run(self) -> dict:
        try:
            self._context()
            forkserver.ensure_running()  # it imports while this process does
            with tempfile.TemporaryDirectory(prefix="recipe-gpu-", ignore_cleanup_errors=True) as folder:
                from tests.gpu.scale import Scale

                self.out["commit"] = known_commit()
                scale = Scale(self.arguments.device, self.arguments.tiny)
                for name in self.names:
                    try:
                        self._keep(name, self._run_part(name, scale, Path(folder) / name))
                    except (KeyboardInterrupt, SystemExit):
                        if values := measured(Path(folder) / name):
                            self._keep(name, Outcome(FAILED, values=values, error="interrupted"))
                        raise
        except (KeyboardInterrupt, SystemExit) as end:
            self.out["exit_code"] = 130 if isinstance(end, KeyboardInterrupt) else end.code
            for name in self.names:
                if name not in self.out["parts"]:
                    self._keep(name, Outcome(NOT_RUN, error="interrupted"))
        statuses = {part["status"] for part in self.out["parts"].values()}
        if not self.out["exit_code"] and statuses != {DONE}:
            self.out["exit_code"] = 1
        self._write()
        return self.out

    def _run_part(self, name: str, scale, folder: Path) -> Outcome:
        most, least = (self.share * seconds for seconds in PARTS[name])
        seconds = min(most, self.left)
        if seconds < least:
            return Outcome(NOT_RUN, error=f"{max(0.0, self.left):.0f} s left")
        say(f"{name}: at most {seconds:.0f} s")
        outcome = run_part(self._context(), name, scale, folder, seconds)
        if self.method == "forkserver" and is_of_a_fork(outcome) and self.left > least:
            say(f"{name}: CUDA does not start in a forked process; again, in fresh interpreters")
            self.method = "spawn"
            again = folder.with_name(f"{name}-again")
            outcome = run_part(self._context(), name, scale, again, min(most, self.left))
        say(f"{name}: {outcome.status}, {outcome.seconds:.0f} s" + (f", {outcome.error}" if outcome.error else ""))
        for line in outcome.log:
            say(f"    {line[:200]}")
        return outcome

    def _context(self):
        context = multiprocessing.get_context(self.method)
        if self.method == "forkserver":  # imports once what takes seconds to import
            context.set_forkserver_preload([f"tests.gpu.{name}" for name in PARTS])
        return context

    def _keep(self, name: str, outcome: Outcome) -> None:
        self.out["parts"][name] = asdict(outcome)
        self._write()

    def _write(self) -> None:
        self.out["seconds"] = time.monotonic() - self.started
        partial = partial_of(self.arguments.json)
        try:
            partial.write_text(json.dumps(self.out, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.arguments.json)
        except OSError as error:  # a full disk does not end the run: its table is still printed
            say(f"{self.arguments.json}: not written ({error.strerror})")


def report(out: dict, path: Path) -> None:
    from tests.benchmarks.results import format_table
    from tests.gpu.results import RESULTS, rows_of, write_results

    print(format_table(rows_of(out)))
    print(f"\n{out['seconds']:.0f} s | all figures: {path}", end="")
    is_whole = set(out["parts"]) == set(PARTS) and out["exit_code"] in (0, 1)
    if is_whole and write_results(out):
        print(f" | {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}", end="")
    elif out["is_tiny"] or out["device"] == "cpu":
        print(" | tiny sizes: the figures mean nothing and are not written to RESULTS.md", end="")
    print(flush=True)


def write_again(path: Path) -> int:
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--results {path}: {error}")
    from tests.gpu.results import RESULTS, write_results

    if not isinstance(out, dict) or not {"parts", "device", "is_tiny"} <= out.keys():
        fail(f"--results {path}: not a file that this command wrote")
    if not write_results(out):
        fail(f"--results {path}: of a CPU, of tiny sizes or without a device's name; such figures are not kept")
    print(RESULTS)
    return 0


def known_commit() -> str:
    from tests.benchmarks.results import commit

    try:
        return commit()
    except OSError:  # a machine without git
        return "unknown"


def fail(reason: str) -> None:
    say(f"python -m tests.gpu: {reason}")
    sys.exit(2)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
