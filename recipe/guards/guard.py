"""What a guard is, and what it says. `taps.py` has what it is given."""

import functools
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from recipe.plain_json import dumps

Severity = Literal["info", "warning", "error"]
SEVERITIES = ("info", "warning", "error")
LINE_LENGTH = 160  # of a log line, with the prefix that the log format puts before it
PREFIX = len("WARNING recipe.guards | ")
DETAIL = re.compile(r": | \(|; ")  # what follows may be left out of a log line
STEP, PROBE = "step", "probe"


class CannotJudge(Exception):
    """The guard lacks what it needs. The message is the reason shown to the user."""

    def without_trace(self) -> "CannotJudge":
        """To be kept. The frames of a traceback hold all that the training held then, its data loader's workers too:
        they would not end with it."""
        return type(self)(*self.args)


class NotApplicable(CannotJudge):
    """This run holds nothing for the guard to judge, such as ranks to compare where there is one."""


@dataclass(frozen=True)
class Finding:
    """What a guard found, reported once per onset.

    `found` and `expected` are short phrases with numbers. `likely_causes` starts with the most likely one. In these
    texts what follows `: `, ` (` or `; ` is detail: the log line leaves it out where room is short. `evidence` holds
    the plain numbers behind it (JSON-able). `check`: which of the guard's checks found it; the finding is open until
    each check that found it has recovered. `cause`: which fault of this id it is. The same while the fault lasts,
    whatever its numbers; two faults of one id are both reported. The runner fills in `step` and `tokens_seen`.
    """

    id: str
    severity: Severity
    step: int
    tokens_seen: int
    found: str
    expected: str
    likely_causes: tuple[str, ...] = ()
    action: str = ""
    evidence: dict = field(default_factory=dict)
    check: str = STEP
    cause: str = ""

    @property
    def slot(self) -> str:
        """Under which it is open: one for each fault."""
        return f"{self.id} {self.cause}".rstrip()

    def log_line(self) -> str:
        """The message of the log line. It fits in 160 characters with its prefix `WARNING recipe.guards | `; the full
        texts are in `findings.jsonl` and in the report."""
        head, labels = f"{self.id} | step {self.step}", (" | found ", " | expected ", " | likely: ")
        texts = [self.found, self.expected, *self.likely_causes[:1]]
        room = LINE_LENGTH - PREFIX - len(head) - sum(map(len, labels[: len(texts)]))
        return head + "".join(label + text for label, text in zip(labels, _fit(texts, room), strict=False))

    def to_json(self) -> str:
        return dumps(asdict(self))


def shorten(line: str) -> str:
    """Of a log line without a finding: on one line, and cut at a word to what fits beside the prefix."""
    return textwrap.shorten(line, LINE_LENGTH - PREFIX, placeholder=" …")


def _fit(texts: list[str], room: int) -> list[str]:
    """Shortens texts until all of them fit in `room` characters together: details are left out, those of the last text
    first; then the longest texts are cut, at a word where there is one."""
    for place in reversed(range(len(texts))):
        for start in _details(texts[place]):
            if sum(map(len, texts)) > room:
                texts = [*texts[:place], texts[place][:start], *texts[place + 1 :]]
    widths = [len(text) for text in texts]
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return [_cut(text, width) for text, width in zip(texts, widths, strict=True)]


def _details(text: str) -> list[int]:
    """Where the details of a text begin, the last first; none begins inside another's parentheses."""
    starts = [match.start() for match in DETAIL.finditer(text)]
    return [start for start in reversed(starts) if text.count("(", 0, start) == text.count(")", 0, start)]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    start = text[:width].rsplit(" ", 1)[0] if " " in text[:width] else text[: width - 1]
    return f"{start.rstrip(' ,;:')}…"


class Clear(NamedTuple):
    """`check` looked for the finding `id` and found nothing."""

    id: str
    check: str = STEP


class Skip(NamedTuple):
    """The finding `id` cannot be judged, or not any more."""

    id: str
    reason: CannotJudge


Verdict = Finding | Clear | Skip


def say(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {error}"


def contained(hook: Callable) -> Callable:
    """For hooks that run inside the user's training: an exception is kept in `self.failure` and not raised, and the
    hook does nothing from then on."""

    @functools.wraps(hook)
    def call(self, *arguments, **kwargs):
        if self.failure is None:
            try:
                return hook(self, *arguments, **kwargs)
            except Exception as error:
                self.failure = say(error)
        return None

    return call


class Guard:
    """Base class. A guard overrides the methods that it needs; the runner calls no others.

    The first line of a guard's docstring says what it catches. Its sections `When:`, `Measured:`, `Try:` and
    `Cannot see:` become the guard's part of docs/findings.md and of `recipe explain ID`. A section for one id only is
    written `Try (ID):`.

    Attributes:
        ids: finding id -> what it means, in one sentence. An id belongs to one guard.
        taps: what it reads, see `taps.TAPS`. A tap runs only if an active guard names it.
        explained_by: ids of other guards that can cause these findings, most telling first.
        is_symptom: its warnings wait until the probes have run again, and then name what these found.
        explains_symptoms: its probe runs again when a symptom is found.
        probes_at_saves: its probe runs again at each save and every `session.PROBE_EVERY` steps.
        rules_out: own id -> word in the likely causes of symptoms that are dropped when this probe finds nothing.
        needs_next_token: it judges nothing but a next-token cross entropy; else it is not applicable.
        judges_curve: it compares the loss curve with an expectation.
        judges_target: it knows on which token each position is scored.
        on_every_rank: `before_step`, `after_step`, `measure` and `save` run on all ranks, not on the main one alone.
        of_one_resume: ids whose findings are about the last resume; the next one forgets them.
        state: what must survive a resume: JSON-able values and numpy arrays. The runner saves and restores it.
    """

    ids: ClassVar[Mapping[str, str]] = {}
    taps: ClassVar[tuple[str, ...]] = ()
    explained_by: ClassVar[tuple[str, ...]] = ()
    is_symptom: ClassVar[bool] = False
    explains_symptoms: ClassVar[bool] = False
    probes_at_saves: ClassVar[bool] = False
    rules_out: ClassVar[Mapping[str, str]] = {}
    needs_next_token: ClassVar[bool] = False
    judges_curve: ClassVar[bool] = False
    judges_target: ClassVar[bool] = False
    on_every_rank: ClassVar[bool] = False
    of_one_resume: ClassVar[tuple[str, ...]] = ()

    def __init__(self):
        self.state: dict[str, Any] = {}
        self.failure: str | None = None  # of a hook, see `contained`

    # --- before step 1

    def setup(self, run) -> None:
        """On every rank, at the first micro-batch. Raises `NotApplicable` or `CannotJudge` with a reason: the guard is
        then not called again. `run`: a `run.Run`."""

    def inspect(self, run) -> Iterator[Verdict]:
        """On every rank, after all guards are set up and restored: checks that need no batch."""
        return iter(())

    def probe(self, batch) -> Iterator[Verdict]:
        """On every rank: exact tests on the first micro-batch, in a sandbox that leaves no trace. `batch`: a
        `sandbox.Batch`. Raises `CannotJudge`."""
        return iter(())

    # --- on the rank where the step is made; no synchronisation with the device

    def before_micro_step(self, run) -> None:
        """Before the forward pass of a micro-batch."""

    def after_micro_step(self, run, loss) -> Iterator[Verdict]:
        """After the forward and backward pass of a micro-batch, with its loss. It may synchronise where it yields."""
        return iter(())

    def before_step(self, local) -> None:
        """Just before the optimizer's step, after clipping. `local`: a `taps.LocalStep`."""

    def after_step(self, local) -> None:
        """Just after the optimizer's step."""

    def measure(self, local) -> Any:
        """At the end of a step: what this rank sends to the main process. Tensors are copied to the host without
        waiting; the main process finds it in `Step.payloads`."""
        return None

    # --- on a thread beside the training, after each step

    def measure_tokens(self, step: int, tokens: list) -> Any:
        """On every rank: what it sends to the main process of its tokens, a `batches.SeenTokens` for each micro-batch,
        in plain values and arrays. The main process finds it in `Step.payloads`."""
        return None

    def observe(self, step) -> Iterator[Verdict]:
        """On the main process, with the data of all ranks: `step`, a `step.Step`. Raises `CannotJudge` where it cannot
        judge from here on. The training is in the next step: what the methods above change is read by `measure` and
        sent, not read here."""
        return iter(())

    # --- on the main process, between two steps

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        """`evaluation`: a `step.Evaluation`."""
        return iter(())

    def begin_pass(self, tokens_in_pass: int | None) -> None:
        """A further, declared pass over the data begins. `tokens_in_pass`: of the one that ended, where known."""

    def evidence(self) -> dict:
        """Numbers to put beside a symptom's finding."""
        return {}

    # --- state and resources

    def save(self) -> dict[str, Any]:
        return self.state

    def load(self, state: dict[str, Any]) -> None:
        """Raises anything where `state` is not such as `save` gives: the guard then starts fresh."""
        if state.keys() != self.state.keys():
            raise ValueError(f"it keeps {sorted(self.state)}, found {sorted(state)}")
        if wrong := [name for name, fresh in self.state.items() if not is_like(state[name], fresh)]:
            raise ValueError(f"{wrong[0]} has another type")
        self.state = state

    def on_resume(self, step: int) -> None:
        """Training goes on from a checkpoint of this step; the state has been loaded."""

    def close(self) -> None:
        """Removes hooks."""

    # --- verdicts

    @classmethod
    def finding(
        cls,
        severity: Severity,
        found: str,
        expected: str,
        causes: tuple[str, ...] = (),
        action: str = "",
        evidence: dict | None = None,
        id: str | None = None,
        check: str = STEP,
        cause: str | None = None,
    ) -> Finding:
        """`id`: may be left out by a guard that has one. `cause`: see `Finding`; else the first likely cause without
        its numbers."""
        name = id or cls._only_id()
        assert name in cls.ids, f"{cls.__name__} has no finding {name}"
        if cause is None:
            cause = re.sub(r"[\d.,%]+", "", causes[0]) if causes else ""
        return Finding(name, severity, 0, 0, found, expected, causes, action, evidence or {}, check, cause)

    @classmethod
    def clear(cls, id: str | None = None, check: str = STEP) -> Clear:
        return Clear(id or cls._only_id(), check)

    @classmethod
    def _only_id(cls) -> str:
        (name,) = cls.ids
        return name


def is_like(value, fresh) -> bool:
    """Whether what was read may stand where `fresh` stood when the guard was set up: numbers for numbers, also inside
    of lists and dicts. A None may have become what is not empty; an empty list grows, but holds no text."""
    if fresh is None:
        return not isinstance(value, (list, dict, str)) or bool(value)
    if isinstance(fresh, np.ndarray):
        is_array = isinstance(value, np.ndarray) and value.shape == fresh.shape
        return is_array and value.dtype.kind == fresh.dtype.kind
    if isinstance(fresh, dict) and isinstance(value, dict):
        return all(name in value and is_like(value[name], each) for name, each in fresh.items())
    if isinstance(fresh, (list, tuple)) and isinstance(value, (list, tuple)):
        if not fresh:
            return not any(isinstance(each, str) for each in value)
        return len(value) == len(fresh) and all(map(is_like, value, fresh))
    numbers = (int, float)
    if isinstance(fresh, numbers) and not isinstance(fresh, bool):
        return isinstance(value, numbers) and not isinstance(value, bool)
    return type(value) is type(fresh)


def checked(verdict: Verdict) -> Verdict:
    """Raises where a guard gives something else, or evidence that no JSON holds: it is written and sent later, where
    no one knows which guard it came from."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"a verdict is expected, not {verdict!r}")
    if isinstance(verdict, Finding):
        verdict.to_json()
    return verdict
