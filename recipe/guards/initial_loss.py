"""The first loss, and whether what the loss is given are logits."""

import math
import re
from collections.abc import Iterator, Sequence

import torch

from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.frozen import has_adapters
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.head import LossTargets
from recipe.guards.policy import judge_untrained, losses_of_both
from recipe.guards.recording import embeddings_of
from recipe.guards.sandbox import frozen, loss_of, places_of, replaced

# Elements of a weight that tell how it was drawn, and how far their deviation may be off. Derived: 256 uniform numbers
# have it to 4 %. A trained weight has elements beyond twice its deviation, a uniform one none beyond 1.73 times.
MIN_DRAWN, DRAWN_ERROR = 256, 0.15


class InitialLoss(Guard):
    """The first loss is not that of an untrained model, or the model's logits are probabilities.

    When: before step 1.
    Measured: the mean cross entropy of the recovered targets. An untrained model guesses, so it is ln(V) for a
        vocabulary of V tokens; more than 0.2 below that or above 2 times that is information, above 4 times a warning.
        An error: the logits are at least 0 and sum to 1 (to 1 %): the loss, which applies softmax too, cannot fall
        below ln(1 + (V - 1) / e). Warnings: adapters whose second factors are drawn as `torch.nn.Linear` draws its
        weights, and change the loss by 1e-3 of it; adapters on a base whose embedding is frozen, whose predictions
        have an entropy of 0.75 ln(V) at most, and whose loss is not 0.2 under ln(V); a gradient that pulls all logits
        of a position together by more than 1 times what it pulls the target by (z-loss); each target weighs one
        divided by the number of all positions, to 1 %, of which 90 % at most are scored; a reference model (TRL's
        `ref_model`) whose loss on the first rows is not 0.2 under ln(V), though the policy's is 1 nat under it.
    Try: the probes' findings first. Too high: `initializer_range`, or a loss that is summed. An error: no softmax.
    Cannot see: the first loss of models with trained weights, and of resumed runs.
    """

    ids = {"init_loss_off": "The first loss is not that of an untrained model, of its base, reference or targets."}
    explained_by = ("missing_label_shift", "non_causal_attention", "accumulation_mismatch")
    # Copying with tied embeddings starts 0.47 below (7.85 of ln 4096); healthy public runs at most 0.01, and up to 1.5
    # times the guess where the head is not scaled down. Chosen between these.
    MAX_BELOW, MAX_ABOVE = 0.2, 2.0
    # From so many times the guess on a warning: a tied embedding of deviation 1 gives 11. Chosen, not measured.
    FAR_ABOVE = 4.0
    # Of the loss, between a model with and without adapters: rounding. Of ln V, the entropy of a base that has learned
    # to be sure. Of the pull on the target, in that on all logits; a z-loss as published has 0.001 to 0.01. Chosen,
    # not measured.
    SAME_LOSS, SURE_ENTROPY, MAX_NORMALIZER = 1e-3, 0.75, 1.0
    # Of a target's weight: exact in fp32, to 0.4 % in bf16. Of the positions, scored. Chosen, not measured.
    WEIGHT_ERROR, MAX_SCORED = 0.01, 0.9

    def probe(self, batch) -> Iterator[Verdict]:
        run = batch.run
        if not run.step and (losses := losses_of_both(run, batch.inputs)):
            yield from filter(None, [judge_untrained(self.finding, *losses)])
        if not run.is_next_token:
            raise NotApplicable(f"the objective is {run.objective.words}")
        found, vocab_size = batch.targets(), batch.recording.only().num_classes
        finding = self.judge_shares(vocab_size) if found.are_shares else self.judge_normalizer(found)
        finding = finding or self.judge_divisor(found, batch.num_items_in_batch)
        if finding is None and not run.step:
            finding = self._judge_adapters(batch, found, vocab_size)
        if finding is None and (run.step or not run.is_new_model):
            raise NotApplicable("the model was trained before, so its first loss may be anything")
        yield finding or self.judge(mean_loss(found), vocab_size) or self.clear(check=PROBE)

    def _judge_adapters(self, batch, found: LossTargets, vocab_size: int) -> Finding | None:
        model = batch.run.model
        if drawn := drawn_factors(model):
            return self.judge_drawn(*_losses_with_and_without(batch, drawn), len(drawn))
        is_fixed = has_adapters(model) and not any(e.weight.requires_grad for e in embeddings_of(model))
        if not is_fixed or (loss := mean_loss(found)) < math.log(vocab_size) - self.MAX_BELOW:
            return None
        return self.judge_base(loss, entropy_of(batch), vocab_size)

    @classmethod
    def judge(cls, loss: float, vocab_size: int) -> Finding | None:
        """An untrained model guesses, so its loss is ln(vocabulary) or above; a hint, unless it is far above."""
        guess = math.log(vocab_size)
        if guess - cls.MAX_BELOW <= loss <= cls.MAX_ABOVE * guess:
            return None
        if loss < guess:
            causes = ("target leakage", "the weights are not new", "the loss is divided twice")
            action = "read the probes' findings first"
        else:
            causes = ("initial weights too wide", "the loss is summed, not averaged")
            action = "look at initializer_range and at the loss's reduction"
        found, expected = f"first loss {loss:.2f}", f"ln({vocab_size:,}) = {guess:.2f} or more"
        severity = "warning" if loss > cls.FAR_ABOVE * guess else "info"
        return cls.finding(severity, found, expected, causes, action, {"loss": loss}, check=PROBE)

    @classmethod
    def judge_drawn(cls, loss: float, base_loss: float, count: int) -> Finding | None:
        """`loss`: with the adapters that were drawn at random, `count` of them; `base_loss`: of the model without."""
        if not abs(loss - base_loss) > cls.SAME_LOSS * base_loss:
            return None
        found, expected = (
            f"first loss {loss:.2f} (with {count} adapters drawn at random)",
            f"{base_loss:.2f} (of the base)",
        )
        causes = ("init_lora_weights=False: neither factor of the adapters is zero",)
        action = "leave init_lora_weights at its default, so that training begins at the base model"
        evidence = {"loss": loss, "base_loss": base_loss}
        return cls.finding("warning", found, expected, causes, action, evidence, check=PROBE, cause="adapters")

    @classmethod
    def judge_base(cls, loss: float, entropy: float, vocab_size: int) -> Finding | None:
        """`loss`: of adapters that do nothing yet on a base whose embedding stays as it is; `entropy`: of what it
        predicts. An untrained base is not sure of anything."""
        guess = math.log(vocab_size)
        if loss < guess - cls.MAX_BELOW or entropy > cls.SURE_ENTROPY * guess:
            return None
        found, expected = (
            f"first loss {loss:.2f} of a base that is sure ({entropy:.1f} nats)",
            f"under {guess:.2f}, ln V",
        )
        causes = ("ids of another tokenizer (than the base's)", "the base's weights were loaded in part")
        action = "decode a row of the batch with the base model's own tokenizer, and look at its loss without adapters"
        return cls.finding("warning", found, expected, causes, action, {"loss": loss}, check=PROBE, cause="base")

    @classmethod
    def judge_normalizer(cls, found: LossTargets) -> Finding | None:
        """The pull on all logits of a position together, which a softmax leaves at 0, against that on its target."""
        if found.sums is None or not (is_pulled := found.pulls > 0).any():
            return None
        ratio = float((found.sums[is_pulled] / found.pulls[is_pulled]).median())
        if ratio <= cls.MAX_NORMALIZER:
            return None
        causes = ("z-loss summed over tokens (not averaged)", "its coefficient")
        action = "take the mean of logsumexp(logits) ** 2 over the scored tokens, times 1e-4 to 1e-3"
        found, expected = f"all logits pulled {ratio:.1f} times the target", "0.01"
        return cls.finding(
            "warning", found, expected, causes, action, {"ratio": ratio}, check=PROBE, cause="normalizer"
        )

    @classmethod
    def judge_divisor(cls, found: LossTargets, num_items) -> Finding | None:
        """A mean over positions whose losses were set to 0. `num_items`: what the loss may be divided by, None where
        it is not given any."""
        scored, (rows, length) = found.targets != IGNORE_INDEX, found.targets.shape
        count = int(scored.sum())
        if found.sums is None or not 0 < count <= cls.MAX_SCORED * rows * (length - 1):
            return None
        weight = float(found.weights[scored].mean())

        def is_divided_by(number) -> bool:
            return abs(weight * float(number) - 1) <= cls.WEIGHT_ERROR

        positions = next(filter(is_divided_by, (rows * length, rows * (length - 1))), None)
        if positions is None or (num_items is not None and is_divided_by(num_items)):
            return None
        causes = ("mean over masked positions too (a product with the mask, then .mean())",)
        action = "divide the sum of the losses by the number of scored tokens, such as mask.sum()"
        found, expected = f"loss of {count} targets divided by {positions} (all positions)", f"{count}"
        evidence = {"targets": count, "weight": weight}
        return cls.finding("warning", found, expected, causes, action, evidence, check=PROBE, cause="divisor")

    @classmethod
    def judge_shares(cls, vocab_size: int) -> Finding:
        lowest = math.log(1 + (vocab_size - 1) / math.e)  # cross entropy of a 1 among zeros
        found = f"logits are probabilities: no loss below {lowest:.2f}"
        causes, action = ("softmax in the model's head",), "return what the head gives: the loss applies softmax"
        return cls.finding("error", found, "logits", causes, action, {"lowest": lowest}, check=PROBE)


def mean_loss(found: LossTargets) -> float:
    scored = found.targets != IGNORE_INDEX
    if not scored.any():
        raise CannotJudge("no target could be recovered")
    return float(found.losses[scored].mean())


def drawn_factors(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The second factors of LoRA where all of them are as `torch.nn.Linear` draws its weights, uniform up to the
    inverse root of their inputs; they should be zero. Empty where one is not."""
    named = [m for name, m in model.named_modules() if re.search(r"\.lora_B\.\w+$", name)]
    large = [m for m in named if isinstance(m, torch.nn.Linear) and m.weight.numel() >= MIN_DRAWN]
    return large if large and all(map(_is_drawn, large)) else []


def _is_drawn(module: torch.nn.Linear) -> bool:
    weight, bound = module.weight.detach().float(), module.in_features**-0.5
    is_uniform = abs(float(weight.std()) * math.sqrt(3) / bound - 1) <= DRAWN_ERROR
    return is_uniform and float(weight.abs().max()) <= 1.01 * bound


def _losses_with_and_without(batch, factors: Sequence[torch.nn.Linear]) -> tuple[float, float]:
    """The loss of the batch as it is and with these weights at zero, in eval mode."""
    compute_loss = loss_of(batch.twin, batch.model, batch.inputs, batch.count_items(batch.inputs))
    zeros = {m.weight: torch.nn.Parameter(torch.zeros_like(m.weight), requires_grad=False) for m in factors}
    with frozen(batch.model, training=False), torch.no_grad():
        loss = float(compute_loss().mean())
        with replaced(places_of(batch.model, zeros)):
            return loss, float(compute_loss().mean())


def entropy_of(batch) -> float:
    """Nats, mean over the positions of the batch, of what the model predicts there."""
    given = {name: batch.inputs[name] for name in ("input_ids", "attention_mask") if name in batch.inputs}
    with frozen(batch.model, training=False), torch.no_grad():
        log_shares = batch.model(**given).logits.float().log_softmax(-1)
    return float(-(log_shares.exp() * log_shares).sum(-1).mean())
