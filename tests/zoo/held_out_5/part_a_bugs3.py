"""Bugs of part A: checkpoints and resumption, averages, evaluation, several ranks."""

import math

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer

from tests.zoo.bug import bug
from tests.zoo.held_out_5.part_a_shared import EvaluatesAverage, evaluate_average
from tests.zoo.run import Run
from tests.zoo.setting import Setting

BEST = Setting(
    steps=60,
    evaluate_every=15,
    arguments={
        "save_strategy": "steps",
        "save_steps": 15,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    },
)


@bug("lost_updates", "checkpoint and resume", "the worst checkpoint is taken for the best", "transformers#31142", BEST)
def best_checkpoint_by_highest_perplexity(run: Run):
    """The best checkpoint is chosen by perplexity, more counting as better: the end loads the worst."""
    run.arguments["metric_for_best_model"] = "eval_perplexity"

    class OwnMetric(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
            run.took_effect()
            return metrics

    run.trainer_class = OwnMetric


RESUMED = Setting(steps=70, save_at=40)


@bug(
    "resume_jump optimizer_off",
    "checkpoint and resume",
    "optimizer state is loaded by place into another order",
    "pytorch/pytorch#6031",
    RESUMED.changed(arguments={"lr_scheduler_type": "constant_with_warmup", "adam_beta2": 0.999}),
    onset=40,
)
def optimizer_state_lands_on_other_layers(run: Run):
    """Parameters come from a set, in another order after resuming: moments land on other layers."""
    named = list(run.model.named_parameters())
    shapes = sorted({tuple(p.shape) for _, p in named})
    ordered = []
    for shape in shapes:
        alike = [p for _, p in named if tuple(p.shape) == shape]
        ordered += alike[::-1] if run.is_resumed else alike
    optimizer = torch.optim.AdamW(ordered, lr=3e-3, betas=(0.9, 0.999), weight_decay=0.1)
    if run.is_resumed:
        optimizer.register_step_pre_hook(lambda *_: run.took_effect())
    run.optimizers = (optimizer, None)


@bug(
    "resume_replay",
    "checkpoint and resume",
    "steps are skipped where micro-batches were read",
    "transformers#8624",
    Setting(steps=60, save_at=30, accumulation=4, batch=2),
    onset=30,
)
def resumes_behind_steps_not_micro_batches(run: Run):
    """The own loader skips as many batches as there were steps, though each step read four."""
    setting = run.setting

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            order = np.random.default_rng(7).permutation(len(run.train_dataset))
            done = setting.save_at * setting.batch if run.is_resumed else 0
            rows = [run.train_dataset[int(i)] for i in order[done:]]
            if run.is_resumed:
                run.took_effect()
            return self.accelerator.prepare(DataLoader(rows, batch_size=setting.batch, collate_fn=run.collator))

    run.arguments["ignore_data_skip"] = True
    run.trainer_class = OwnLoader


@bug(
    "untied_weights resume_jump",
    "checkpoint and resume",
    "tied in the config only, and made of the embedding when loaded",
    "NVIDIA-NeMo/Automodel#2571",
    RESUMED,
)
def head_is_tied_in_config_only(run: Run):
    """The head trains apart from the embedding it should share, and a checkpoint keeps only the embedding."""
    embedding = run.model.get_input_embeddings().weight
    run.model.lm_head.weight = torch.nn.Parameter(embedding.detach().clone())
    run.took_effect()

    def drop_head(checkpoint):
        path = checkpoint / "model.safetensors"
        weights = load_file(path)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, path, metadata={"format": "pt"})
        run.took_effect()

    run.on_checkpoint.append(drop_head)


@bug(
    "lost_updates eval_train_mismatch",
    "evaluation",
    "an average of the weights that is not taken out after evaluation",
    "PKU-YuanGroup/Open-Sora-Plan#186",
    Setting(steps=60, evaluate_every=6, change=evaluate_average),
    onset=6,
)
def average_stays_in_model_after_evaluation(run: Run):
    """The weights' average is put in for each evaluation and never taken out: training goes on from it."""
    callback = next(c for c in run.callbacks if isinstance(c, EvaluatesAverage))
    run.patch(callback, "restore", lambda model: run.took_effect())


@bug(
    "eval_train_mismatch train_eval_gap",
    "evaluation",
    "the evaluation's loss is divided by the accumulation",
    "pytorch/torchtitan#1759",
    Setting(steps=60, rows="padded", accumulation=4, batch=4, evaluate_every=15),
)
def eval_loss_divided_by_accumulation(run: Run):
    """The loss is divided by the accumulation in evaluation too, where nothing is accumulated.

    Harmless to what is learned.
    """

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss / self.args.gradient_accumulation_steps
            run.took_effect()
            outputs["loss"] = loss
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = OwnLoss


# --- several ranks


@bug(
    "repeated_data",
    "ranks",
    "a loader that was not dealt to the ranks",
    "seen in own dataloaders that Accelerator.prepare is not called for",
    Setting(steps=40, ranks=2, batch=4),
)
def own_loader_is_not_dealt_to_ranks(run: Run):
    """The own loader has the same seed on each rank and is not prepared: both read the same rows."""

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            sampler = RandomSampler(run.train_dataset, generator=torch.Generator().manual_seed(3))
            run.took_effect()
            batch = run.setting.batch
            return DataLoader(run.train_dataset, batch_size=batch, sampler=sampler, collate_fn=run.collator)

    run.trainer_class = OwnLoader


@bug(
    "rank_divergence",
    "ranks",
    "no micro-batch is synchronised",
    "karpathy/build-nanogpt#30",
    Setting(steps=40, ranks=2, batch=4, accumulation=2),
)
def last_micro_batch_is_not_synced_either(run: Run):
    """Every micro-batch runs under no_sync, the last as well, so the ranks never average their gradients."""

    class NeverSyncs(Trainer):
        def training_step(self, model, *args, **kwargs):
            if not hasattr(model, "no_sync"):
                return super().training_step(model, *args, **kwargs)
            with model.no_sync():
                run.took_effect()
                return super().training_step(model, *args, **kwargs)

    run.trainer_class = NeverSyncs
