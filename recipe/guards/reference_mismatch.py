"""The model's own forward pass against an independent one in fp32, `oracle.py`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from recipe.guards.attention import find_documents
from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.compiled import dropouts_of
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Verdict
from recipe.guards.oracle import Architecture, Oracle, read_architecture
from recipe.guards.sandbox import frozen, loss_of, without_autocast
from recipe.internals import attention_of, has_own_loss_function

LENGTH = 512  # tokens of the row. Chosen, not measured: to reach past short windows, and quick.
MIN_TOKENS = 8  # of a row. Chosen, not measured: fewer hold no context to attend to.
# Half of the distance between two neighbouring numbers, relative: what rounding to this type may change.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# What the reference is given, or what changes nothing.
GIVEN = ("input_ids", "attention_mask", "position_ids")
KNOWN = (*GIVEN, "labels", "num_items_in_batch")
# Of documents; inside of one there are none.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
PADDING_COUNTED = "positions count the padding on the left of each row"
COUNT_TEXT = "pass position_ids that begin at the first token: (attention_mask.cumsum(-1) - 1).clamp(min=0)"
FP32_ATTENTION = ("eager", "sdpa")  # flash attention refuses fp32


@dataclass(frozen=True)
class Call:
    """One row of a call of the model that the trainer's loss made. `ids`, `positions`, `is_key`, `labels`:
    `[positions]`; `labels` is None where the loss is not known to be the mean cross entropy of the next tokens.
    `rounding`: relative, of the precision in which it computed. `is_exact`: without the trainer's autocast."""

    ids: torch.Tensor
    positions: torch.Tensor
    is_key: torch.Tensor
    logits: torch.Tensor
    rounding: float
    loss: float
    is_exact: bool
    labels: torch.Tensor | None


@dataclass(frozen=True)
class Gaps:
    """Root mean squares over the logits: `gap` between the model and the reference, `noise` of rounding, `spread` of
    the reference itself. `losses`: model and reference, `loss_noise`: of rounding; None where no loss is compared."""

    gap: float
    noise: float
    spread: float
    losses: tuple[float, float] | None = None
    loss_noise: float = 0.0


class ReferenceMismatch(Guard):
    """The model computes other logits or another loss than an independent fp32 forward pass from its weights.

    When: before step 1 and after a resume, at step 20, every 64 steps, at each save, and when a loss curve has to be
        explained.
    Measured: one document of at most 512 tokens, in the call that the trainer's own loss makes, in eval mode: logits
        and, where the loss is the model's own, the loss. The reference is a second implementation of llama, mistral,
        qwen2, qwen3, gpt2, gpt_neox, olmo2 and gemma2 in plain torch operations: rotary angles and their scaling,
        window, soft caps, scales, norms, activation, tied head. It also runs with noise of the size at which the
        model's precision rounds, at each place where it rounds (as TTrace, arXiv 2506.09280): a finding is more than 8
        times what that changes, for the loss 1e-6 of it besides. Under autocast the model is compared without it as
        well, and so to fp32. Simple changes of the reference (no window, no cap, neighbours rotated together) that
        explain the difference are named. A model without positions (NoPE), and one that differs in eval mode only, is
        information.
    Try: comparing config.json with the model that was meant; the attention implementation; code that hooks into the
        model or replaces functions of transformers; buffers after a resume.
    Cannot see: other architectures, model classes of one's own, PEFT, quantised or replaced layers, sharded weights
        ("not applicable"); the compiled graph; what differs in train mode only; windows longer than 512 tokens and
        scaling that begins beyond; in a model whose weights are bf16, faults as small as its rounding; a fault that
        config and weights share.
    """

    ids = {"reference_mismatch": "The model does not compute what its config and weights say."}
    explains_symptoms = probes_at_saves = True
    of_one_resume = ("reference_mismatch",)
    explained_by = (
        *("non_causal_attention", "row_leak", "cross_document_attention", "wrong_loss_target", "missing_label_shift"),
        *("double_label_shift", "untied_weights", "resume_jump", "eval_not_repeatable", "eval_train_mismatch"),
    )
    # Times the noise. Measured on 8 architectures of 3 layers, new and with large random weights: the model is 0.5 to
    # 1.2 times the noise away in fp32, bf16 and under autocast, and 2.2 times in fp16. Faults of the zoo are 1,000
    # times and more in fp32.
    FACTOR = 8.0
    # Of the loss: rounding of its sum in fp32. Derived: its numbers are 1.2e-7 apart; eight of these.
    LOSS_ROUNDING = 1e-6

    def setup(self, run) -> None:
        if run.is_sharded:
            raise NotApplicable("the weights are sharded over ranks")
        self.architecture, self._is_found = read_architecture(run.model), False

    def probe(self, batch) -> Iterator[Verdict]:
        has_learned_positions = self.architecture.rope is None
        row = one_document(batch.inputs, min(LENGTH, self.architecture.max_exact), has_learned_positions)
        weights = {name.replace("_orig_mod.", ""): value for name, value in batch.model.state_dict().items()}
        call, finding = record_call(batch, row), None
        are_exact = all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())
        if call.rounding > ROUNDING[torch.float32] and are_exact and attention_of(batch.model) in FP32_ATTENTION:
            finding = self._judge_call(batch, weights, row, record_call(batch, row, is_exact=True))
        finding = finding or self._judge_call(batch, weights, row, call)
        # Weights may hide a fault for a while: attention that has not learned to look. It is not over by that.
        self._is_found |= finding is not None
        if finding or not self._is_found:
            yield finding or self.clear(check=PROBE)

    def _judge_call(self, batch, weights: dict, row: dict, call: Call) -> Finding | None:
        finding = self.judge(measure(self.architecture, weights, call), call.rounding)
        if finding is None:
            return None
        plain = replace(call, positions=torch.arange(len(call.ids), device=call.ids.device))
        is_padded = not torch.equal(call.positions, plain.positions)
        if is_padded and self.judge(measure(self.architecture, weights, plain), call.rounding) is None:
            return replace(finding, likely_causes=(PADDING_COUNTED,), action=COUNT_TEXT)
        for words, changed in variants(self.architecture):
            if self.judge(measure(changed, weights, call), call.rounding) is None:
                severity = "info" if changed.rope is None else "warning"  # without positions on purpose
                return replace(finding, severity=severity, likely_causes=(words, *finding.likely_causes))
        if not any(value for _, value in dropouts_of(batch.model)):
            in_training = record_call(batch, row, call.is_exact, training=True)
            if self.judge(measure(self.architecture, weights, in_training), call.rounding) is None:
                return replace(finding, severity="info", likely_causes=("it does so in eval mode only",))
        return finding

    @classmethod
    def judge(cls, gaps: Gaps, rounding: float) -> Finding | None:
        """`rounding`: of the precision in which the model computes. Raises `CannotJudge`."""
        if not all(map(math.isfinite, (gaps.gap, gaps.noise))):
            raise CannotJudge("the logits are not finite")
        if gaps.spread == 0:
            raise CannotJudge("all logits are equal: the head's weights are zero")
        evidence = {"gap": gaps.gap, "noise": gaps.noise, "spread": gaps.spread, "rounding": rounding}
        if gaps.gap > cls.FACTOR * gaps.noise:
            found = f"logits {gaps.gap / gaps.spread:.2g} sd off (from an independent fp32 pass)"
            expected = f"under {cls.FACTOR * gaps.noise / gaps.spread:.1g} sd ({cls.FACTOR:g} times rounding)"
            causes = ("not as configured: positions, window, caps, scales or norms", "a hook or a patch")
        elif gaps.losses and abs(gaps.losses[0] - gaps.losses[1]) > cls._loss_limit(gaps):
            found = f"loss {gaps.losses[0]:.6g} (of logits that are right)"
            expected = f"{gaps.losses[1]:.6g} (in fp32 from the same weights)"
            causes = ("a loss in low precision (or of other positions)", "a patched loss function")
            evidence |= {"loss": gaps.losses[0], "reference_loss": gaps.losses[1], "loss_noise": gaps.loss_noise}
        else:
            return None
        action = "compare config.json with the model that was meant, and look for hooks, patches and lost buffers"
        return cls.finding("warning", found, expected, causes, action, evidence, check=PROBE)

    @classmethod
    def _loss_limit(cls, gaps: Gaps) -> float:
        return cls.FACTOR * gaps.loss_noise + cls.LOSS_ROUNDING * abs(gaps.losses[1])


def one_document(inputs: dict, longest: int = LENGTH, with_padding: bool = False) -> dict:
    """The longest document of the batch, up to `longest` tokens, as a batch of one row: nothing in it has to be kept
    apart. `with_padding`: also what pads its row on the left. Raises `CannotJudge`."""
    shape, documents = inputs["input_ids"].shape, find_documents(inputs)
    inputs = {name: value for name, value in inputs.items() if name not in BOUNDARIES}
    odd = [name for name, value in inputs.items() if not isinstance(value, torch.Tensor) or value.shape != shape]
    if odd:
        raise CannotJudge(f"{', '.join(odd)} cannot be cut to one document")
    sizes = torch.stack([(documents == number).sum(dim=1) for number in range(max(int(documents.max()), 0) + 1)])
    if int(sizes.max()) < MIN_TOKENS:
        raise CannotJudge(f"no document of {MIN_TOKENS} tokens in the batch")
    number, row = divmod(int(sizes.argmax()), shape[0])
    begin = int((documents[row] == number).nonzero()[0])
    end = begin + min(longest, int(sizes.max()))
    if with_padding and begin < longest and bool((documents[row, :begin] < 0).all()):
        begin, end = 0, min(end, longest)
    return {name: value[row : row + 1, begin:end] for name, value in inputs.items()}


# --- the model's own call


def record_call(batch, row: dict, is_exact: bool = False, training: bool = False) -> Call:
    """The first call of the model in the trainer's loss of this row. `is_exact`: without the trainer's autocast.
    Raises `CannotJudge` where its logits cannot be told."""
    model, compute_loss = batch.model, loss_of(batch.twin, batch.model, row, None)
    with frozen(model, training), torch.no_grad(), _recording(model) as (calls, dtypes):
        with without_autocast(model) if is_exact else nullcontext():
            loss = batch.twin.compute_loss(model, dict(row)) if is_exact else compute_loss()
        if not calls:
            raise CannotJudge("compute_loss does not call the model")
        arguments, logits = calls[0]
        if logits is None:  # a fused loss makes none; the model does without labels
            model(**{name: value for name, value in arguments.items() if name in GIVEN})
            logits = calls[-1][1]
    ids = arguments.get("input_ids")
    if not isinstance(ids, torch.Tensor) or not isinstance(logits, torch.Tensor) or logits.shape[:2] != ids.shape:
        raise CannotJudge("compute_loss calls the model without input_ids, or it gives no logits for each position")
    mask, positions, labels = (arguments.get(name) for name in ("attention_mask", "position_ids", "labels"))
    odd = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name not in KNOWN]
    odd += [name for name in ("attention_mask", "position_ids") if not _fits(arguments.get(name), ids)]
    if odd:
        raise CannotJudge(f"compute_loss gives the model {', '.join(odd)}, which the reference does not know")
    is_key = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0] != 0
    is_own = batch.has_own_loss or batch.twin.label_smoother is not None or has_own_loss_function(model)
    is_own |= not bool(is_key.all())  # the first token is scored where the padding before it is
    return Call(
        ids=ids[0],
        positions=count_text(is_key) if positions is None else positions[0],
        is_key=is_key,
        logits=logits[0].float(),
        rounding=max([ROUNDING.get(dtype, 0.0) for dtype in dtypes] + [rounding_of_products(ids.device)]),
        loss=float(loss.mean()),
        is_exact=is_exact,
        labels=None if is_own or not _fits(labels, ids) or labels is None else labels[0],
    )


def count_text(is_text: torch.Tensor) -> torch.Tensor:
    """Positions of a row that begins at its first token: padding on the left of it has none of its own."""
    return torch.arange(len(is_text), device=is_text.device).sub(int(is_text.int().argmax())).clamp_min(0)


@contextmanager
def _recording(model: torch.nn.Module) -> Iterator[tuple[list, list]]:
    """Arguments and logits of each call, None where it gave none, and the types in which the head computed."""
    calls, dtypes, names = [], [], ("input_ids",)

    def record(module, args, kwargs, output):
        logits = output.get("logits") if isinstance(output, dict) else output
        calls.append((dict(zip(names, args, strict=False)) | kwargs, logits))

    hooks = [
        model.register_forward_hook(record, with_kwargs=True),
        model.get_output_embeddings().register_forward_hook(lambda module, args, output: dtypes.append(output.dtype)),
    ]
    try:
        yield calls, dtypes
    finally:
        for hook in hooks:
            hook.remove()


def _fits(value, ids: torch.Tensor) -> bool:
    return value is None or (isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == ids.shape[1])


def rounding_of_products(device: torch.device) -> float:
    """Of products of fp32 matrices here and now, tried: TF32 and bf16 are switched on by flags of several names."""
    exact = 1 + torch.tensor([2.0**-12, 2.0**-9], device=device).repeat(32)  # TF32 keeps 10 bits, bf16 7
    kept = (exact.diag() @ torch.ones(64, 64, device=device))[:2, 0] == exact[:2]
    kind = torch.float32 if kept[0] else torch.float16 if kept[1] else torch.bfloat16  # TF32 rounds as fp16 does
    return ROUNDING[kind]


# --- against the reference


def measure(architecture: Architecture, weights: dict, call: Call) -> Gaps:
    """Padding is not compared: what it attends to is nobody's concern."""
    place = (call.ids, call.positions, call.is_key)
    exact = Oracle(architecture, weights).logits(*place)
    noisy = Oracle(architecture, weights, call.rounding).logits(*place)
    kept = call.is_key
    gap, noise = (rms((other - exact)[kept]) for other in (call.logits, noisy))
    spread = float(exact[kept].std())
    if call.labels is None or not (call.labels[1:] != IGNORE_INDEX).any():
        return Gaps(gap, noise, spread)
    own, rounded = (F.cross_entropy(x[:-1], call.labels[1:], reduction="none") for x in (exact, noisy))
    count = int((call.labels[1:] != IGNORE_INDEX).sum())
    loss = float(own.sum()) / count
    return Gaps(gap, noise, spread, (call.loss, loss), float((rounded - own).abs().sum()) / count)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def variants(found: Architecture) -> Iterator[tuple[str, Architecture]]:
    """Simple changes of the reference, each with what a model does that it describes."""
    if found.rope is not None:
        yield "no positions reach the attention (NoPE)", replace(found, rope=None)
        yield "neighbouring dimensions rotated together (not the two halves)", replace(found, is_interleaved=True)
    if any(found.windows):
        for words, more in (("the window is a token wider", 1), ("the window is a token narrower", -1)):
            yield words, replace(found, windows=tuple(window and window + more for window in found.windows))
        yield "the sliding window is ignored", replace(found, windows=(None,) * len(found.windows))
    if found.caps[0] is not None:
        yield "attention scores are not soft-capped", replace(found, caps=(None, found.caps[1]))
    if found.caps[1] is not None:
        yield "logits are not soft-capped", replace(found, caps=(found.caps[0], None))
