"""Labels and loss."""

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.zoo.bug import bug
from tests.zoo.development.labels import change_batch, shifted
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "labels and loss"
ENGLISH = Setting()
PADDED = Setting(rows="padded")
PROMPTS = Setting(rows="prompts")
SMOOTHED = Setting(arguments={"label_smoothing_factor": 0.1})


@bug("missing_label_shift", AREA, "label smoother does not shift", "transformers#27161", SMOOTHED)
def label_smoother_without_shift(run: Run):
    """Trainer does not know the wrapper's class as a causal model, and its label smoother does not shift."""

    def name_of_wrapper():
        run.took_effect()
        return "PeftModelForCausalLM"

    run.model._get_name = name_of_wrapper


@bug("init_loss_off", AREA, "softmax before cross-entropy", "bkitano/llama-from-scratch#5", ENGLISH)
def softmax_before_cross_entropy(run: Run):
    """The model returns probabilities, and the loss takes them for logits."""

    def probabilities(module, inputs, logits):
        run.took_effect()
        return logits.softmax(-1)

    run.model.lm_head.register_forward_hook(probabilities)


@bug("", AREA, "mask ends one token late", "torchtitan#2755", PROMPTS)
def first_answer_token_not_scored(run: Run):
    """The mask of the prompt is a token too long: the first token of each answer is not scored."""

    def change(batch):
        first = (batch["labels"] != IGNORED).int().argmax(1, keepdim=True)
        batch["labels"].scatter_(1, first, IGNORED)

    change_batch(run, change)


@bug("wrong_loss_target", AREA, "shift within each shard of the row", "transformers PR #36607", ENGLISH)
def labels_lost_at_shard_ends(run: Run):
    """Rows are cut into four shards before the shift: the last token of a shard loses its target."""

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):  # shards' means are merged
        run.took_effect()
        shards = shifted(labels.unflatten(1, (4, -1))).flatten(1)
        return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shards, **kwargs)

    run.model.loss_function = loss_function


@bug("wrong_loss_target", AREA, "shift rolls into the next row", "verl#6475", ENGLISH)
def roll_into_next_row(run: Run):
    """Labels are rolled over the flattened batch: a row's last target is the first token of the next row."""

    def loss_function(logits, labels, vocab_size, **kwargs):
        run.took_effect()
        rolled = labels.flatten().roll(-1).view_as(labels)
        return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=rolled, **kwargs)

    run.model.loss_function = loss_function


@bug("init_loss_off loss_below_envelope", AREA, "masked positions in the divisor", "d2l-en#2076", PADDED)
def mean_over_padding_too(run: Run):
    """Padding has weight 0 in the sum of the losses, but is counted in what the sum is divided by."""

    def loss_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs) -> torch.Tensor:
        run.took_effect()
        losses = F.cross_entropy(logits.float().mT, shifted(labels), ignore_index=IGNORED, reduction="none")
        return losses.mean()

    run.model.loss_function = loss_function
