"""Losses that are no next-token cross entropy, or compute one in an unusual way, and faults in them."""

import copy
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForTokenClassification

from tests.zoo.bug import bug
from tests.zoo.models import FAMILIES, make_model
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "labels and loss"
SHORT = Setting(steps=60)
MASK = 255  # a byte that no text has


def compute(run: Run, loss_of: Callable) -> None:
    """`loss_of(model, inputs)` gives the loss and the model's outputs."""

    class Own(run.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            run.took_effect()
            loss, outputs = loss_of(model, inputs)
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Own


def next_token(logits: torch.Tensor, labels: torch.Tensor, shift: int = 1) -> torch.Tensor:
    length = logits.shape[1] - shift
    return F.cross_entropy(logits[:, :length].flatten(0, 1), labels[:, shift:].flatten(), ignore_index=IGNORED)


# --- distillation


def distil(run: Run, sure: float, share: float, shift: int = 1) -> None:
    """`share` of a cross entropy at `shift`; the rest is a divergence from a teacher, `sure` times its logits."""
    teacher = make_model(run.setting.changed(seed=1, sizes={"tie_word_embeddings": False})).eval()

    def loss_of(model, inputs):
        outputs = model(input_ids=inputs["input_ids"])
        with torch.no_grad():
            wanted = (sure * teacher(input_ids=inputs["input_ids"]).logits).softmax(-1)
        divergence = F.kl_div(outputs.logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
        cross_entropy = next_token(outputs.logits, inputs["labels"], shift) if share else 0.0
        return share * cross_entropy + (1 - share) * divergence, outputs

    compute(run, loss_of)


def distilled(run: Run):
    """The loss is the divergence from a teacher alone."""
    distil(run, sure=10.0, share=0.0)


def distilled_from_a_sure_teacher(run: Run):
    """The teacher's probabilities are near one-hot."""
    distil(run, sure=1e4, share=0.0)


def distilled_and_trained(run: Run):
    """Half of the loss is the divergence from a teacher, half the cross entropy."""
    distil(run, sure=100.0, share=0.5)


@bug("missing_label_shift", AREA, "no shift beside a teacher", "the original run", SHORT)
def distilled_without_shift(run: Run):
    """The cross entropy that is mixed with a divergence from a sure teacher lacks the shift."""
    distil(run, sure=1e4, share=0.5, shift=0)


def distilled_and_divided(run: Run):
    """The same over 4 micro-batches; the loss ignores `num_items_in_batch`, and the Trainer is told so: it divides."""
    distilled_and_trained(run)
    run.on_trainer.append(lambda trainer: setattr(trainer, "model_accepts_loss_kwargs", False))


@bug(
    "accumulation_mismatch",
    "accumulation",
    "a mixed loss that nothing divides",
    "MakazhanAlpamys/Soup#720",
    SHORT.changed(batch=2, accumulation=4, change=distilled_and_divided),
)
def mixed_loss_not_divided(run: Run):
    """The Trainer is not told that the loss ignores `num_items_in_batch`: nothing divides by 4 micro-batches."""
    run.on_trainer.clear()
    run.took_effect()


# --- denoising, classification


def look_both_ways(model, ids: torch.Tensor):
    return model(input_ids=ids, attention_mask=torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1]))


def diffused(run: Run):
    """Masked diffusion: a random share of each row is hidden and restored by a model that looks both ways."""

    def loss_of(model, inputs):
        ids = inputs["input_ids"]
        share = torch.rand(len(ids), 1) * 0.8 + 0.2
        hidden = torch.rand(ids.shape) < share
        outputs = look_both_ways(model, torch.where(hidden, MASK, ids))
        losses = F.cross_entropy(outputs.logits.transpose(1, 2), inputs["labels"], reduction="none")
        return (losses * hidden / share).mean(), outputs

    compute(run, loss_of)


def as_bert(run: Run, model_class, **more) -> None:
    setting = run.setting
    sizes = FAMILIES["bert"] | {"max_position_embeddings": 2 * setting.block, "vocab_size": setting.vocabulary}
    sizes["is_decoder"] = False
    torch.manual_seed(setting.seed)
    run.model = model_class.from_config(AutoConfig.for_model("bert", **sizes, **more))


def masked_words(run: Run):
    """BERT restores 15 % of the tokens, four fifths of them hidden; the collator masks."""
    as_bert(run, AutoModelForMaskedLM)
    collate, generator = run.collator, torch.Generator().manual_seed(0)

    def masked(rows):
        run.took_effect()
        batch = collate(rows)
        drawn = torch.rand(batch["input_ids"].shape, generator=generator)
        batch["labels"] = batch["input_ids"].where(drawn < 0.15, IGNORED)
        batch["input_ids"] = torch.where(drawn < 0.12, MASK, batch["input_ids"])
        return batch

    run.collator = masked


def tokens_classified(run: Run):
    """BERT says of each token which of five kinds it is."""
    as_bert(run, AutoModelForTokenClassification, num_labels=5)
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        row["labels"] = row["input_ids"] % 5


def class_at_the_end(run: Run):
    """The last token of a row is one of two and says what the row is; it alone is scored."""
    for number, row in enumerate([*run.train_dataset, *run.eval_dataset]):
        run.took_effect()
        row["input_ids"][-1] = 65 + (number % 8 == 0)
        row["labels"] = torch.full_like(row["input_ids"], IGNORED)
        row["labels"][-1] = row["input_ids"][-1]


# --- a next-token cross entropy, computed in another way


def two_passes(run: Run):
    """R-Drop: two passes with dropout, whose distributions are drawn together."""

    def loss_of(model, inputs):
        first, second = (model(**inputs) for _ in range(2))
        z, other = first.logits.log_softmax(-1), second.logits.log_softmax(-1)
        return (first.loss + second.loss) / 2 + F.kl_div(z, other, log_target=True, reduction="batchmean") / 128, first

    compute(run, loss_of)


def predict_several(run: Run, first: int) -> None:
    """The head predicts three tokens, the first at shift `first`, from hidden states rolled by their place."""

    def loss_of(model, inputs):
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        logits = [model.lm_head(torch.roll(hidden, place, dims=-1)) for place in range(3)]
        losses = [next_token(z, inputs["labels"], first + place) for place, z in enumerate(logits)]
        return sum(losses) / 3, {"logits": logits[0]}

    compute(run, loss_of)


def three_tokens_predicted(run: Run):
    """Multi-token prediction with one head that runs three times."""
    predict_several(run, first=1)


@bug("missing_label_shift", AREA, "first of several heads without shift", "the original run", SHORT)
def first_of_three_without_shift(run: Run):
    """Of three heads the first is scored on the token that it sees."""
    predict_several(run, first=0)


def moved_embedding(run: Run):
    """FGM: a second backward pass with the embedding moved along its gradient, which is then put back."""

    class Adversarial(run.trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            run.took_effect()
            weight = model.get_input_embeddings().weight
            before = weight.detach().clone()
            weight.data.add_(0.1 * weight.grad / weight.grad.norm())
            super().training_step(model, inputs, num_items_in_batch)
            weight.data.copy_(before)
            return loss

    run.trainer_class = Adversarial


def sharpness_aware(run: Run):
    """SAM: the gradient is that of the weights moved along the first gradient."""

    class Sharpness(run.trainer_class):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, inputs, num_items_in_batch)
            run.took_effect()
            moves = [(p, 0.02 * p.grad / p.grad.norm().clamp_min(1e-12)) for p in model.parameters()]
            for parameter, move in moves:
                parameter.data.add_(move)
            model.zero_grad()
            loss = super().training_step(model, inputs, num_items_in_batch)
            for parameter, move in moves:
                parameter.data.sub_(move)
            return loss

    run.trainer_class = Sharpness


@bug("non_causal_attention", "attention and positions", "mask made in compute_loss", "LLaMA-Factory#9135", SHORT)
def full_mask_in_compute_loss(run: Run):
    """`compute_loss` builds a 4-D mask that hides nothing."""

    def loss_of(model, inputs):
        outputs = look_both_ways(model, inputs["input_ids"])
        return next_token(outputs.logits, inputs["labels"]), outputs

    compute(run, loss_of)


# --- preferences


def prefer(run: Run, shift: int) -> None:
    """DPO of one's own against a frozen copy: of each two rows the first is chosen."""
    reference = copy.deepcopy(run.model).eval()

    def scores(model, ids):
        logits = model(input_ids=ids).logits[:, : ids.shape[1] - shift].log_softmax(-1)
        return logits.gather(-1, ids[:, shift:, None]).sum((1, 2))

    def loss_of(model, inputs):
        ids = inputs["input_ids"]
        with torch.no_grad():
            before = scores(reference, ids)
        gains = scores(model, ids) - before
        return -F.logsigmoid(0.1 * (gains[::2] - gains[1::2])).mean(), {}

    compute(run, loss_of)


def preferred(run: Run):
    """DPO of one's own: of each two rows the first is chosen."""
    prefer(run, shift=1)


@bug("missing_label_shift", AREA, "no shift in log-probabilities", "the original run", SHORT)
def preferred_without_shift(run: Run):
    """DPO of one's own takes the log-probability of each token at its own place."""
    prefer(run, shift=0)


HEALTHY = {
    "distilled": SHORT.changed(change=distilled),
    "distilled from a sure teacher": SHORT.changed(change=distilled_from_a_sure_teacher),
    "distilled and trained": SHORT.changed(change=distilled_and_trained),
    "masked diffusion": SHORT.changed(change=diffused),
    "masked language model": SHORT.changed(change=masked_words),
    "tokens classified": SHORT.changed(change=tokens_classified),
    "a class at the end of each row": SHORT.changed(change=class_at_the_end),
    "R-Drop": SHORT.changed(change=two_passes, sizes={"attention_dropout": 0.1}),
    "three tokens predicted": SHORT.changed(change=three_tokens_predicted),
    "FGM": SHORT.changed(change=moved_embedding),
    "SAM": SHORT.changed(change=sharpness_aware),
    "preferences": SHORT.changed(change=preferred),
}
