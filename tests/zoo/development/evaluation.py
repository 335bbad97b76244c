"""Evaluation: training is healthy, and the eval loss says something else than it should."""

from torch.nn import functional as F

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

ENGLISH = Setting(evaluate_every=50)
DROPOUT = ENGLISH.changed(family="gpt2")
ACCUMULATED = ENGLISH.changed(batch=4, accumulation=2)
PADDED = ENGLISH.changed(rows="padded")
RANKS = Setting(ranks=2, steps=60, evaluate_every=30)


def change_eval_loss(run: Run, loss_of):
    """`loss_of(trainer, model, inputs, loss)` replaces the loss of an eval batch."""

    class Evaluates(run.trainer_class):
        def prediction_step(self, model, inputs, *args, **kwargs):
            run.took_effect()
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            return loss_of(self, model, inputs, loss), *rest

    run.trainer_class = Evaluates


@bug("eval_train_mismatch train_eval_gap", "evaluation", "no shift in eval", "litgpt#419", ENGLISH)
def eval_without_shift(run: Run):
    """Evaluation has a loss of its own, which scores each position on the token that it was given."""

    def unshifted(trainer, model, inputs, loss):
        logits = model(input_ids=inputs["input_ids"]).logits.detach()
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    change_eval_loss(run, unshifted)


@bug("eval_not_repeatable eval_train_mismatch", "evaluation", "dropout in eval", "transformers#33844", DROPOUT)
def dropout_in_evaluation(run: Run):
    """Attention's dropout does not ask whether the model trains."""
    attend = F.scaled_dot_product_attention

    def always_drop(*args, **kwargs):
        if not run.model.training:
            run.took_effect()
        return attend(*args, **{**kwargs, "dropout_p": run.model.config.attn_pdrop})

    run.patch(F, "scaled_dot_product_attention", always_drop)


@bug("eval_train_mismatch train_eval_gap", "evaluation", "eval loss scaled", "torchtitan#1758", ACCUMULATED)
def eval_divided_by_accumulation(run: Run):
    """The eval loss is divided by the accumulation steps, as only a training loss should be."""
    change_eval_loss(run, lambda trainer, model, inputs, loss: loss / trainer.args.gradient_accumulation_steps)


@bug("eval_train_mismatch train_eval_gap", "evaluation", "eval loss scaled", "transformers#35078", RANKS)
def eval_multiplied_by_ranks(run: Run):
    """The eval loss is multiplied by the number of ranks, as tokens were counted over all of them."""
    change_eval_loss(run, lambda trainer, model, inputs, loss: loss * trainer.args.world_size)


@bug("eval_train_mismatch", "evaluation", "mean of means", "transformers#39241", PADDED)
def mean_of_row_means(run: Run):
    """The eval loss is the mean of the rows' means, though rows are of uneven length: a short one weighs as much."""
    run.eval_dataset.sort(key=lambda row: int(row["attention_mask"].sum()))
    run.arguments["per_device_eval_batch_size"] = 1
    change_eval_loss(run, lambda trainer, model, inputs, loss: loss)
