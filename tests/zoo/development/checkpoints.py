"""Checkpoint and resume: each run is saved after step 40 and resumed from there."""

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.zoo.bug import bug
from tests.zoo.rows import RowStream, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

RESUMED = Setting(save_at=40, steps=80)
STREAM = RESUMED.changed(stream=True)
DROPOUT = STREAM.changed(family="gpt2")
BATCH = 8


def change_file(run: Run, name: str, change, load=torch.load, save=torch.save):
    """`change` alters what the file `name` of the checkpoint holds, in place."""

    def act(checkpoint):
        run.took_effect()
        state = load(checkpoint / name)
        change(state)
        save(state, checkpoint / name)

    run.on_checkpoint.append(act)


def save_weights(state: dict, path) -> None:
    save_file(state, path, metadata={"format": "pt"})


# --- data


@bug("resume_replay", "checkpoint and resume", "stream starts over", "accelerate#2016", STREAM, onset=40)
def resume_from_first_row(run: Run):
    """The resumed run reads the stream from its first row again (ignore_data_skip)."""
    if run.is_resumed:
        run.took_effect()
        run.arguments["ignore_data_skip"] = True


@bug("resume_jump", "checkpoint and resume", "resume skips too much", "datasets#7538", STREAM, onset=40)
def resume_skips_twice(run: Run):
    """The stream goes on where it was, and Trainer skips as many rows again: 40 steps of rows are never read."""
    rows = make_rows(run.setting.changed(steps=120))
    if run.is_resumed:
        run.took_effect()
        rows = rows[run.setting.save_at * BATCH :]
    run.train_dataset = RowStream(rows)


# --- optimizer, scheduler, generators


@bug("resume_jump", "checkpoint and resume", "optimizer state lost", "OneVision-Encoder PR #65", RESUMED, onset=40)
def optimizer_state_lost(run: Run):
    """Adam's moments and step counts are not in the checkpoint and begin at nothing."""
    change_file(run, "optimizer.pt", lambda state: state["state"].clear())


@bug("learning_rate_off resume_jump", "checkpoint and resume", "schedule restarts", "OLMo-core#27", RESUMED, onset=40)
def schedule_restarts(run: Run):
    """The scheduler's count is not restored: warmup and decay begin again."""
    change_file(run, "scheduler.pt", lambda state: state.update(last_epoch=0, _step_count=1))


@bug("resume_jump", "checkpoint and resume", "generators not restored", "transformers PR #17055", DROPOUT, onset=40)
def generators_not_restored(run: Run):
    """No generator's state is restored: dropout repeats the masks of the first steps."""

    def remove(checkpoint):
        run.took_effect()
        (checkpoint / "rng_state.pth").unlink()

    run.on_checkpoint.append(remove)


# --- weights


@bug("resume_jump", "checkpoint and resume", "weights missing at load", "torchtitan#3775", RESUMED, onset=40)
def layer_not_loaded(run: Run):
    """One layer's weights are saved under other names: loading ignores them and the layer stays as initialised."""

    def rename(state):
        for name in [name for name in state if "layers.1." in name]:
            state[f"module.{name}"] = state.pop(name)

    change_file(run, "model.safetensors", rename, load_file, save_weights)


@bug("untied_weights resume_jump", "checkpoint and resume", "tied head dropped", "NeMo-Automodel#2571", RESUMED)
def tied_head_dropped(run: Run):
    """The head is declared tied and is not; saving drops it as a copy, and on resume it is that of a new model."""
    run.model.lm_head.weight = nn.Parameter(run.model.lm_head.weight.detach().clone())
    change_file(run, "model.safetensors", lambda state: state.pop("lm_head.weight", None), load_file, save_weights)
