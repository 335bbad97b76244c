"""The thread beside the training, and what it does with a step: reads it, hashes and counts its tokens, and gathers
on the main process what the ranks have kept."""

import contextlib
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

from recipe.guards.batches import TokenCounts
from recipe.guards.finite import not_finite
from recipe.guards.guard import Guard, Verdict, checked
from recipe.guards.runner import Runner, overrides, say
from recipe.guards.taps import LocalStep, PendingStep, TokenStep, mean_loss, payloads_of


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
        return self._future is not None and not self._future.done()


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
    decided before. `verdicts`: of `Guard.observe_tokens`, by guard. `faults`: of guards; `fault`: of all."""

    pending: PendingStep | None
    ranks: list[dict]
    answer: tuple
    verdicts: dict[str, list]
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
    """On every rank. `session`: a `session.Session`. `news`: what this rank has to say besides the step. `answer`: of
    the main process."""
    values, faults, fault = read(session, pending)
    failure = news["failure"] or (why(fault) if fault is not None else None)
    ranks = session.ranks.gather({**values, **news, "failed": {**news["failed"], **faults}, "failure": failure})
    answer, verdicts = session.ranks.broadcast(answer), {}
    if session.is_main and pending is not None and all("loss" in payload for payload in ranks):
        try:
            verdicts, own = observe_tokens(session, pending.step, ranks)
            faults |= own
        except Exception as error:
            fault = fault or error
    return Exchanged(pending, ranks, answer, verdicts, faults, fault)


def read(session, pending: PendingStep | None) -> tuple[dict, dict[str, str], Exception | None]:
    """What this rank sends; guard -> fault; a fault of all."""
    if pending is None:
        return {}, {}, None
    try:
        values = with_documents(pending.read(), pending.local, session.options.documents_of)
        tokens = pending.read_tokens()
        values["tokens"] = [TokenCounts.of(seen) for seen in tokens]
        values["ngrams"] = session.taps.choose_rows(pending.step, tokens)
        faults = measure_tokens(session.runner, session.run, pending.step, tokens, values["payloads"])
        return values, faults, None
    except Exception as error:
        return {}, {}, error


def measure_tokens(runner: Runner, run, step: int, tokens: list, payloads: dict[str, Any]) -> dict[str, str]:
    """Adds to `payloads`, by guard, and leaves out what cannot be sent: an exchange that fails on one rank would end
    all of them. Returns guard -> fault: a guard is disabled on the training's own thread."""
    faults: dict[str, str] = {}
    for guard in [guard for guard in list(runner.guards) if overrides(guard, "measure_tokens") and tokens]:
        with timed(runner, guard, faults):
            payloads[type(guard).__name__] = guard.measure_tokens(step, tokens)
    for name in list(payloads) if run.world_size > 1 else ():
        try:
            pickle.dumps(payloads[name])
        except Exception as error:
            faults[name] = say(error)
            del payloads[name]
    return faults


@contextlib.contextmanager
def timed(runner: Runner, guard: Guard, faults: dict[str, str]) -> Iterator[None]:
    name, begin = type(guard).__name__, time.perf_counter()
    try:
        yield
    except Exception as error:
        faults[name] = say(error)
    finally:
        runner.seconds_beside[name] += time.perf_counter() - begin


def observe_tokens(session, step: int, ranks: list[dict]) -> tuple[dict[str, list], dict[str, str]]:
    """Guard -> verdicts, and guard -> fault."""
    ngrams = session.taps.ngrams
    if ngrams is not None:
        parts = [payload["ngrams"] for payload in ranks if payload["ngrams"] is not None]
        ngrams.observe(parts, mean_loss(ranks))
    loss, payloads = ngrams.loss if ngrams is not None else None, payloads_of(ranks)
    verdicts: dict[str, list[Verdict]] = {}
    faults: dict[str, str] = {}
    for guard in [guard for guard in list(session.runner.guards) if overrides(guard, "observe_tokens")]:
        if (name := type(guard).__name__) in payloads:
            verdicts[name] = []
            with timed(session.runner, guard, faults):
                for verdict in guard.observe_tokens(TokenStep(step, payloads[name], loss)):
                    verdicts[name].append(checked(verdict))
    return verdicts, faults


def why(error: Exception) -> str:
    return f"the guards failed with {type(error).__name__}: {error}"


def with_documents(values: dict, local: LocalStep, documents_of: Callable | None) -> dict:
    """Those of the micro-batches that are not finite."""
    bad = not_finite(values["losses"], values["grad_norm"]) if documents_of is not None else []
    names = [name for number in bad for name in documents_of(local.first_micro_batch + number)]
    return {**values, "documents": list(dict.fromkeys(names))}
