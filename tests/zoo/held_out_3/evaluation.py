"""Evaluation."""

import torch
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "evaluation"
OFTEN = Setting(evaluate_every=25)


def swap(model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts the weights into the model and returns those that were there."""
    state = model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    for name, value in weights.items():
        state[name].copy_(value)
    return before


@bug("eval_train_mismatch train_eval_gap", AREA, "average never updated is evaluated", "senpai PR #2899", OFTEN)
def average_never_updated_is_evaluated(run: Run):
    """Evaluation is of a moving average that misses each update, since the compiled model's names have a prefix."""
    shadow = {name: value.clone() for name, value in run.model.state_dict().items()}

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, value in model.state_dict(prefix="_orig_mod.").items():
                if name in shadow:
                    shadow[name].lerp_(value, 0.1)

    class AverageEvaluated(run.trainer_class):
        def evaluate(self, *args, **kwargs):
            live = swap(self.model, shadow)
            run.took_effect()
            metrics = super().evaluate(*args, **kwargs)
            swap(self.model, live)
            return metrics

    run.callbacks.append(Average())
    run.trainer_class = AverageEvaluated
