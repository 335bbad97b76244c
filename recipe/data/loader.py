"""The loader that Trainer reads: micro-batches of the rows from all workers, and the stream's position."""

import copy
import ctypes
import itertools
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader

from recipe.console import configure_logging, configure_transformers_logging
from recipe.data import files
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.files import first_line
from recipe.data.packing import Row
from recipe.data.source import log_skipped
from recipe.data.stream import RowStream, check_division, source_of_row
from recipe.errors import ENDING, DataError, UserError, message_of
from recipe.redact import known, remember

PR_SET_PDEATHSIG = 1  # prctl(2)
WATCH_SECONDS = 1.0  # between two looks of a worker at its main process
PREFETCHED_ROWS = 64  # per worker: it tokenizes dozens of rows at once, and must not wait for the others
# Workers are forked from a server process without threads. Forked from this one they may inherit a lock that is held:
# the tokenizer's thread pool is such a case, where TOKENIZERS_PARALLELISM is set.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class BatchLoader:
    """Endless micro-batches of `batch_size` rows for one rank; owns the position in the stream.

    Must not be prepared by accelerate: the stream has done the sharding. Iterating again continues after the last row
    consumed; it never starts over. A checkpoint stores `position`; on several ranks each knows only its own lanes, see
    `whole_position`. Raises `UserError` where ranks times workers do not divide the lanes.

    Iterating reads `batches_per_step` micro-batches at once. Where that fails on one rank it raises on every rank,
    with the position where it was before, so that all of them can save a checkpoint of the last step.
    """

    def __init__(self, stream: RowStream, collator: DataCollatorForPackedRows, batch_size: int, num_workers: int = 0):
        check_division(stream.num_lanes, stream.world_size, num_workers)
        self.dataset = stream
        self.collator = collator
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.batches_per_step = 1
        self.position = stream.start()
        self._group = None  # of the ranks, over the host's network
        self._recent: deque = deque(maxlen=0)
        self._num_batches = 0
        self._batches: Iterator[dict] | None = None  # that are being read

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._batches = self._collated()
        while found := self._read_step(self._batches):
            yield from found

    def close(self) -> None:
        """End the workers. Those that are left to the garbage collector hear of nothing: their queue may be gone
        before, and each is waited for 5 seconds."""
        if self._batches is not None:
            self._batches.close()

    def _read_step(self, batches: Iterator[dict]) -> list[dict]:
        before, found, failure = self._copied_position(), [], None
        try:
            found = list(itertools.islice(batches, self.batches_per_step))
        except (DataError, UserError) as error:
            failure = error
        if self.dataset.world_size > 1 and torch.distributed.is_initialized():
            self._group = self._group or torch.distributed.new_group(backend="gloo")
            failures = [None] * self.dataset.world_size
            own = failure and type(failure)(message_of(failure))
            torch.distributed.all_gather_object(failures, own, self._group)
            failure = failure or next(filter(None, failures), None)
        if failure is not None:
            self.position = before
            raise failure
        return found

    def _collated(self) -> Iterator[dict[str, torch.Tensor]]:
        for rows in self.batches():
            self._recent.append([(row.source, row.documents) for row in rows])
            self._num_batches += 1
            yield self.collator(rows)

    def remember(self, num_batches: int) -> None:
        """Keep the documents of so many batches, for `documents_of`."""
        self._recent = deque(maxlen=num_batches)

    def documents_of(self, number: int) -> list[str]:
        """Of a batch, counted from 0 in this process: `name[index]` of each; empty where it is too long ago."""
        place = number - self._num_batches + len(self._recent)
        rows = self._recent[place] if 0 <= place < len(self._recent) else []
        names = [part.source.name.rsplit("/", 1)[-1] for part in self.dataset.parts]
        return list(dict.fromkeys(f"{names[source]}[{index}]" for source, indices in rows for index in indices))

    def batches(self) -> Iterator[list[Row]]:
        """The same rows, not yet collated."""
        self.dataset.position = copy.deepcopy(self.position)
        # The order of the lanes does not use torch's generator; a separate one keeps DataLoader from drawing on the
        # run's.
        context = start_server() if self.num_workers else None
        settings = os.getpid(), logging.getLogger().level, files.RETRY_SECONDS, files.STALL_SECONDS, known()
        rows = DataLoader(
            self.dataset,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCHED_ROWS if self.num_workers else None,
            generator=torch.Generator(),
            collate_fn=_as_is,
            worker_init_fn=partial(_begin_worker, settings),
            multiprocessing_context=context,
        )
        batch = []
        for row in _watched(rows):
            batch.append(row)
            if len(batch) == self.batch_size:
                self._advance(batch)
                yield batch
                batch = []

    def _advance(self, batch: list[Row]) -> None:
        for row in batch:
            self.position["lanes"][row.source][row.lane] = row.state
            for reason in row.skipped:
                log_skipped(reason)
        first = self.position["rows"]
        self.position["rows"] += len(batch) * self.dataset.world_size
        for number in range(first, self.position["rows"]):
            self.position["rows_by_source"][source_of_row(number, self.dataset.weights)] += 1

    def _copied_position(self) -> dict:
        lists = ("rows_by_source", "is_exhausted")
        copied = {name: [*self.position[name]] for name in lists}
        return {**self.position, **copied, "lanes": [[*lanes] for lanes in self.position["lanes"]]}

    def passes(self, source: int) -> int:
        """Complete passes of this rank's fastest lane; above 0, some documents are being read again."""
        return max(lane["pass"] for lane in self.position["lanes"][source])


def count_bad(position: dict) -> int:
    """Documents that were skipped since they cannot be read, each once for every pass."""
    return sum(lane.get("bad", 0) for lanes in position["lanes"] for lane in lanes)


def _as_is(row):
    return row


def start_server() -> multiprocessing.context.BaseContext:
    """How workers are started. Begins to start the server process, which imports what they need once for all of them;
    this takes seconds, so call it early."""
    context = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload(["recipe.data.stream"])
        resource_tracker.ensure_running()  # it changes the mask too
        # A signal to all processes of the run must end neither the server nor the workers, which inherit this.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _begin_worker(settings: tuple, worker_id: int) -> None:
    """Leave signals to the main process, and end with it: workers of a killed parent would wait forever to deliver
    their rows. `settings` are the main process's: its id, log level, patience and what it masks."""
    main_process, level, files.RETRY_SECONDS, files.STALL_SECONDS, credentials = settings
    remember(*credentials)
    configure_logging(level)
    configure_transformers_logging()
    for number in {*ENDING} - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    # Not by way of SIG_IGN, which would drop a SIGTERM that came while this process was starting.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(main_process,), daemon=True).start()


def _end_with(main_process: int) -> None:
    """DataLoader ends workers by SIGTERM. One that comes from elsewhere, as to all processes of a container, Slurm job
    or torchrun rank, is for the main process alone, which still needs rows to finish its step. A main process that was
    killed ends nothing: the server lives as long as its workers do."""
    try:
        handle = os.pidfd_open(main_process)
        while not select.select([handle], [], [], 0)[0]:
            sent = signal.sigtimedwait({signal.SIGTERM}, WATCH_SECONDS)
            if sent is not None and sent.si_pid == main_process:
                break
    except ProcessLookupError:
        pass  # it is gone already
    os._exit(0)


def _watched(rows: Iterable[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except RuntimeError as error:
        if not any(words in str(error) for words in ("exited unexpectedly", "is killed by signal")):
            raise
        raise DataError(
            f"a data worker was killed, for example because memory ran out ({first_line(error)}); use fewer "
            "dataloader_num_workers"
        ) from error


def whole_position(position: dict, world_size: int) -> dict:
    """The position with the lanes of all ranks, on every rank; a collective call."""
    if world_size == 1:
        return position
    positions = [None] * world_size
    torch.distributed.all_gather_object(positions, position)
    return merge_positions(positions, world_size)


def merge_positions(positions: list[dict], world_size: int) -> dict:
    """One position from those of all ranks: each lane's state from the rank that reads it.

    Rank r reads the rows r, r + world_size, ... after those returned before it started; that number equals the current
    one modulo `world_size`.
    """
    rows = {position["rows"] for position in positions}
    assert len(rows) == 1, f"ranks are at different rows: {sorted(rows)}"
    start = rows.pop() % world_size
    num_lanes, num_sources = len(positions[0]["lanes"][0]), len(positions[0]["lanes"])
    lanes = [
        [positions[(lane - start) % world_size]["lanes"][source][lane] for lane in range(num_lanes)]
        for source in range(num_sources)
    ]
    return {**positions[0], "lanes": lanes}
