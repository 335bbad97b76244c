"""What the logits of a position depend on: later tokens, other rows, other documents.

Read from the gradient, whose zeros are exact: a masked softmax gives masked tokens no gradient at all, in any
precision and however weak the layer, while two sets of logits differ by rounding too."""

import inspect
import logging
from collections.abc import Iterator

import torch

from recipe.guards.batches import IGNORE_INDEX, input_ids_of, leading_padding
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.head import backbone_of
from recipe.guards.run import is_encoder
from recipe.guards.sandbox import frozen

# Of each id: severity, what is seen, likely causes, action.
TEXTS = {
    "non_causal_attention": (
        "error",
        "later tokens",
        ("the causal mask is missing", "a mask lost on one path", "a layer that mixes along the row"),
        "compare the logits of a row with those of its first half alone: they must be equal there",
    ),
    "row_leak": (
        "error",
        "tokens of other rows",
        ("a mean or norm over the batch (dimension)", "a wrong reshape or transpose", "wrong cu_seq_lens"),
        "compare the logits of a row alone with those that it gets in the batch: they must be equal",
    ),
    "cross_document_attention": (
        "warning",
        "earlier tokens (of other documents)",
        (
            "position_ids are ignored (which restart at each document)",
            "a mask of ones or use_cache=True beside position_ids",
        ),
        "pass position_ids without attention_mask and with use_cache=False, or let positions run on over the row",
    ),
}
logger = logging.getLogger("recipe.guards")

PADDING = -1
GOLDEN = 0.618  # spreads positions over a row without meeting the powers of two where chunks and windows end

Results = dict[str, Finding | CannotJudge | None]
Places = dict[int, int]  # row -> position


class AttentionLeak(Guard):
    """The logits of a position depend on later tokens, other rows or other documents.

    When: before step 1, at step 20 (adapters and gates begin at zero) and when a loss curve has to be explained.
    Measured: in the model call that `compute_loss` makes, the gradient of the logits of one scored position, in every
        second of 2 to 4 rows, at the embeddings of all tokens, in train mode. A mask gives exactly zero; a finding is
        above 1e-5 of the largest. Then in eval mode, with a mask of ones if there was none or none for one of ones:
        later tokens of the other rows are changed, and the gradient is computed at what moves. Without gradient it is
        a finding if half of the logits move by 0.5 of their deviation; in fp32 by 0.001, or those at the same distance
        before the change in every row. A document begins where `position_ids` restart, `seq_idx` changes or
        `cu_seq_lens` says so.
    Try (non_causal_attention): comparing the logits of a row with those of its first half alone: they must be equal
        there. Look for a lost `is_causal`, a mask of None in one layer or path, an encoder without `is_decoder`.
    Try (row_leak): comparing the logits of a row alone with those that it gets in the batch.
    Try (cross_document_attention): `position_ids` without `attention_mask` and with `use_cache=False`: a 2-D mask of
        ones beside them turns masking off (transformers 5.23). Some models ignore positions.
    Cannot see: weaker leaks; other positions and rows; leaks without gradient in train mode only, or of less than half
        a deviation below fp32; the compiled model; logits that do not come from one embedding of each token, or a
        `compute_loss` that calls parts of the model ("cannot judge"); encoder-decoders and losses that restore hidden
        tokens or score whole rows ("not applicable"); row leaks in batches of one row; documents that the batch does
        not mark.
    """

    ids = {
        "non_causal_attention": "A position's logits depend on later tokens.",
        "row_leak": "One row of the batch changes another's logits.",
        "cross_document_attention": "A document's logits depend on its neighbour in the block.",
    }
    explains_symptoms = True
    rules_out = {"non_causal_attention": "causal", "row_leak": "row"}
    # Of the largest gradient. Masked tokens get exactly zero (21 families, fp32 and bf16); only mixing by FFT would
    # round, by eps * log2(length) = 1e-6 in fp32. Ten times that; the tests' weakest leak is 2e-4.
    ROUNDING = 1e-5
    # Half of the logits moved by this many standard deviations though no gradient flows. Mixtures of experts round
    # differently with the number of tokens, and a rounding can turn a token to another expert: a few positions move
    # far and the others by a few eps (bf16: 0.8 %). In fp32 such turns are rare and the others move by 1e-6, so a
    # thousandth tells; leaks of a hundredth were missed by half a deviation.
    UNPROVEN, UNPROVEN_FP32 = 0.5, 1e-3

    def probe(self, batch) -> Iterator[Verdict]:
        inputs = model_inputs(batch)
        is_same = inputs["input_ids"].shape == batch.inputs["input_ids"].shape
        shown = batch.inputs if is_same else inputs
        documents = find_documents(shown, leading_padding(shown, batch.run.pad_token_id))
        with batch.twin.compute_loss_context_manager():
            results = probe_attention(batch.model, inputs, documents)
        for name, result in results.items():
            yield Skip(name, result) if isinstance(result, CannotJudge) else result or self.clear(name, PROBE)

    @classmethod
    def judge_gradient(cls, sizes: torch.Tensor, probed: Places, documents: torch.Tensor) -> Results:
        """The gradient's sizes `[rows, positions]` against what the `probed` positions may see: earlier tokens of the
        same document. Padding decides nothing."""
        real, place = documents != PADDING, torch.arange(sizes.shape[1], device=sizes.device)
        largest = float(sizes[list(probed)].where(real[list(probed)], 0.0).max())
        if not sizes[real].isfinite().all() or largest == 0:
            raise CannotJudge("the gradient at the embeddings is zero or not finite")
        relative = torch.where(real, sizes / largest, 0.0)
        later, earlier, others = (torch.zeros_like(real) for _ in range(3))
        for row, t in probed.items():
            later[row] = real[row] & (place > t)
            earlier[row] = real[row] & (documents[row] < documents[row, t])
        others[[row for row in range(len(sizes)) if row not in probed]] = True
        parts = zip(TEXTS, (later, others & real, earlier), strict=True)
        results: Results = {name: cls._judge_part(name, relative, part, probed) for name, part in parts}
        if len(sizes) == 1:
            results["row_leak"] = NotApplicable("one row in the batch")
        if not (documents > 0).any():
            results["cross_document_attention"] = NotApplicable("positions never restart: nothing is kept apart")
        elif not earlier.any():
            results["cross_document_attention"] = CannotJudge("no scored position in a later document")
        return results

    @classmethod
    def _judge_part(cls, name: str, relative, forbidden, probed: Places) -> Finding | None:
        """Of the row with the largest forbidden gradient; None where there is none."""
        row = int(relative.where(forbidden, 0.0).amax(dim=1).argmax())
        seen = (forbidden[row] & (relative[row] > cls.ROUNDING)).nonzero().flatten()
        if not len(seen):
            return None
        severity, what, causes, action = TEXTS[name]
        seeing = row if row in probed else next(iter(probed))
        position, distances = probed[seeing], (seen - probed[seeing]).abs()
        number, nearest, share = int(forbidden[row].sum()), int(distances.min()), float(relative[row, seen].max())
        if name == "non_causal_attention" and len(seen) == nearest == 1:
            causes = ("mask diagonal off by one: position i sees i+1", *causes)
        what = what if row == seeing else f"tokens of row {row}"
        found = f"position {position} sees {len(seen)} of {number} {what}"
        evidence = {"row": seeing, "position": position, "row_seen": row, "nearest": nearest}
        evidence |= {"relative_gradient": share, "mode": "train", "attention_mask": "as given"}
        return cls.finding(severity, found, "none", causes, action, evidence, name, PROBE)

    @classmethod
    def judge_movement(cls, moved, watched, after: Places, is_exact: bool = False) -> dict[str, Finding]:
        """Logits that moved though no gradient flows. `moved`, `watched`: `[rows, positions]`; the tokens `after` some
        places were changed. `is_exact`: in fp32 a thousandth of a deviation is no rounding, in half of the watched
        logits or at the same distance before the change in every row."""
        limit = cls.UNPROVEN_FP32 if is_exact else cls.UNPROVEN
        own = torch.zeros_like(watched)
        own[list(after)] = True
        sizes = [float(moved[part].median()) if part.any() else 0.0 for part in (watched & own, watched & ~own)]
        if is_exact and sizes[0] <= limit:
            sizes[0] = same_distance(moved.where(watched & own, 0.0), after)
        causes = ("statistics without gradient (over positions or rows)", "masks made from later tokens")
        action, found = "change one token and look where the logits move", {}
        for name, size in zip(TEXTS, sizes, strict=False):
            if size > limit:
                text, expected = f"logits move by {size:.2g} sd without gradient", "none (when hidden tokens change)"
                found[name] = cls.finding("error", text, expected, causes, action, {"movement": size}, name, PROBE)
        return found


def probe_attention(model: torch.nn.Module, batch: dict, documents: torch.Tensor | None = None) -> Results:
    """The eager model in train mode, by gradient, then in eval mode with the other variant of the attention mask, by
    changing tokens. It leaves no trace. `documents`: of `find_documents`, where the batch does not tell. Raises
    `CannotJudge`."""
    documents, scored = find_documents(batch) if documents is None else documents, find_scored(batch)
    probed, others = choose_positions(documents, scored)
    results = _probe_gradient(model, batch, probed, documents, training=True)
    if "row_leak" in _alarms(results) and len(probed) > 1:  # of one position it is certain whose gradient it is
        results = _probe_gradient(model, batch, dict([next(iter(probed.items()))]), documents, training=True)
    places = (others or probed, documents, scored)
    try:
        variant, mask = other_mask(model, batch, documents)
        try:
            in_eval = _change(model, variant, *places)
        except CannotJudge:
            raise
        except Exception as error:  # training does not make this call: some models refuse it
            logger.debug("the model cannot be run with another attention mask", exc_info=error)
            mask, in_eval = "as given", _change(model, batch, *places)
    except CannotJudge:  # training's own mode has been judged
        return results
    for finding in in_eval.values():
        finding.evidence.update(mode="eval", attention_mask=mask)
    return results | in_eval | _alarms(results)


def _alarms(results: Results) -> dict[str, Finding]:
    return {name: result for name, result in results.items() if isinstance(result, Finding)}


def model_inputs(batch) -> dict:
    """The arguments of the model in the call that `compute_loss` really made, masks that it built among them; the
    labels of the batch, where the call had none, say what is scored. Raises `CannotJudge`."""
    objective = batch.run.objective
    if objective is not None and (objective.is_denoising or objective.scores_rows):
        raise NotApplicable(f"the objective is {objective.words}: its model may look both ways")
    if is_encoder(batch.model) or getattr(getattr(batch.model, "config", None), "is_encoder_decoder", False):
        raise NotApplicable("an encoder sees all of its tokens")
    call = next(iter(batch.recording.calls), None)
    if call is None:
        raise CannotJudge("compute_loss does not call the model, but parts of it")
    if input_ids_of(call) is None:
        raise CannotJudge("compute_loss gives the model no input_ids (embeddings of its own)")
    labels = batch.inputs.get("labels")
    own = {"labels": labels} if labels is not None and labels.shape == call["input_ids"].shape else {}
    return own | call


# --- the batch


def find_documents(batch: dict, padding: torch.Tensor | None = None) -> torch.Tensor:
    """`[rows, positions]`: the number of the document in its row, 0 where the batch does not keep documents apart;
    PADDING where the attention mask is 0, and at `padding`."""
    ids, positions, sequence = batch["input_ids"], batch.get("position_ids"), batch.get("seq_idx")
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if positions is not None and positions.ndim == 2:
        begins[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
    if sequence is not None:
        begins[:, 1:] |= sequence[:, 1:] != sequence[:, :-1]
    if (ends := batch.get("cu_seq_lens_q")) is not None:
        begins.view(-1)[ends[ends < ids.numel()].long()] = True
    mask = batch.get("attention_mask")
    is_padding = torch.zeros_like(begins) if padding is None else padding.clone()
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        is_padding |= mask == 0
    begins[:, 1:] &= ~(is_padding[:, 1:] | is_padding[:, :-1])
    begins[:, 0] = False
    return begins.cumsum(dim=1).masked_fill(is_padding, PADDING)


def find_scored(batch: dict) -> torch.Tensor:
    """Positions whose next token has a label: a masked prompt may see all of itself. All, where nothing is known."""
    ids, labels = batch["input_ids"], batch.get("labels")
    scored = torch.ones_like(ids, dtype=torch.bool)
    if labels is not None and labels.shape == ids.shape and (labels[:, 1:] != IGNORE_INDEX).any():
        scored[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return scored


def choose_positions(documents: torch.Tensor, scored: torch.Tensor) -> tuple[Places, Places]:
    """A position in each of half of the rows, whose gradient is computed, and in each of the others. It is scored, has
    a later one in its document and, where it can, a document before it."""
    followed = documents[:, 1:] == documents[:, :-1]
    usable = followed & scored[:, :-1] & (documents[:, :-1] != PADDING)
    chosen = {}
    for row in usable.any(dim=1).nonzero().flatten().tolist():
        later = (usable[row] & (documents[row, :-1] > 0)).nonzero().flatten()
        places = later if len(later) else usable[row].nonzero().flatten()
        chosen[row] = int(places[int(len(places) * ((row // 2 + 1) * GOLDEN % 1))])
    if not chosen:
        raise CannotJudge("no scored position has a later one in its row")
    halves = [{row: place for row, place in chosen.items() if row % 2 == parity} for parity in (1, 0)]
    probed = max(halves, key=lambda half: sum(int(documents[row].max()) + 1 for row in half))
    return probed, {row: place for row, place in chosen.items() if row not in probed}


def other_mask(model: torch.nn.Module, batch: dict, documents: torch.Tensor) -> tuple[dict, str]:
    """The batch with a mask of ones instead of none, or with none instead of ones: another path through the code.

    Restarted positions keep documents apart only without a mask (transformers 5.23), so they stay as they are."""
    mask, known = batch.get("attention_mask"), inspect.signature(model.forward).parameters
    if mask is None and "attention_mask" in known and not (documents > 0).any():
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, "ones"
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool((mask == 1).all()):
        return {name: value for name, value in batch.items() if name != "attention_mask"}, "none"
    return batch, "as given"


# --- the model


def _logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Or the last hidden states, where a fused head makes none."""
    hidden: list[torch.Tensor] = []
    backbone = backbone_of(model)
    hook = backbone.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        try:  # without labels, since the loss costs more memory than the logits
            outputs = model(**{name: value for name, value in batch.items() if name not in ("labels", "shift_labels")})
        except Exception:  # a model that needs them
            outputs = model(**batch)
    finally:
        hook.remove()
    outputs = outputs.get("logits") if isinstance(outputs, dict) else outputs
    parts = list(outputs) if isinstance(outputs, tuple) else [outputs]
    parts += hidden[-1:] if backbone is not model else []
    logits = next((part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 3), None)
    if logits is None or logits.shape[:2] != batch["input_ids"].shape:
        raise CannotJudge(f"{type(model).__name__} gives no logits for each position")
    return logits


def input_gradient(model: torch.nn.Module, batch: dict, probed: Places, training: bool) -> torch.Tensor:
    """`[rows, positions]` float32: size of the gradient that the logits at `probed` (row -> position), in a random
    projection, give to each token's embedding."""
    leaves: list[torch.Tensor] = []

    def cut(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # CTRL scales its embeddings in place

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with frozen(model, training), torch.enable_grad():
            logits = _logits(model, batch)
            projection = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0)).to(logits.device)
            total = sum((logits[row, place].float() * projection).sum() for row, place in probed.items())
            if total.requires_grad:
                total.backward()  # only `leaves` need it; torch.autograd.grad is refused by re-entrant checkpointing
    finally:
        hook.remove()
    sizes = [leaf.grad.float().norm(dim=-1) for leaf in leaves if leaf.grad is not None]
    if not sizes or any(size.shape != batch["input_ids"].shape for size in sizes):
        raise CannotJudge("the logits do not come from one embedding of each token")
    return torch.stack(sizes).sum(dim=0)


def _probe_gradient(model, batch: dict, probed: Places, documents: torch.Tensor, training: bool) -> Results:
    return AttentionLeak.judge_gradient(input_gradient(model, batch, probed, training), probed, documents)


def _change(model, batch: dict, after: Places, documents: torch.Tensor, scored: torch.Tensor) -> dict[str, Finding]:
    """Change the tokens after a position in some rows. Where logits move elsewhere, their gradient is the proof."""
    changed = batch | {"input_ids": change_tokens(batch["input_ids"], after, documents)}
    pair = []
    for version in (batch, changed):
        with frozen(model, training=False), torch.no_grad():  # both draw the same random numbers
            pair.append(_logits(model, version))
    watched = (documents != PADDING) & scored
    for row, place in after.items():
        watched[row, place + 1 :] = False
    moved = movement(*pair, watched)
    del pair
    if not moved.any():
        return {}
    row, place = divmod(int(moved.argmax()), moved.shape[1])
    proven = _alarms(_probe_gradient(model, batch, {row: place}, documents, training=False))
    return proven or AttentionLeak.judge_movement(moved, watched, after, is_exact(model))


def is_exact(model: torch.nn.Module) -> bool:
    """Whether it computes in fp32 or finer, so that rounding is far below what tells."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    low = any(parameter.dtype.itemsize < 4 for parameter in model.parameters() if parameter.is_floating_point())
    return not low and not torch.is_autocast_enabled(kind)


def change_tokens(input_ids: torch.Tensor, after: Places, documents: torch.Tensor) -> torch.Tensor:
    """Another token of the same batch at each place after `after` (row -> position); padding stays."""
    known = input_ids[documents != PADDING].unique()
    if len(known) < 2:
        raise CannotJudge("the batch holds one token only")
    changed, generator = input_ids.clone(), torch.Generator().manual_seed(0)
    for row, place in after.items():
        places = (documents[row, place + 1 :] != PADDING).nonzero().flatten() + place + 1
        steps = torch.randint(1, len(known), (len(places),), generator=generator).to(input_ids.device)
        changed[row, places] = known[(torch.searchsorted(known, input_ids[row, places]) + steps) % len(known)]
    return changed


def movement(before: torch.Tensor, after: torch.Tensor, watched: torch.Tensor) -> torch.Tensor:
    """`[rows, positions]`: largest change of a position's logits, in standard deviations of its row's; 0 where not
    watched. Row by row, to keep the memory to one row's."""
    moved = []
    for old, new, keep in zip(before, after, watched, strict=True):
        largest = (new - old).abs().amax(dim=-1).float() / old.float().std().clamp_min(1e-12)
        moved.append(torch.where(keep, largest, 0.0))
    moved = torch.stack(moved)
    if not moved.isfinite().all():
        raise CannotJudge("the logits are not finite")
    return moved


def same_distance(moved: torch.Tensor, after: Places) -> float:
    """The smallest of the rows' largest movements, where all lie equally far before the change; else 0. A token that
    a rounding turned to another expert does so in one row, and anywhere."""
    rows = moved[list(after)]
    distances = {place - int(row.argmax()) for place, row in zip(after.values(), rows, strict=True)}
    return float(rows.amax(dim=1).min()) if len(after) > 1 and len(distances) == 1 else 0.0
