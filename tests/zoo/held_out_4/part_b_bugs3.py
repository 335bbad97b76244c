"""Bugs of ranks, evaluation and checkpoints."""

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.setting import Setting


@bug(
    "repeated_data",
    "ranks",
    "a sampler of another permutation on each rank",
    "NVlabs/LongLive#71",
    Setting(steps=40, batch=4, ranks=2),
)
def ranks_shuffle_apart(run):
    """Each rank shuffles with a seed of its own before it takes its share: rows repeat on ranks, others never come."""

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            size, rank = self.args.world_size, self.args.process_index
            sampler = DistributedSampler(self.train_dataset, size, rank, shuffle=True, seed=1000 * rank)
            run.took_effect()
            return DataLoader(self.train_dataset, run.setting.batch, sampler=sampler, collate_fn=self.data_collator)

    run.trainer_class = OwnLoader


@bug(
    "rank_divergence",
    "ranks",
    "weights drawn on each rank after they were sent around",
    "seen in callbacks that initialize new rows when training begins",
    Setting(steps=40, batch=4, ranks=2),
)
def ranks_draw_rows(run):
    """When training begins, each rank draws the rows of rare bytes anew from a seed of its own."""

    class DrawRows(TrainerCallback):
        @torch.no_grad()
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            generator = torch.Generator().manual_seed(args.seed + args.process_index)
            weight = getattr(model, "module", model).get_input_embeddings().weight
            weight[:128].copy_(0.02 * torch.randn(128, weight.shape[1], generator=generator))
            run.took_effect()

    run.callbacks.append(DrawRows())


@bug(
    "eval_not_repeatable eval_train_mismatch",
    "evaluation",
    "evaluation in training mode",
    "seen in trainers that override prediction_step",
    Setting("gpt2", steps=80, evaluate_every=20),
)
def dropout_left_on_in_evaluation(run):
    """An own `prediction_step` puts the model into training mode, and evaluation runs with dropout."""

    class OwnStep(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            model.train()
            run.took_effect()
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            return loss.detach(), None, None

    run.trainer_class = OwnStep


# --- checkpoints


@bug(
    "resume_jump",
    "checkpoint and resume",
    "weights under a wrapper's names are not found and not loaded",
    "FareedKhan-dev/train-llm-from-scratch#36",
    Setting(steps=80, save_at=50),
    onset=50,
)
def compiled_names_in_checkpoint(run):
    """The checkpoint was saved from a compiled model: no name fits, nothing is loaded, and random weights go on."""

    def rename(checkpoint):
        path = checkpoint / "model.safetensors"
        save_file({f"_orig_mod.{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
        run.took_effect()

    run.on_checkpoint.append(rename)


def best_at_end(run) -> None:
    saved = {"save_strategy": "steps", "save_steps": run.setting.evaluate_every, "load_best_model_at_end": True}
    run.arguments.update(saved, metric_for_best_model="eval_loss", greater_is_better=False)


@bug(
    "lost_updates",
    "evaluation",
    "the best checkpoint chosen by the wrong direction",
    "huggingface/transformers#31142",
    Setting(steps=80, evaluate_every=20, change=best_at_end),
)
def worst_checkpoint_is_loaded(run):
    """The checkpoint with the greatest evaluation loss is taken as the best one and loaded when training ends."""
    run.arguments["greater_is_better"] = True
    run.took_effect()
