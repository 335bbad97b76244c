"""What schedules of the user's own show before step 1: one that ends early, one that waits for the loss to rise."""

from collections.abc import Callable

from torch.optim.lr_scheduler import ReduceLROnPlateau

# Of the run, at a rate of 0. Chosen, not measured: no schedule that was made for the run leaves so much.
IDLE = 0.1


def judge_idle(factor: Callable[[int], float] | None, steps: int) -> dict | None:
    """A finding's texts and numbers, where the rate is 0 in the last tenth of the run and more. `factor`: on the rate,
    by step."""
    if factor is None or steps < 1 / IDLE:
        return None
    try:
        if any(factor(step) != 0 for step in range(int((1 - IDLE) * steps), steps)):
            return None
        last = max((step for step in range(steps) if factor(step) != 0), default=-1)
    except Exception:  # a table of the user's own
        return None
    if last < 0:  # Adafactor's, which finds its rate itself
        return None
    return {
        "severity": "warning",
        "found": f"a rate of 0 from step {last + 2:,} on",
        "expected": f"a schedule of {steps:,} steps",
        "causes": ("its length is another run's or corpus's",),
        "action": "make the schedule for max_steps",
        "evidence": {"steps": steps, "end": last + 1},
    }


def judge_plateau(scheduler, metric: str | None) -> dict | None:
    """The same, of a rate that is cut where a loss falls. `metric`: what the scheduler is given."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    is_loss = (metric or "loss").endswith(("loss", "perplexity"))
    if not isinstance(scheduler, ReduceLROnPlateau) or scheduler.mode != "max" or not is_loss:
        return None
    return {
        "severity": "warning",
        "found": "ReduceLROnPlateau of mode max: it cuts the rate while the loss falls",
        "expected": "mode min",
        "causes": ("it was made for an accuracy",),
        "action": 'set mode="min", or metric_for_best_model to what shall grow',
        "evidence": {"mode": scheduler.mode, "metric": metric},
    }
