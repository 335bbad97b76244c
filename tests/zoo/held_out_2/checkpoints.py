"""Checkpoints and resuming."""

import copy

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "checkpoint and resume"
RESUMED = Setting(save_at=40, steps=80)


@bug("resume_jump learning_rate_off", AREA, "saved before the optimizer's step", "AstrAI PR #27", RESUMED, onset=40)
def saved_before_the_step(run: Run):
    """Weights, optimizer and schedule are saved before the step whose number the checkpoint has."""
    before = {}

    class Keeps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
            if state.global_step == run.setting.save_at - 1:
                states = {"optimizer": optimizer.state_dict(), "scheduler": lr_scheduler.state_dict()}
                before.update(copy.deepcopy({"model": model.state_dict(), **states}))

    def save(checkpoint):
        run.took_effect()
        saved = {name: before["model"][name] for name in load_file(checkpoint / "model.safetensors")}
        save_file(saved, checkpoint / "model.safetensors", metadata={"format": "pt"})
        for name in ("optimizer", "scheduler"):
            torch.save(before[name], checkpoint / f"{name}.pt")

    run.callbacks.append(Keeps())
    run.on_checkpoint.append(save)


@bug("resume_jump", AREA, "optimizer state in another order", "pytorch PR #6031", RESUMED, onset=40)
def optimizer_state_in_another_order(run: Run):
    """Parameters come from a set: after loading, those of one shape have each other's moments."""

    def reorder(checkpoint):
        run.took_effect()
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=False)
        alike = {}
        for number, state in saved["state"].items():
            alike.setdefault(state["exp_avg"].shape, []).append(number)
        for numbers in alike.values():
            states = [saved["state"][number] for number in numbers]
            saved["state"].update(zip(numbers, states[1:] + states[:1], strict=True))
        torch.save(saved, checkpoint / "optimizer.pt")

    run.on_checkpoint.append(reorder)
