"""What others offer, watching the same run as our guards: a plain watchdog, trainproof, losslint, torch-audit and
trainsight-preflight.

    others = Others()
    others.watch(trainer)  # built, not yet training
    trainer.train()
    others.alarms()  # {"watchdog": [{"step": 12, "what": "loss spike", "said": ...}], "trainproof": [], ...}

Each is used at its documented defaults and given all that its documentation asks for; its module says how, and where
it differs. docs/zoo.md says which tools are left out, and why.
"""

import io
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial

from transformers import Trainer, TrainerCallback

from tests.zoo.others.on_logs import Losslint, Trainproof
from tests.zoo.others.tool import Tool
from tests.zoo.others.torch_audit import TorchAudit
from tests.zoo.others.trainsight import Trainsight
from tests.zoo.others.watchdog import LossWatchdog

TOOLS = {
    "trainproof": Trainproof,
    "losslint": Losslint,
    "watchdog": LossWatchdog,
    "torch-audit": TorchAudit,
    "trainsight": Trainsight,
}


class Others:
    """One for each run. `errors`: where a tool crashed. `printed`: what a tool would have written to the terminal."""

    def __init__(self):
        self.errors: list[dict] = []
        self.printed: list[dict] = []
        self._alarms: dict[str, dict[str, dict]] = {name: {} for name in TOOLS}
        self._tools: dict[str, Tool] = {}

    def watch(self, trainer: Trainer, **options: dict) -> None:
        """Once, on every rank; rank 0 reports. `options`: for a tool, by name, what its documentation wants to know
        of the run: `trainproof={"loss_shifts": False}`."""
        if not trainer.is_world_process_zero():
            return
        for name, make in TOOLS.items():
            with self.quietly(name):
                self._tools[name] = make(trainer, partial(self.hear, name), **options.get(name, {}))
        trainer.add_callback(_Ears(trainer, self.tell))

    def alarms(self) -> dict[str, list[dict]]:
        """After the run, also one that broke: each kind once, at the first step that knew (0: before training)."""
        self.tell("on_end")
        self._tools = {}
        return {tool: sorted(found.values(), key=lambda alarm: alarm["step"]) for tool, found in self._alarms.items()}

    def hear(self, tool: str, step: int, what: str, said: str) -> None:
        self._alarms[tool].setdefault(what, {"step": step, "what": what, "said": said})

    def tell(self, event: str, *values) -> None:
        for name, tool in self._tools.items():
            with self.quietly(name):
                getattr(tool, event)(*values)

    @contextmanager
    def quietly(self, tool: str):
        """A tool that prints or breaks is written down and disturbs nobody."""
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                yield
            except Exception as error:
                record = {"tool": tool, "error": f"{type(error).__name__}: {error}"}
                if record not in self.errors:
                    self.errors.append(record)
        if printed.getvalue():
            self.printed.append({"tool": tool, "text": printed.getvalue()})


class _Ears(TrainerCallback):
    """Hears the log through callbacks, the micro-batches through `training_step`.

    It wraps that method from `on_step_begin` to `on_step_end`. Our guards wrap it in `on_train_begin`, look at what
    was there before and put it back in `on_train_end`; so neither sees the other, whichever was added first.
    """

    def __init__(self, trainer: Trainer, tell: Callable[..., None]):
        self._trainer, self._tell = trainer, tell
        self._own_step = self._training_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._tell("on_train_begin")

    def on_step_begin(self, args, state, control, **kwargs):
        if self._training_step is None:
            self._own_step = vars(self._trainer).get("training_step")
            self._training_step = self._trainer.training_step
            self._trainer.training_step = self._listen

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._tell("on_optimizer_step")

    def on_step_end(self, args, state, control, **kwargs):
        del self._trainer.training_step
        if self._own_step is not None:
            self._trainer.training_step = self._own_step
        self._own_step = self._training_step = None

    def on_log(self, args, state, control, **kwargs):
        self._tell("on_log")

    def _listen(self, model, inputs, *rest, **named):
        self._tell("on_micro_batch", inputs)
        loss = self._training_step(model, inputs, *rest, **named)
        self._tell("on_backward", inputs, loss)
        return loss
