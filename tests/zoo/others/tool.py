"""What a tool is to `Others`: something that is shown the run and says what it finds."""

import json
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Trainer


class Tool:
    """Each method is called on rank 0 at the moment that its name says; none may change the run. `hear(step, what,
    said)` takes an alarm: `step` is the last step that was over when the tool could know, `what` its kind."""

    def __init__(self, trainer: Trainer, hear: Callable[[int, str, str], None]):
        self.trainer, self.hear = trainer, hear

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    def on_train_begin(self) -> None: ...

    def on_micro_batch(self, inputs: dict) -> None:
        """Before `training_step`, whose `inputs` these are."""

    def on_backward(self, inputs: dict, loss: torch.Tensor) -> None:
        """After `training_step`: gradients are there."""

    def on_optimizer_step(self) -> None:
        """After the optimizer has moved the weights; gradients are still there."""

    def on_log(self) -> None: ...

    def on_end(self) -> None:
        """After the run, also one that broke."""


@contextmanager
def log_file(history: list[dict]):
    """The part of trainer_state.json that tools read."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trainer_state.json"
        path.write_text(json.dumps({"log_history": history}))
        yield path
