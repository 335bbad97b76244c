"""Ranks without torchrun: `python -m tests.forked_ranks JOBS` imports everything once, and forks them.

A job is {"words": of the train command, "ranks": their number, "log": a file}; where wanted "rows": a file for each
rank's rows, "fault": see `fault_run.Fault`, "environment", "is_sharded": whether accelerate shards on these CPU ranks,
and "module": whose `main` is given the words instead. They run one after the other; the exit codes of each job's ranks
are printed. A rank that outlives LIMIT is killed.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.fault_run import Fault, install, record_rows, warm_up, without_samples

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120.0  # seconds


def run_jobs(jobs: list[dict]) -> list[list[int]]:
    """From a test: in a process of its own, which has no threads when it forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.forked_ranks", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run_ranks(job: dict) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(job, rank, port) for rank in range(job["ranks"])]
    codes, end = {}, time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _fork(job: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        count = str(job["ranks"])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= job.get("environment", {})
        os.setsid()  # as torchrun does
        code = _train(job, rank)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _train(job: dict, rank: int) -> int:
    from recipe.__main__ import run
    from recipe.console import configure_logging

    configure_logging()
    without_samples()
    if "fault" in job and job["fault"].get("rank", 0) == rank:
        install(Fault(**job["fault"]))
    if job.get("rows"):
        record_rows(Path(f"{job['rows']}-{rank}"))
    if job.get("is_sharded"):
        shard()
    if "module" in job:
        return importlib.import_module(job["module"]).main(*job["words"])
    return run(["train", *job["words"]])


def shard() -> None:
    """As on GPUs: accelerate ignores `fsdp` on CPU ranks, so the recipe refuses it there."""
    from recipe import arguments
    from tests.test_sharded import shard_on_cpu

    shard_on_cpu()
    find = arguments.find_machine_conflicts
    arguments.find_machine_conflicts = lambda *known: {
        name: problem for name, problem in find(*known).items() if "fsdp" not in name
    }


def main() -> None:
    warm_up()
    print(json.dumps([run_ranks(job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
