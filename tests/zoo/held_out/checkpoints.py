"""Checkpoints and resuming."""

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from recipe.data.lanes import start_of_lane
from recipe.data.loader import BatchLoader
from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "checkpoint and resume"
RESUMED = Setting(save_at=40, steps=80)
RECIPE_RESUMED = Setting(kind="recipe", vocabulary=4096, steps=60, save_at=30)


class Average(TrainerCallback):
    """Keeps a moving average of the weights."""

    def __init__(self, decay: float):
        self.decay, self.weights = decay, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        for name, value in model.state_dict().items():
            self.weights.setdefault(name, value.clone()).lerp_(value, 1 - self.decay)


def change_saved_weights(run: Run, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    def rewrite(checkpoint):
        run.took_effect()
        path = checkpoint / "model.safetensors"
        saved = {name: change(name, value).contiguous() for name, value in load_file(path).items()}
        save_file(saved, path, metadata={"format": "pt"})

    run.on_checkpoint.append(rewrite)


@bug("resume_jump", AREA, "averaged weights saved for the weights", "YOLOX#1318", RESUMED, onset=40)
def resumes_from_averaged_weights(run: Run):
    """The checkpoint holds the moving average of the weights, and the resumed run takes it for the weights."""
    average = Average(decay=0.95)
    run.callbacks.append(average)
    change_saved_weights(run, lambda name, value: average.weights[name].clone())


@bug("resume_jump", AREA, "master weights not saved", "OpenTau#185", RESUMED, onset=40)
def masters_rebuilt_from_bf16(run: Run):
    """The checkpoint has the weights in bf16, from which the resumed run makes its fp32 weights."""
    change_saved_weights(run, lambda name, value: value.bfloat16().float())


@bug("resume_jump", AREA, "Adam's step count not saved", "nntile PR #351", RESUMED, onset=40)
def adam_counts_from_zero(run: Run):
    """Adam's moments are restored and its step count is 0: bias is corrected in moments that have none."""

    def reset(checkpoint):
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        for values in state["state"].values():
            run.took_effect()
            values["step"].zero_()
        torch.save(state, checkpoint / "optimizer.pt")

    run.on_checkpoint.append(reset)


@bug(
    "resume_replay repeated_data",
    AREA,
    "a part of the readers starts over",
    "torchtitan#409",
    RECIPE_RESUMED,
    onset=30,
)
def recipe_saves_half_the_lanes(run: Run):
    """The checkpoint holds where one of two readers stands: the other's lanes begin again on resume."""
    advance = BatchLoader._advance

    def advance_half(loader, batch):
        run.took_effect()
        advance(loader, batch)
        for lanes in loader.position["lanes"]:
            lanes[1::2] = [start_of_lane() for _ in lanes[1::2]]

    if not run.is_resumed:
        run.patch(BatchLoader, "_advance", advance_half)
