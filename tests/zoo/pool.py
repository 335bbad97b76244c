"""Runs side by side, each in a process of its own: what one patches, breaks or leaks, no other sees."""

import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.zoo.bug import Bug
from tests.zoo.setting import Setting

TIMEOUT = 600  # seconds; the longest run takes a tenth of it
TO_EXIT = 30
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class Task(NamedTuple):
    """A setting, with a bug or healthy. Whatever has the same key is the same run. `with_others`: see `execute`."""

    setting: Setting
    bug: Bug | None = None
    with_others: bool = True

    @property
    def key(self) -> str:
        return f"{self.bug.name if self.bug else 'healthy'} {self.setting.key}"

    @property
    def cost(self) -> int:
        """Roughly in proportion to its seconds: the long ones begin first."""
        setting = self.setting
        return setting.steps * setting.rows_a_step * setting.block * (1 + setting.vocabulary // 500)


def run_tasks(tasks: list[Task], processes: int | None = None) -> Iterator[tuple[Task, dict]]:
    """Yields each task's record when it is done; one that failed has only `error`."""
    os.environ.update(ENVIRONMENT)  # inherited by the fork server, which imports torch after that
    context = multiprocessing.get_context("forkserver")
    # imports once what takes long to import
    context.set_forkserver_preload(["tests.zoo.run", "tests.zoo.others", "tests.zoo.frozen"])
    pool = ThreadPoolExecutor(processes or os.cpu_count() or 1)
    waiting = {pool.submit(_run, context, task): task for task in sorted(tasks, key=lambda task: -task.cost)}
    try:
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:  # all are done, or the user has interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()


def _run(context, task: Task) -> dict:
    """All ranks of one task. The record is rank 0's, with the effects of all."""
    folder = tempfile.mkdtemp(prefix="zoo-")
    try:
        started = [_start(context, task, rank, folder) for rank in range(task.setting.ranks)]
        records = [_receive(process, connection) for process, connection in started]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    errors = [record["error"] for record in records if "error" in record]
    if errors:
        return {"error": errors[0]}
    return {**records[0], "effects": sum(record["effects"] for record in records)}


def _start(context, task: Task, rank: int, folder: str):
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, task, rank, folder))
    process.start()
    there.close()
    return process, here


def _receive(process, connection: Connection) -> dict:
    try:
        if not connection.poll(TIMEOUT):
            process.kill()
            return {"error": f"no result after {TIMEOUT} s"}
        return connection.recv()
    except EOFError:
        process.join()
        return {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        process.join(TO_EXIT)
        process.kill()
        process.join()


def _child(connection: Connection, task: Task, rank: int, folder: str) -> None:
    from tests.zoo.run import execute, execute_rank

    apply: Callable | None = task.bug.apply if task.bug else None
    try:
        if task.setting.ranks > 1:
            connection.send(execute_rank(task.setting, apply, rank, folder, task.with_others))
        else:
            connection.send(execute(task.setting, apply, folder=folder, with_others=task.with_others))
    except BaseException:
        connection.send({"error": traceback.format_exc()})
