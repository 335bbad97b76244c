"""How far a run is: a line per logged step and evaluation, and a bar on a terminal."""

import contextlib
import logging
import sys
import time

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from recipe.guards import RegressionCallback

logger = logging.getLogger(__name__)
EVAL_METRICS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_next_token_accuracy")


class ProgressBarCallback(TrainerCallback):
    """A line per logged step, and on a terminal a bar with loss, tokens/s and ETA below the lines."""

    def __init__(self, guards: RegressionCallback):
        self.guards = guards
        self._bar = None
        self._redirection = contextlib.ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._first = time.perf_counter(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)
            self._redirection.enter_context(logging_redirect_tqdm())  # log lines go above the bar, not into it

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
            if self.guards.history:
                now = self.guards.history[-1]
                self._bar.set_postfix_str(f"loss {now['loss']:.3f}, {now['tokens_per_second']:,.0f} tokens/s")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        done = state.global_step - self._first
        seconds = time.perf_counter() - self._start
        left = seconds / max(1, done) * (state.max_steps - state.global_step)
        rate = self.guards.history[-1]["tokens_per_second"] if self.guards.history else 0
        logger.info(
            f"step {state.global_step} of {state.max_steps} | loss {logs['loss']:.3f} | learning rate "
            f"{logs['learning_rate']:.2e} | {rate:,.0f} tokens/s | {format_seconds(left)} left"
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero and metrics:
            parts = [
                f"{name.removeprefix('eval_').replace('_', ' ')} {metrics[name]:.4f}"
                for name in EVAL_METRICS
                if name in metrics
            ]
            logger.info("step %d | eval | %s", state.global_step, " | ".join(parts))

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._redirection.close()


def format_seconds(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
