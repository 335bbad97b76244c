"""The thread beside the training, and what it does with a step: reads it, hashes and counts its tokens, gathers on the
main process what the ranks have kept, and has the guards judge it there."""

import atexit
import pickle
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from recipe.guards.batches import LabelCounts
from recipe.guards.finite import not_finite
from recipe.guards.guard import Verdict, say
from recipe.guards.records import append_line
from recipe.guards.step import Step, mean_loss, norm_of
from recipe.guards.taps import LocalStep, PendingStep

# Steps kept for windows, of which references name their own. Chosen, not measured.
HISTORY = 1000
# That a process waits at its end for a thread which waits for other ranks: these end, too. Chosen, not measured.
EXIT_SECONDS = 10


class Worker:
    """Does one task at a time. Its thread is a daemon: a training that ends with an exception does not wait for it,
    since it may wait for other ranks."""

    def __init__(self):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._future: Future | None = None
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable, *arguments: Any) -> None:
        assert self._future is None, "the result of the task before has not been taken"
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._tasks,), name="guards", daemon=True)
            self._thread.start()
        self._future = Future()
        self._tasks.put((self._future, task, arguments))

    def wait(self) -> None:
        """Until it is idle; its result is kept."""
        if self._future is not None:
            self._future.exception()

    def result(self) -> Any:
        """Of the task; raises what it raised."""
        future, self._future = self._future, None
        return future.result()

    def close(self, is_waiting: bool) -> bool:
        """Whether it is still busy: a training that ended with an exception must not wait for other ranks."""
        if is_waiting:
            self.wait()
        self._tasks.put(None)
        is_busy = self._future is not None and not self._future.done()
        if self._thread is not None and not is_busy:
            self._thread.join()
        elif self._thread is not None:  # a thread that comes back from other ranks in an ending interpreter aborts it
            atexit.register(self._thread.join, EXIT_SECONDS)
        return is_busy


def _work(tasks: queue.SimpleQueue) -> None:
    while (given := tasks.get()) is not None:
        future, task, arguments = given
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del future, task, arguments, given


class Exchanged(NamedTuple):
    """A step when the worker is done with it. `ranks`: what each sent, on the main process. `answer`: what that had
    decided before. `messages`: to be logged. `step`: None where a rank could not read its part, and beside the main
    process. `faults`: of guards; `fault`: of all."""

    ranks: list[dict]
    answer: tuple
    messages: list[str]
    step: Step | None
    verdicts: list[Verdict]
    faults: dict[str, str]
    fault: Exception | None


def take_news(session) -> dict:
    """What this rank has to say besides its numbers."""
    findings, session.reporter.unreported = session.reporter.unreported, []
    passes, session.passes_to_send = session.passes_to_send, []
    failed = dict(session.runner.failed) if session.runner is not None else {}
    news = {"findings": findings, "passes": passes, "stop": session.stop_asked}
    return {**news, "failed": failed, "failure": session.failure}


def decided(session) -> tuple[bool, Any, dict[str, str], str | None]:
    """By the main process: whether to stop, by which finding, the guards that are off, why all are."""
    failed = dict(session.runner.failed) if session.runner is not None else {}
    return session.stop_asked, session.stopped_by, failed, session.failure


def exchange(session, pending: PendingStep | None, news: dict, answer: tuple) -> Exchanged:
    """On every rank. `session`: a `session.Session`, of which nothing is changed here that the training's own thread
    reads before it has taken the result. `news`, `answer`: of `take_news` and `decided`."""
    values, faults, fault = read(session, pending)
    failure = news["failure"] or (why(fault) if fault is not None else None)
    ranks = session.ranks.gather({**values, **news, "failed": {**news["failed"], **faults}, "failure": failure})
    answer = session.ranks.broadcast(answer)
    messages, step, verdicts = [], None, []
    if session.is_main:
        try:
            messages = note_passes(session, ranks, faults)
            step, verdicts = observe(session, pending, ranks, faults)
        except Exception as error:
            fault = fault or error
    return Exchanged(ranks, answer, messages, step, verdicts, faults, fault)


def read(session, pending: PendingStep | None) -> tuple[dict, dict[str, str], Exception | None]:
    """What this rank sends; guard -> fault; a fault of all."""
    if pending is None:
        return {}, {}, None
    try:
        values = with_documents(pending.read(), pending.local, session.options.documents_of)
        tokens, run = pending.read_tokens(), session.run
        values["labels"] = LabelCounts.of(tokens, run.rank)
        values["ngrams"] = session.taps.choose_rows(pending.step, tokens)
        faults = session.runner.measure_tokens(pending.step, tokens, values["payloads"]) if tokens else {}
        if run.world_size > 1:
            faults |= leave_out_unsendable(values["payloads"])
        return values, faults, None
    except Exception as error:
        return {}, {}, error


def leave_out_unsendable(payloads: dict[str, Any]) -> dict[str, str]:
    """An exchange that fails on one rank would end all of them. Guard -> fault."""
    faults = {}
    for name in list(payloads):
        try:
            pickle.dumps(payloads[name])
        except Exception as error:
            faults[name] = say(error)
            del payloads[name]
    return faults


def note_passes(session, ranks: list[dict], faults: dict[str, str]) -> list[str]:
    """Those that have begun on other ranks, before the step is judged, whose rows may be of them. What to log."""
    announced = [each for payload in ranks for each in payload["passes"]]
    return [message for source, tokens, message in announced if session.note_pass(source, tokens, faults)]


def observe(
    session, pending: PendingStep | None, ranks: list[dict], faults: dict
) -> tuple[Step | None, list[Verdict]]:
    """On the main process. Adds to `faults`."""
    if pending is None or any("loss" not in payload for payload in ranks):
        return None, []
    record = {**pending.record, "loss": mean_loss(ranks), "grad_norm": norm_of(ranks)}
    history = [*session.history[1 - HISTORY :], record]
    step = Step.gather(session.run, session.taps, record, history, session.passes, pending.local, ranks)
    off = {name for payload in ranks for name in payload["failed"]}
    verdicts = session.runner.observe(step, off, faults)
    append_line(session.output_dir / "steps.jsonl", record)
    return step, verdicts


def why(error: Exception) -> str:
    return f"the guards failed with {type(error).__name__}: {error}"


def with_documents(values: dict, local: LocalStep, documents_of: Callable | None) -> dict:
    """Those of the micro-batches that are not finite."""
    bad = not_finite(values["losses"], values["grad_norm"]) if documents_of is not None else []
    names = [name for number in bad for name in documents_of(local.first_micro_batch + number)]
    return {**values, "documents": list(dict.fromkeys(names))}
