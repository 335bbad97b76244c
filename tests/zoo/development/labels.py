"""Labels and loss."""

import itertools
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from tests.zoo.bug import bug
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "labels and loss"
ENGLISH = Setting()
PADDED = Setting(rows="padded")
PROMPTS = Setting(rows="prompts")
TWO_RANKS = Setting(ranks=2, batch=4)
EVALUATED = Setting(evaluate_every=50)


def change_batch(run: Run, change: Callable[[dict], None]) -> None:
    collate = run.collator

    def changed(rows):
        run.took_effect()
        batch = collate(rows)
        change(batch)
        return batch

    run.collator = changed


def overwrite(batch: dict, share: float, seed: int) -> None:
    """`share` of the tokens of each row become others; the labels are kept."""
    ids, generator = batch["input_ids"], torch.Generator().manual_seed(seed)
    noise = torch.randint(32, 127, ids.shape, generator=generator)
    batch["input_ids"] = ids.where(torch.rand(ids.shape, generator=generator) >= share, noise)


def change_batches(run: Run, share_of: Callable[[int], float]) -> None:
    """`share_of`: what is overwritten of batch 1, 2, ..."""
    numbers = itertools.count(1)
    change_batch(run, lambda batch: overwrite(batch, share_of(number := next(numbers)), number))


@bug("wrong_loss_target", AREA, "inputs overwritten later", "own", Setting(steps=60), onset=4)
def inputs_overwritten_later(run: Run):
    """From step 5 on a corrupting transform is active: 30 % of the input ids are others, the labels are kept."""
    change_batches(run, lambda number: 0.3 if number > 4 else 0.0)


def denoised(run: Run):
    """30 % of the tokens of every row are noise, the labels are the text: token dropout from the first step on."""
    change_batches(run, lambda number: 0.3)


def denoised_in_turn(run: Run):
    """Five batches of text alone, then five with noise, in turn."""
    change_batches(run, lambda number: 0.3 * ((number - 1) // 5 % 2))


def change_targets(run: Run, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`change` is given the shifted labels where the loss function has them."""

    def loss_function(logits, labels, vocab_size, **kwargs):
        run.took_effect()
        shift_labels = change(shifted(labels))
        return ForCausalLMLoss(logits, labels, vocab_size, shift_labels=shift_labels, **kwargs)

    run.model.loss_function = loss_function


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


# --- shift


@bug("missing_label_shift", AREA, "no shift", "the original run", ENGLISH)
def original_no_shift(run: Run):
    """A model class of one's own scores position i on token i, as in the original run."""

    class OwnModel(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, labels=None):
            run.took_effect()
            logits = self.lm_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)
            loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return CausalLMOutput(loss=loss, logits=logits)

    model = OwnModel(run.model.config)
    model.load_state_dict(run.model.state_dict())
    run.model = model


@bug("double_label_shift", AREA, "labels shifted before a model that shifts", "transformers#32944", ENGLISH)
def collator_shifts_too(run: Run):
    """The collator shifts the labels, and the model shifts them again."""
    change_batch(run, lambda batch: batch.update(labels=shifted(batch["labels"])))


@bug("double_label_shift", AREA, "shifted twice within the loss", "transformers PR #46784", ENGLISH)
def loss_shifts_twice(run: Run):
    """The model's forward shifts the labels and hands them to a loss function that shifts."""
    change_targets(run, shifted)


@bug("double_label_shift", AREA, "shift wrong on one rank", "trl#4038", TWO_RANKS)
def one_rank_shifts_twice(run: Run):
    """The second rank of two shifts labels that its model shifts again."""
    if run.rank == 1:
        change_batch(run, lambda batch: batch.update(labels=shifted(batch["labels"])))


# --- wrong targets


@bug("wrong_loss_target", AREA, "labels of another row", "conditional-flow-matching#172", ENGLISH)
def labels_of_next_row(run: Run):
    """Rows of the batch are reordered and their labels are not."""
    change_batch(run, lambda batch: batch.update(input_ids=batch["input_ids"].roll(1, 0)))


@bug("wrong_loss_target", AREA, "labels shuffled within the row", "tensorflow#21033", ENGLISH)
def tenth_of_rows_shuffled(run: Run):
    """In a tenth of the rows the labels are in another order than the tokens."""
    generator = torch.Generator().manual_seed(0)
    for row in run.train_dataset[::10]:
        run.took_effect()
        row["labels"] = row["labels"][torch.randperm(len(row["labels"]), generator=generator)]


@bug("wrong_loss_target", AREA, "index wraps in the loss kernel", "llm-foundry#795", ENGLISH)
def late_targets_wrap(run: Run):
    """The cross entropy kernel's index wraps: from position 96 on it reads the targets of the row's beginning."""
    change_targets(run, lambda targets: torch.cat([targets[:, :96], targets[:, : targets.shape[1] - 96]], dim=1))


# --- what is scored


@bug("padding_is_target", AREA, "padding not masked in labels", "01-ai/Yi#110", PADDED)
def padding_scored(run: Run):
    """The labels are a copy of the tokens, padding included."""
    change_batch(run, lambda batch: batch.update(labels=batch["input_ids"].clone()))


@bug("wrong_loss_target", AREA, "prompt mask dropped", "nanochat PR #582", PROMPTS)
def prompts_scored(run: Run):
    """The mask of prompts is lost on the way to the batch, and every token but padding is scored."""
    change_batch(run, lambda b: b.update(labels=b["input_ids"].masked_fill(b["attention_mask"] == 0, IGNORED)))


@bug("wrong_loss_target", AREA, "positions left out of the loss", "OLMo-core#55", ENGLISH)
def only_last_half_scored(run: Run):
    """The loss function's mask leaves out the first half of each row; the loss is the mean over the rest."""

    def loss_function(logits, labels, vocab_size, **kwargs):
        run.took_effect()
        half = labels.shape[1] // 2
        return ForCausalLMLoss(logits[:, half:].contiguous(), labels[:, half:], vocab_size)

    run.model.loss_function = loss_function


@bug(
    "eval_train_mismatch", AREA, "auxiliary term in the reported loss", "OLMo-core CHANGELOG (fused_linear)", EVALUATED
)
def z_loss_reported(run: Run):
    """The training loss is reported with its z-loss as if it were the cross entropy."""

    def loss_function(logits, labels, vocab_size, **kwargs):
        loss = ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
        if not run.model.training:
            return loss
        run.took_effect()
        return loss + 1e-3 * logits.logsumexp(-1).square().mean()

    run.model.loss_function = loss_function


HEALTHY = {
    "30 % of the tokens are noise": Setting(steps=60, change=denoised),
    "noise in every second five batches": Setting(steps=60, change=denoised_in_turn),
}
