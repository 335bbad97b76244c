"""Target recovery as pure functions on hand-made numbers, and on real models with and without the bug."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from recipe.guards.batches import IGNORE_INDEX, LabelCounts, SeenTokens, flags_of, send_tokens
from recipe.guards.guard import CannotJudge, Finding
from recipe.guards.head import LossTargets, targets_from_gradient
from recipe.guards.initial_loss import InitialLoss
from recipe.guards.labels import (
    judge_declared,
    judge_last_position,
    judge_linear,
    judge_prompts,
    judge_sums,
    judge_unscored,
    name_labels,
)
from recipe.guards.recording import record, recover_loss_targets
from recipe.guards.targets import LossTarget, add_loss

IDS = torch.arange(2 * 24).reshape(2, 24) * 5 % 53


def targets_at(shift: int) -> torch.Tensor:
    return torch.cat([IDS[:, shift:], torch.full((2, shift), IGNORE_INDEX)], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_weights_and_masks_come_out_of_the_gradient(dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, 7, 50, requires_grad=True)
    labels = torch.randint(0, 50, (2, 7))
    labels[0, 2] = labels[1, 5] = IGNORE_INDEX
    weights = torch.rand(2, 7) + 0.5
    weights[labels == IGNORE_INDEX] = 0.0
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 7)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), logits)
    found = targets_from_gradient(logits.detach().to(dtype), gradient.to(dtype))
    assert torch.equal(found.targets, labels)
    # bf16 keeps 8 bits: half a percent; fp32 rounds at 1e-7, divided by 1 - p
    assert torch.allclose(found.weights, weights, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_a_healthy_loss_is_silent():
    assert LossTarget.judge(IDS, targets_at(1), IDS) is None


@pytest.mark.parametrize(
    ("shift", "name", "found"), [(0, "missing_label_shift", "token i "), (2, "double_label_shift", "token i+2")]
)
def test_a_wrong_shift_is_named(shift, name, found):
    finding = LossTarget.judge(IDS, targets_at(shift), IDS)
    assert finding.id == name and found in finding.found and finding.severity == "error"
    assert "(22 of 22 positions)" in finding.found


def test_one_wrong_row_among_good_ones_is_found():
    mixed = torch.stack([targets_at(1)[0], targets_at(0)[1]])
    finding = LossTarget.judge(IDS, mixed, IDS)
    assert finding.id == "missing_label_shift" and finding.evidence["row"] == 1


def scored_but(silent: slice, loss: float = 3.0) -> LossTargets:
    """As a probe finds them where the loss leaves out the positions `silent`."""
    targets, is_silent = targets_at(1), torch.zeros(2, 24, dtype=torch.bool)
    is_silent[:, -1] = is_silent[:, silent] = True
    targets[is_silent] = IGNORE_INDEX
    return LossTargets(targets, torch.ones(2, 24), torch.full((2, 24), loss), is_silent)


def test_labels_that_the_loss_leaves_out_are_found():
    finding = judge_unscored(LossTarget().wrong_target, scored_but(slice(0, 12)), IDS)
    assert (finding.id, finding.severity) == ("wrong_loss_target", "warning")
    assert "24 of 46 positions" in finding.found


def test_masked_positions_that_are_not_scored_are_no_fault():
    assert judge_unscored(LossTarget().wrong_target, scored_but(slice(0, 0)), IDS) is None
    masked = IDS.clone()
    masked[:, :13] = IGNORE_INDEX
    assert judge_unscored(LossTarget().wrong_target, scored_but(slice(0, 12)), masked) is None


def test_an_inverted_mask_of_an_own_loss_is_found():
    """Own losses may leave positions out, and score others: not all of the one and none of the other."""
    labels = IDS.clone()
    labels[:, 13:] = IGNORE_INDEX  # scored are the positions before them, 0 to 11

    def severity(silent: slice) -> str:
        return judge_unscored(LossTarget().wrong_target, scored_but(silent), labels, is_own_loss=True).severity

    assert severity(slice(0, 12)) == "warning"
    assert severity(slice(0, 9)) == "info"
    assert judge_unscored(LossTarget().wrong_target, scored_but(slice(12, 23)), labels, is_own_loss=True) is None


def test_a_last_position_that_is_scored_is_found():
    found = scored_but(slice(0, 0))
    assert judge_last_position(LossTarget().wrong_target, IDS, found, IDS) is None
    found.targets[:, -1] = 7
    assert judge_last_position(LossTarget().wrong_target, IDS, found, IDS).id == "wrong_loss_target"
    assert (
        judge_last_position(LossTarget().wrong_target, IDS, found, IDS.roll(-1, dims=1)) is None
    )  # next tokens as labels: there is one


def test_a_model_that_is_sure_is_not_judged():
    assert judge_unscored(LossTarget().wrong_target, scored_but(slice(0, 12), loss=0.01), IDS) is None


def test_targets_of_another_row():
    assert LossTarget.judge(IDS, targets_at(1).flip(0), IDS).id == "wrong_loss_target"


def test_repeated_tokens_are_not_mistaken_for_a_missing_shift():
    ids = torch.tensor([[7] * 30 + list(range(20))])
    targets = torch.cat([ids[:, 1:], torch.tensor([[IGNORE_INDEX]])], dim=1)
    assert LossTarget.judge(ids, targets, ids) is None


def test_masked_prompts_are_not_a_fault():
    targets = targets_at(1)
    targets[:, :10] = IGNORE_INDEX
    assert LossTarget.judge(IDS, targets, IDS) is None


def test_a_few_chance_hits_elsewhere_are_not_a_fault():
    targets = targets_at(1)
    targets[0, 3] = 52  # 1 of 22
    assert LossTarget.judge(IDS, targets, IDS) is None


@pytest.mark.parametrize("ids", [torch.full((2, 24), 3), IDS[:, :8]])
def test_too_little_to_go_by_says_so(ids):
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    with pytest.raises(CannotJudge, match="8 are needed"):
        LossTarget.judge(ids, targets, ids)


# --- on real models


def unshifted(logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def test_it_leaves_no_trace(tiny_model):
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    generator = torch.get_rng_state()
    recover_loss_targets(tiny_model, lambda: tiny_model(input_ids=IDS, labels=IDS).loss)
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert not tiny_model.lm_head._forward_hooks


def test_dropout_does_not_move_the_generator():
    model = gpt2().train()
    generator = torch.get_rng_state()
    recover_loss_targets(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_healthy_and_broken_models(make, tiny_model):
    model = tiny_model if make == "llama" else gpt2()
    healthy = recover_loss_targets(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert LossTarget.judge(IDS, healthy.targets, IDS) is None
    model.loss_function = unshifted
    broken = recover_loss_targets(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    assert LossTarget.judge(IDS, broken.targets, IDS).id == "missing_label_shift"


def test_labels_shifted_by_hand_and_again_by_the_model(tiny_model):
    labels = torch.cat([IDS[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    found = recover_loss_targets(tiny_model, lambda: tiny_model(input_ids=IDS, labels=labels).loss)
    assert LossTarget.judge(IDS, found.targets, IDS).id == "double_label_shift"


def test_a_model_without_a_head_cannot_be_judged():
    with pytest.raises(CannotJudge, match="no logits are seen"):
        recover_loss_targets(torch.nn.Linear(2, 2), lambda: torch.zeros(()))


def test_a_loss_that_does_not_use_the_head_cannot_be_judged(tiny_model):
    with pytest.raises(CannotJudge, match="no logits are seen"):
        recover_loss_targets(tiny_model, lambda: tiny_model.model.embed_tokens.weight.sum())


class FusedLoss(torch.autograd.Function):
    """A loss that makes no logits that a hook could see."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss = F.cross_entropy((leaf @ weight.T).flatten(0, 1), labels.flatten())
            (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, outer):
        return outer * ctx.gradient, None, None


def fused_loss(model, labels):
    hidden = model.model(input_ids=IDS).last_hidden_state
    return FusedLoss.apply(hidden, model.lm_head.weight.detach(), labels)


@pytest.mark.parametrize(("shift", "name"), [(0, "missing_label_shift"), (1, None), (2, "double_label_shift")])
def test_a_fused_loss_is_judged_by_the_hidden_state(tiny_model, shift, name):
    found = recover_loss_targets(tiny_model, lambda: fused_loss(tiny_model, targets_at(shift)))
    assert torch.equal(found.targets, targets_at(shift))
    count = (targets_at(shift) != IGNORE_INDEX).sum()
    scored = found.weights[targets_at(shift) != IGNORE_INDEX]
    assert torch.allclose(scored, torch.full_like(scored, 1 / count), rtol=1e-3)  # fp32 sums over the vocabulary
    finding = LossTarget.judge(IDS, found.targets, IDS)
    assert (finding and finding.id) == name


def test_a_fused_loss_on_scaled_logits_is_told_where_it_can_be(tiny_model):
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(5)  # an untrained head is so flat that a scale makes no difference
    hidden = lambda: tiny_model.model(input_ids=IDS).last_hidden_state  # noqa: E731
    weight = 3 * tiny_model.lm_head.weight.detach()
    found = recover_loss_targets(tiny_model, lambda: FusedLoss.apply(hidden(), weight, targets_at(1))).targets
    told = found != IGNORE_INDEX
    assert 0 < told.sum() < (targets_at(1) != IGNORE_INDEX).sum()
    assert torch.equal(found[told], targets_at(1)[told])


def test_label_smoothing_on_a_model_that_is_sure_is_not_a_fault():
    targets = torch.cat([IDS[:, 1:], IDS[:, :1]], dim=1)
    logits = F.one_hot(targets, 53) * 12.0
    logits[0, 3:14] *= 0.1  # positions where it is not sure
    logits.requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    found = targets_from_gradient(logits.detach(), gradient).targets
    assert LossTarget.judge(IDS, found, IDS) is None and (found[1] == IGNORE_INDEX).all()


def loss_of_next(model, **changes):
    logits = model(input_ids=IDS).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), **changes)


def test_a_first_loss_without_targets_cannot_be_judged(tiny_model):
    recording = record(tiny_model, lambda: -loss_of_next(tiny_model))
    run = SimpleNamespace(step=0, is_new_model=True, is_next_token=True, trainer=None, model=tiny_model)
    known = {"targets": lambda: recording.only().targets, "recording": recording, "num_items_in_batch": None}
    batch = SimpleNamespace(run=run, inputs={}, **known)
    with pytest.raises(CannotJudge, match="no target"):
        list(InitialLoss().probe(batch))


# --- during training


def test_sampled_rows_are_judged_by_most_of_their_positions():
    healthy, copied, few = [16, 1, 14, 1, 0], [16, 12, 2, 1, 1], [7, 7, 0, 0, 0]
    (finding,) = LossTarget.judge_rows({4: healthy, 5: copied, 6: few}, LossTarget.MAX_ELSEWHERE_SAMPLED)
    assert finding.id == "missing_label_shift" and finding.evidence["row"] == 5
    assert finding.found == "loss target = token i (12 of 16 positions), in 1 of 3 rows"
    assert not LossTarget.judge_rows({0: [16, 0, 8, 0, 8]}, LossTarget.MAX_ELSEWHERE_SAMPLED)
    assert LossTarget.judge_rows({0: [16, 0, 7, 0, 9]}, LossTarget.MAX_ELSEWHERE_SAMPLED)[0].id == "wrong_loss_target"


def test_a_row_whose_labels_are_not_as_in_most_rows():
    count, own, following = np.array([20, 20, 20, 7]), np.array([20, 9, 1, 0]), np.array([1, 2, 19, 7])
    rank, micro_step, row, more = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.arange(4), np.zeros(4)
    labels = LabelCounts(rank, micro_step, row, more, count, own, following, more, more)
    found = list(LossTarget.judge_labels("own", labels))
    assert [(finding.id, finding.evidence) for finding in found] == [
        ("wrong_loss_target", {"row": 1, "rank": 0, "micro_step": 1, "fit": 9}),
        ("double_label_shift", {"row": 2, "rank": 1, "micro_step": 0, "fit": 1}),
    ]
    labels = labels._replace(own=following, following=own)
    found = list(LossTarget.judge_labels("next", labels))
    assert [finding.id for finding in found] == ["wrong_loss_target", "missing_label_shift"]
    assert not list(LossTarget.judge_labels("neither", labels))


TEXT = np.random.default_rng(0).integers(4, 60, (8, 101))
SHUFFLED = np.random.default_rng(1).permuted(TEXT[:2], axis=1)


@pytest.mark.parametrize(
    ("ids", "labels", "found"),
    [
        (TEXT, np.concatenate([SHUFFLED, TEXT[2:]]), 2),
        (TEXT, np.concatenate([TEXT[:7], TEXT[:1]]), 1),
        (np.where(np.arange(8)[:, None] < 2, 3, TEXT), TEXT, 0),  # two rows hide their tokens behind a mask's
        (np.where(np.arange(101) % 2, TEXT, TEXT[::-1]), TEXT, 0),  # half of the tokens are noise
        (np.concatenate([TEXT[7:], TEXT[:7]]), TEXT, 0),  # all rows: the probe says it
    ],
)
def test_a_few_rows_whose_labels_are_shuffled(ids, labels, found):
    counts = LabelCounts.of([seen(ids, labels)])
    named = name_labels(counts, LossTarget.LABELS_TO_LEARN, LossTarget.LABEL_CLEAR)
    assert len(list(LossTarget.judge_labels(named, counts))) == found


def seen(ids: np.ndarray, labels: np.ndarray) -> SeenTokens:
    return SeenTokens(ids, flags_of(ids, labels, None, None, None))


def watch_labels(shares: list[float]) -> list:
    """Of steps of one micro-batch of 400 labels, that share of which are not the tokens."""
    guard, found = LossTarget(), []
    guard.setup(None)
    run = SimpleNamespace(is_next_token=True)
    for number, share in enumerate(shares, 1):
        labels = np.random.default_rng(number).integers(4, 60, (4, 101))
        ids = labels.copy()
        ids[:, 1 : 1 + int(100 * share)] += 1
        counts = LabelCounts.of([seen(ids, labels)])
        numbers = tuple(int(each.sum()) for each in (counts.scored, counts.own, counts.following))
        known = {"labels": counts, "targets": counts.by_micro_batch(), "num_labels": numbers}
        step = SimpleNamespace(run=run, head=[], number=number, **known)
        found += [verdict for verdict in guard.observe(step) if isinstance(verdict, Finding)]
    return found


def test_inputs_overwritten_from_some_step_on_are_found():
    found = watch_labels([0.0] * 4 + [0.3] * 20)
    assert len(found) == 5 and found[0].id == "wrong_loss_target"
    assert found[0].found == "30% of labels are not the own tokens (from step 5 on)"


@pytest.mark.parametrize(
    "shares",
    [
        [0.3] * 30,  # denoising with labels of its own, from the first step on
        [0.0] * 4 + [0.3] * 10 + [0.0] + [0.3] * 20,  # a mixture of batches
        [0.0] * 10 + [0.04] * 20,
        [0.0, 0.3] * 15,
    ],
)
def test_labels_that_differ_on_purpose_are_no_change(shares):
    assert not watch_labels(shares)


def answers(prompt: int, copied: int) -> SeenTokens:
    """4 rows of a BOS, a masked prompt and an answer that begins with the first `copied` tokens of it."""
    rows = np.random.default_rng(0).integers(4, 60, (4, 40))
    rows[:, 0] = 1
    rows[:, 1 + prompt : 1 + prompt + copied] = rows[:, 1 : 1 + copied]
    labels = rows.copy()
    labels[:, : 1 + prompt] = IGNORE_INDEX
    return seen(rows, labels)


def test_answers_that_begin_with_their_prompt_are_found():
    finding = judge_prompts(LossTarget().wrong_target, answers(12, 12))
    assert finding.severity == "warning" and finding.evidence["copied_tokens"] == [12] * 4


@pytest.mark.parametrize(("prompt", "copied"), [(12, 11), (7, 7), (12, 0), (0, 0)])
def test_other_answers_are_silent(prompt, copied):
    assert judge_prompts(LossTarget().wrong_target, answers(prompt, copied)) is None


def declared(rows: list[dict], labels: torch.Tensor, **given):
    """Of a micro-batch that holds `IDS` with these labels, in a run on these rows."""
    found = targets_at(1).masked_fill(F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) == IGNORE_INDEX, IGNORE_INDEX)
    weights = (found != IGNORE_INDEX).float()
    found = LossTargets(found, given.get("weights", weights), weights, weights == 0)
    found.is_silent[:, :4] |= given.get("is_silent", False)
    run = SimpleNamespace(trainer=SimpleNamespace(train_dataset=rows), pad_token_id=52)
    seen_tokens = send_tokens({"input_ids": IDS, "labels": labels}, None).read()
    batch = SimpleNamespace(inputs={"labels": labels}, run=run, seen_tokens=lambda all_rows: seen_tokens)
    return judge_declared(LossTarget().wrong_target, batch, found)


def with_prompts(count: int, prompt: int = 8, at: int = 0, **columns) -> list[dict]:
    row = {"input_ids": list(range(24)), "labels": [*range(at), *[-100] * prompt, *range(at + prompt, 24)]}
    return [{**row, **columns} for _ in range(count)]


def test_prompts_that_the_data_masks_and_the_loss_scores_are_found():
    rows = with_prompts(100)
    finding = declared(rows, IDS)
    assert finding.severity == "warning" and finding.evidence["prompts"] == [7] * 50
    assert declared(datasets.Dataset.from_list(rows), IDS) is not None
    assert declared(with_prompts(20, at=8), IDS) is not None  # a second turn


masked = IDS.clone()
masked[0, :8] = IGNORE_INDEX


@pytest.mark.parametrize(
    ("rows", "labels", "given"),
    [
        (with_prompts(100), masked, {}),  # the mask is there
        (with_prompts(100), IDS, {"is_silent": True}),  # it is in the loss
        (with_prompts(100), IDS, {"weights": torch.linspace(0.5, 1.0, 48).view(2, 24)}),  # prompts weigh less
        (with_prompts(7), IDS, {}),
        (with_prompts(100, prompt=3), IDS, {}),
        (with_prompts(100, prompt=0), IDS, {}),
        (with_prompts(100, prompt=8, at=16), IDS, {}),  # at the end: padding without a mask
        (with_prompts(1, prompt=0) + with_prompts(99), IDS, {}),
        (with_prompts(100, attention_mask=[0] * 8 + [1] * 16), IDS, {}),  # padding
        ([{**row, "input_ids": [52] * 8 + row["input_ids"][8:]} for row in with_prompts(100)], IDS, {}),
        ([{"input_ids": list(range(24))}] * 100, IDS, {}),
        ([{"labels": "text"}] * 100, IDS, {}),
        ([3] * 100, IDS, {}),
        (datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 100}), IDS, {}),
        (datasets.Dataset.from_list(with_prompts(100)).to_iterable_dataset(), IDS, {}),
        ([], IDS, {}),
    ],
)
def test_prompts_that_nothing_says_are_masked_are_silent(rows, labels, given):
    assert declared(rows, labels, **given) is None


def targets_of(loss_of) -> LossTargets:
    """Of a loss of `logits`, `labels`, and a teacher's probabilities over the vocabulary."""
    torch.manual_seed(0)
    logits, teacher = (0.5 * torch.randn(4, 48, 257)).requires_grad_(), torch.randn(4, 48, 257).softmax(-1)
    (gradient,) = torch.autograd.grad(loss_of(logits, torch.randint(0, 257, (4, 48)), teacher), logits)
    return targets_from_gradient(logits.detach(), gradient)


def mixed(dim: int):
    """A fifth cross entropy, four fifths divergence with the student's softmax over `dim`."""

    def loss_of(logits, labels, teacher):
        divergence = F.kl_div(logits.log_softmax(dim), teacher, reduction="sum") / labels.numel()
        return 0.2 * F.cross_entropy(logits.transpose(1, 2), labels) + 0.8 * divergence

    return loss_of


def with_z_loss(reduce):
    def loss_of(logits, labels, _):
        return F.cross_entropy(logits.transpose(1, 2), labels) + 1e-3 * reduce(logits.logsumexp(-1).square())

    return loss_of


@pytest.mark.parametrize("num_items", [None, 60, 4 * 48, 2 * 48])
def test_a_mean_over_masked_positions_is_found(num_items):
    """60 of 4 x 48 positions are scored."""

    def found(divisor):
        def loss_of(logits, labels, _):
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            return (losses * (torch.arange(48) < 15)).sum() / divisor

        return InitialLoss.judge_divisor(targets_of(loss_of), num_items)

    for divisor in (4 * 48, 4 * 47):
        finding = found(divisor)
        assert finding is None if num_items == divisor else f"60 targets divided by {divisor}" in finding.found
    assert found(60) is found(2 * 48) is found(1) is None
    dense = targets_of(lambda logits, labels, _: F.cross_entropy(logits.transpose(1, 2), labels))
    assert InitialLoss.judge_divisor(dense, num_items) is None


def test_a_softmax_over_positions_is_found():
    assert judge_sums(LossTarget().wrong_target, targets_of(mixed(dim=1))).severity == "error"
    for loss_of in (mixed(dim=-1), with_z_loss(torch.mean), with_z_loss(torch.sum)):
        assert judge_sums(LossTarget().wrong_target, targets_of(loss_of)) is None


def test_a_z_loss_that_outweighs_the_cross_entropy_is_found():
    finding = InitialLoss.judge_normalizer(targets_of(with_z_loss(torch.sum)))
    assert finding.severity == "warning" and "all logits" in finding.found
    for loss_of in (mixed(dim=-1), with_z_loss(torch.mean)):
        assert InitialLoss.judge_normalizer(targets_of(loss_of)) is None


def sharpened(loss_of) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `probabilities_of` gives for this loss of `logits` and a teacher's probabilities."""
    torch.manual_seed(0)
    logits, teacher, pairs = 0.3 * torch.randn(2, 12, 97), (4 * torch.randn(2, 12, 97)).softmax(-1), []
    for scale in (1.0, 4.0):
        values = (scale * logits).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(values, teacher), values)
        pairs.append((values.detach().softmax(-1), gradient))
    return pairs


def divergence(of_student):
    return lambda logits, teacher: F.kl_div(of_student(logits, dim=-1), teacher, reduction="sum") / 24


def test_a_divergence_of_probabilities_is_found():
    finding = judge_linear(LossTarget().wrong_target, *sharpened(divergence(F.softmax)))
    assert finding.severity == "warning" and finding.evidence["positions"] == 24


@pytest.mark.parametrize(
    "loss_of",
    [
        divergence(F.log_softmax),
        lambda z, q: (z.softmax(-1) * (z.log_softmax(-1) - q.log())).sum(-1).mean(),  # reverse
        lambda z, q: (z.softmax(-1) - q).square().sum(-1).mean(),  # Brier
        lambda z, q: (z - q.log()).square().mean(),  # of logits
    ],
)
def test_other_losses_with_a_teacher_are_silent(loss_of):
    assert judge_linear(LossTarget().wrong_target, *sharpened(loss_of)) is None


def test_loss_by_position():
    guard = LossTarget()
    guard.setup(None)
    assert guard.evidence() == {"loss_by_position": {}}
    for i in range(40):
        for position, loss in ((0, 5.0 + 0.1 * (i % 3)), (1, 4.5), (6, 4.0), (100, 3.0 + 0.1 * (i % 3))):
            add_loss(guard.state["losses_by_position"], position, loss)
    guard.load(json.loads(json.dumps(guard.save())))  # as after a resume
    means = guard.evidence()["loss_by_position"]
    assert list(means) == ["0", "1", "4", "64"]
    assert means["4"] == pytest.approx(4.0) and means["0"] > 5 > means["64"]
