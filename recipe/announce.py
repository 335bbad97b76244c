"""What a run says before its first logged loss: what it waits for, and what differs from the config."""

import logging
import re
import sys
import time
from pathlib import Path

from transformers import TrainerCallback

from recipe.arguments import Config
from recipe.rundir import holds_run

logger = logging.getLogger(__name__)
QUIET_SECONDS = 5  # before the first line; each further line of an evaluation waits twice as long


def announce_run(config: Config, output_dir: Path | None) -> None:
    """What is not as the config says. `output_dir`: of a new run, None of one that is resumed."""
    steps, warmup, usual = config.max_steps, config.training.warmup_steps, f"runs/{config.path.stem}"
    if output_dir and re.fullmatch(rf"{re.escape(usual)}-\d+", str(output_dir)) and holds_run(Path(usual)):
        logger.warning("%s holds a run already; this one is in %s", usual, output_dir)
    if warmup > steps:
        share = steps / warmup
        logger.warning("a trial: its %d steps end within the warm-up of %g, at %.2g of the rate", steps, warmup, share)


def announce_data(config: Config) -> None:
    names = ", ".join(entry.path for entry in config.data.sources)
    logger.info("opening %s: its index, the hold-out and the tokenizer", names)


def announce_training(config: Config) -> None:
    then = "; the first step compiles the model: a minute or more" if config.training.torch_compile else ""
    logger.info("probing loss, attention and accumulation before step 1%s", then)


class FirstStepsCallback(TrainerCallback):
    """Where there is no progress bar: a line whenever nothing was logged for some seconds, until the first loss and
    the first evaluation are. Silent in a run that trains no step and only writes its results."""

    _is_over = _is_evaluated = True
    _batches = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._is_over = self._is_evaluated = sys.stderr.isatty() or not state.is_world_process_zero
        self._last, self._wait = time.perf_counter(), QUIET_SECONDS

    def on_step_end(self, args, state, control, **kwargs):
        if not self._is_over and self._is_quiet():
            step, total = state.global_step, state.max_steps
            logger.info("step %d of %d; losses are logged every %g", step, total, args.logging_steps)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._batches += 1
        if not self._is_evaluated and self._is_quiet():
            self._wait *= 2
            logger.info("step %d of %d; evaluating, batch %d", state.global_step, state.max_steps, self._batches)

    def on_log(self, args, state, control, **kwargs):
        self._is_over, self._last = True, time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self._is_evaluated = True

    def _is_quiet(self) -> bool:
        now = time.perf_counter()
        if now <= self._last + self._wait:
            return False
        self._last = now
        return True
