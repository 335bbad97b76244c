"""What the loss is, as interventions show it: on the losses that people train with, and on faulty ones."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from recipe.guards import head
from recipe.guards.batches import SeenTokens, send_tokens
from recipe.guards.guard import CannotJudge, NotApplicable
from recipe.guards.objective import NEXT_TOKEN, Objective, find_objective
from recipe.guards.recording import record
from recipe.guards.targets import LossTarget
from tests.test_probe_targets import FusedLoss

VOCABULARY, LENGTH, MASK = 61, 24, 60
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.randint(3, MASK, (4, LENGTH), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS.clone()}


def llama(seed=0, scale=1.0, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **SIZES, **changes))
    model.lm_head.weight.data.mul_(scale)
    return model.train()


def batch_of(model, compute_loss, inputs=BATCH, is_new=True, world_size=1):
    """As much of a `sandbox.Batch` as the guard of the targets asks for."""
    base = record(model, lambda: compute_loss(model, inputs), ids=inputs["input_ids"])
    run = SimpleNamespace(world_size=world_size, embedding_rows=VOCABULARY, model=model, is_new_model=is_new, step=0)
    run.trainer, run.pad_token_id = SimpleNamespace(train_dataset=None), None

    def again(changed):
        return record(model, lambda: compute_loss(model, changed), base, changed["input_ids"])

    objective = find_objective(again, base, inputs, run)
    own = {"loss_of": lambda: lambda: compute_loss(model, inputs), "seen_tokens": lambda all_rows: seen_tokens(inputs)}
    return SimpleNamespace(
        is_first=False,
        objective=objective,
        recording=base,
        inputs=inputs,
        run=run,
        has_own_loss=True,
        model=model,
        **own,
    )


def seen_tokens(inputs) -> SeenTokens:
    return send_tokens(inputs, None).read()


def objective_of(model, compute_loss, inputs=BATCH, **about) -> Objective:
    return batch_of(model, compute_loss, inputs, **about).objective


def found(batch) -> list[str]:
    """Ids of what the guard of the targets finds."""
    return [verdict.id for verdict in LossTarget().probe(batch) if hasattr(verdict, "severity")]


def own(model, inputs):
    return model(**inputs).loss


def logits_of(model, inputs):
    return model(input_ids=inputs["input_ids"]).logits


def shifted_by(shift: int, name: str = "labels", **changes):
    """A loss of the user's own: position i against the value at i + shift."""

    def compute_loss(model, inputs):
        logits, targets = logits_of(model, inputs), inputs[name]
        logits = logits[:, : logits.shape[1] - shift].flatten(0, 1)
        return F.cross_entropy(logits, targets[:, shift:].flatten(), **changes)

    return compute_loss


def prompts_masked() -> dict:
    labels = IDS.clone()
    labels[:, :10] = -100
    return {"input_ids": IDS, "labels": labels}


def last_alone() -> dict:
    labels = torch.full_like(IDS, -100)
    labels[:, -1] = IDS[:, -1]
    return {"input_ids": IDS, "labels": labels}


KINDS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "label smoothing": {"label_smoothing": 0.1},
    "strong label smoothing": {"label_smoothing": 0.4},
}


@pytest.mark.parametrize("name", ["labels", "input_ids"])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # a flat head and a sure one
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_shift_of_the_users_own_is_told_whatever_the_loss_adds(kind, scale, name):
    for shift, wrong in ((1, []), (0, ["missing_label_shift"]), (2, ["double_label_shift"])):
        batch = batch_of(llama(scale=scale), shifted_by(shift, name, **kind))
        assert batch.objective.words == NEXT_TOKEN and batch.objective.is_next_token
        assert found(batch) == wrong


@pytest.mark.parametrize("make", [prompts_masked, last_alone])
def test_masks_of_labels(make):
    for shift, wrong in ((1, []), (0, ["missing_label_shift"])):
        batch = batch_of(llama(), shifted_by(shift, ignore_index=-100), make())
        assert batch.objective.is_next_token and found(batch) == wrong


@pytest.mark.parametrize("make", [prompts_masked, lambda: BATCH])
def test_a_fused_loss_that_scores_more_than_is_looked_at_or_has_longer_prompts(make, monkeypatch):
    """Without logits 8 positions a row are looked at here: the first that are scored."""
    monkeypatch.setattr(head, "MIN_POSITIONS", 1)
    monkeypatch.setattr(head, "MAX_FUSED_POSITIONS", 32)

    def fused(model, inputs):
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
        return FusedLoss.apply(hidden, model.lm_head.weight.detach(), labels)

    batch = batch_of(llama(), fused, make())
    assert batch.objective.is_next_token and found(batch) == []
    assert ((batch.recording.heads[0].targets.targets >= 0).sum(dim=1) == 8).all()
    labels = make()["labels"]
    batch = batch_of(llama(), fused, {"input_ids": IDS, "labels": torch.where(labels >= 0, 63 - labels, labels)})
    assert batch.objective.is_next_token and found(batch) == ["wrong_loss_target"]


def test_a_batch_without_a_scored_label_shows_no_objective():
    with pytest.raises(CannotJudge, match="no label of the first batch is scored"):
        objective_of(llama(), own, BATCH | {"labels": torch.full_like(IDS, -100)})


def test_the_models_own_loss_on_two_ranks():
    calls = []

    def counted(model, inputs):
        calls.append(inputs)
        return own(model, inputs)

    assert objective_of(llama(), counted, world_size=2).is_next_token
    assert len(calls) == 3  # the same on every rank, whatever is found


def test_labels_of_another_row_and_labels_mapped_to_others_stay_wrong_targets():
    for change in (lambda y: y.roll(1, 0), lambda y: (y + 7) % VOCABULARY):
        batch = batch_of(llama(), lambda m, x, c=change: own(m, x | {"labels": c(x["labels"])}))
        assert batch.objective.is_next_token and found(batch) == ["wrong_loss_target"]


def test_bf16(tiny_model):
    def compute_loss(model, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return own(model, inputs)

    assert objective_of(llama(scale=10.0), compute_loss).is_next_token


# --- signs


def negated(model, inputs):
    return -own(model, inputs)


def unlikelihood(model, inputs):
    p = logits_of(model, inputs)[:, :-1].softmax(-1).gather(-1, inputs["labels"][:, 1:, None])
    return -(1 - p).log().mean()


def sequence_scores(model, inputs, shift=1):
    logits = logits_of(model, inputs)
    logits, targets = logits[:, : logits.shape[1] - shift], inputs["input_ids"][:, shift:]
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)


def preference(model, inputs, shift=1):
    scores = sequence_scores(model, inputs, shift)
    return -F.logsigmoid(0.1 * (scores[:2] - scores[2:])).mean()


def test_a_negated_loss_of_a_new_model_is_an_error_and_else_gradient_ascent():
    batch = batch_of(llama(), negated)
    assert batch.objective.is_negated and found(batch) == ["wrong_loss_target"]
    for model, is_new in ((llama(), False), (llama(), True)):
        labels = logits_of(model, BATCH).argmax(-1) if is_new else IDS
        model.lm_head.weight.data.mul_(200.0 if is_new else 1.0)  # sure of these labels, so it was trained in memory
        inputs = {"input_ids": IDS, "labels": F.pad(labels[:, :-1], (1, 0), value=3)}
        objective = objective_of(model, negated, inputs, is_new=is_new)
        assert objective.words.startswith("gradient ascent") and not objective.is_next_token


def test_losses_that_push_tokens_away():
    for scale in (1.0, 30.0):
        objective = objective_of(llama(scale=scale), unlikelihood)
        assert not objective.is_next_token and not objective.is_negated
    batch = batch_of(llama(), preference, {"input_ids": IDS})
    assert batch.objective.words.startswith("a preference") and not batch.objective.is_next_token
    assert found(batch) == []


def test_a_missing_shift_in_a_preference_loss_is_found():
    batch = batch_of(llama(), lambda model, inputs: preference(model, inputs, shift=0), {"input_ids": IDS})
    assert found(batch) == ["missing_label_shift"]


def test_rows_that_are_all_desired_are_no_cross_entropy():
    """KTO: against a reference of the same weights the loss stays at a half, whatever the tokens are."""
    reference = llama().eval()

    def compute_loss(model, inputs):
        with torch.no_grad():
            before = sequence_scores(reference, inputs)
        return (1 - torch.sigmoid(0.1 * (sequence_scores(model, inputs) - before))).mean()

    objective = objective_of(llama(), compute_loss, {"input_ids": IDS})
    assert objective.has_shift and not objective.is_next_token


def weighed(*weights, is_mean_of_rows=False):
    """Each row's cross entropy of its scored tokens, times its weight."""

    def compute_loss(model, inputs):
        labels = inputs["labels"][:, 1:]
        losses = F.cross_entropy(logits_of(model, inputs)[:, :-1].transpose(1, 2), labels, reduction="none")
        sums = losses.sum(1) / ((labels >= 0).sum(1) if is_mean_of_rows else 1)
        return (sums * torch.tensor(weights)).mean()

    return compute_loss


@pytest.mark.parametrize("weights", [(0.4, 1.1, 0.7, 2.0), (-0.4, -1.1, -0.7, -2.0), (1.0, 1.0, 1.0, 1.2)])
def test_rows_that_weigh_differently_are_a_policy_loss(weights):
    batch = batch_of(llama(), weighed(*weights))
    assert not batch.objective.is_next_token and not batch.objective.is_negated and found(batch) == []
    assert batch.objective.words.startswith("gradient ascent" if weights[0] < 0 else "a cross entropy whose rows")


@pytest.mark.parametrize("is_mean_of_rows", [False, True])
def test_rows_of_other_lengths_are_no_policy_loss(is_mean_of_rows):
    labels = IDS.clone()
    for row in range(4):
        labels[row, : 3 * row] = labels[row, 20 - row :] = -100
    weights = (1.0, 1.0, 1.0, 1.0)
    batch = batch_of(llama(), weighed(*weights, is_mean_of_rows=is_mean_of_rows), BATCH | {"labels": labels})
    assert batch.objective.is_next_token and found(batch) == []


def test_tokens_that_weigh_differently_are_no_policy_loss():
    """A loss weighed by prompts: what differs inside of a row is no advantage of the row."""

    def compute_loss(model, inputs):
        losses = F.cross_entropy(
            logits_of(model, inputs)[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
        )
        return (losses * torch.where(torch.arange(LENGTH - 1) < torch.tensor([[4], [8], [10], [14]]), 0.1, 1.0)).mean()

    assert objective_of(llama(), compute_loss).is_next_token


# --- teachers


def distilled(sure: float, share: float = 0.0, shift: int = 1):
    """`share` of a cross entropy, the rest a divergence from a teacher whose logits are multiplied by `sure`."""
    teacher = llama(seed=1).eval()

    def compute_loss(model, inputs):
        logits = logits_of(model, inputs)
        with torch.no_grad():
            wanted = (sure * logits_of(teacher, inputs)).softmax(-1)
        loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
        return loss if not share else (1 - share) * loss + share * shifted_by(shift)(model, inputs)

    return compute_loss


@pytest.mark.parametrize("sure", [10.0, 300.0, 1e5])  # the last one is near one-hot
def test_distillation_is_no_cross_entropy_with_the_labels(sure):
    batch = batch_of(llama(), distilled(sure))
    assert not batch.objective.is_next_token
    with pytest.raises(NotApplicable, match="the objective is no cross entropy"):
        found(batch)


@pytest.mark.parametrize("sure", [300.0, 1e5])
@pytest.mark.parametrize(("shift", "wrong"), [(1, []), (0, ["missing_label_shift"])])
def test_distillation_mixed_with_a_cross_entropy(sure, shift, wrong):
    batch = batch_of(llama(), distilled(sure, 0.5, shift))
    assert "mixed with another loss" in batch.objective.words and not batch.objective.is_next_token
    assert found(batch) == wrong


# --- heads


class SeveralHeads(LlamaForCausalLM):
    """Predicts the next token and the two after it. `first`: shift of the first head."""

    first = 1

    def forward(self, input_ids, labels):
        hidden, losses = self.model(input_ids=input_ids).last_hidden_state, []
        for shift in range(self.first, self.first + 3):
            logits = self.lm_head(torch.roll(hidden, shift, dims=-1))
            length = logits.shape[1] - shift
            losses.append(F.cross_entropy(logits[:, :length].flatten(0, 1), labels[:, shift:].flatten()))
        return SimpleNamespace(loss=sum(losses) / 3)


@pytest.mark.parametrize(("first", "wrong"), [(1, []), (0, ["missing_label_shift"]), (2, ["double_label_shift"])])
def test_multi_token_prediction(first, wrong):
    model = SeveralHeads(llama().config)
    model.first = first
    batch = batch_of(model, own)
    assert batch.objective.is_next_token and found(batch) == wrong


@pytest.mark.parametrize(("shift", "wrong"), [(1, []), (0, ["missing_label_shift"])])
def test_two_passes_with_dropout(shift, wrong):
    """R-Drop: the labels are scored in both, and the two distributions are drawn together."""

    def compute_loss(model, inputs):
        first, second = (logits_of(model, inputs) for _ in range(2))
        length = LENGTH - shift
        loss = sum(
            F.cross_entropy(z[:, :length].flatten(0, 1), inputs["labels"][:, shift:].flatten())
            for z in (first, second)
        )
        return loss + F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="batchmean")

    batch = batch_of(llama(attention_dropout=0.3), compute_loss)
    assert batch.objective.has_shift and found(batch) == wrong


class NamesNoHead(torch.nn.Module):
    """A model of the user's own that gives its logits out, and names no embedding and no head."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids):
        return {"logits": self.inner(input_ids=input_ids).logits}


@pytest.mark.parametrize(("shift", "wrong"), [(1, []), (0, ["missing_label_shift"])])
def test_a_model_that_names_no_head(shift, wrong):
    def compute_loss(model, inputs):
        logits = model(input_ids=inputs["input_ids"])["logits"][:, : LENGTH - shift]
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, shift:].flatten())

    assert found(batch_of(NamesNoHead(), compute_loss)) == wrong


def test_a_loss_without_logits_has_a_reason():
    with pytest.raises(CannotJudge, match="no logits are seen that the loss depends on"):
        objective_of(llama(), lambda model, inputs: model.lm_head.weight.square().mean())


# --- other models


def masked(ids, generator=None):
    hidden = torch.rand(ids.shape, generator=generator) < 0.4
    return torch.where(hidden, MASK, ids), torch.where(hidden, ids, -100)


def bert(model_class, **changes):
    torch.manual_seed(0)
    return model_class(BertConfig(vocab_size=VOCABULARY, **SIZES, **changes)).train()


def test_masked_language_modelling():
    ids, labels = masked(IDS, torch.Generator().manual_seed(0))
    batch = batch_of(bert(BertForMaskedLM), own, {"input_ids": ids, "labels": labels})
    assert batch.objective.is_denoising and not batch.objective.is_next_token
    with pytest.raises(NotApplicable, match="denoising"):
        found(batch)


@pytest.mark.parametrize("shift", [0, 1])
def test_masked_diffusion_whose_masks_are_drawn_in_the_loss(shift):
    def compute_loss(model, inputs):
        ids, _ = masked(inputs["input_ids"])
        labels = inputs["labels"].where(ids == MASK, -100)
        return shifted_by(shift, ignore_index=-100)(model, {"input_ids": ids, "labels": labels})

    assert objective_of(llama(), compute_loss).is_denoising


def test_classification_of_rows_and_of_tokens():
    scores = objective_of(
        bert(BertForSequenceClassification, num_labels=3),
        own,
        {"input_ids": IDS, "labels": torch.tensor([0, 2, 1, 1])},
    )
    assert scores.words.startswith("a score of whole rows") and scores.scores_rows
    tokens = objective_of(bert(BertForTokenClassification, num_labels=5), own, {"input_ids": IDS, "labels": IDS % 5})
    assert tokens.words == "classification of tokens (5 classes)" and not tokens.has_shift


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).train()


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes, **heads)).train()


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("length", [LENGTH, 15])  # as long as the encoder's text, and shorter
def test_the_shift_of_encoder_decoders(make, length):
    inputs = {"input_ids": IDS, "labels": IDS.flip(1)[:, :length].contiguous()}
    batch = batch_of(make(), own, inputs)
    assert batch.objective.words == "that of an encoder-decoder" and found(batch) == []
    for shift, wrong in ((0, "missing_label_shift"), (-1, "double_label_shift")):
        given = F.pad(inputs["labels"], (2, -2), value=0) if shift else inputs["labels"]
        batch = batch_of(make(), lambda m, x, g=given: own(m, {**x, "decoder_input_ids": g}), inputs)
        assert found(batch) == [wrong], shift
