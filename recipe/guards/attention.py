"""What the logits of a position depend on: later tokens, other rows, other documents.

Tested by the gradient, whose zeros are exact: a masked softmax gives masked tokens no gradient at all, in any
precision and however weak the layer, while two sets of logits differ by rounding too.
"""

import inspect
from collections.abc import Callable, Iterator

import torch

from recipe.guards.batches import IGNORE_INDEX
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.sandbox import frozen

CAUSALITY, ROWS, DOCUMENTS = "non_causal_attention", "row_leak", "cross_document_attention"
PADDING = -1
GOLDEN = 0.618  # spreads positions over a row without meeting the powers of two where chunks and windows end

Results = dict[str, Verdict]


class Attention(Guard):
    """A position's logits depend on what it must not see: later tokens, another row, an earlier document.

    When: before step 1, before step 21 and when a symptom is explained.
    Measured: on up to 4 rows of the first micro-batch in train mode: one scored position of half of the rows is asked,
        the gradient of its logits (in a random projection) at the embeddings of all tokens. Where it is over 1e-5 of
        the largest, at a later token, at another row or at an earlier document of the row, the position sees it. Then
        in eval mode, with the other variant of the attention mask (ones or none), tokens after a position are changed;
        logits that move elsewhere are asked for their gradient. Logits that move without gradient are reported where
        half of them move: by 1e-3 standard deviations in fp32, by 0.5 in lower precision.
    Try (non_causal_attention): comparing the logits of a row with those of its first half alone: they must be equal.
    Try (row_leak): comparing the logits of a row alone with those in the batch: they must be equal.
    Try (cross_document_attention): `position_ids` without attention mask and with `use_cache=False`, or flash
        attention with `cu_seq_lens`; or positions that run on, if documents need not be kept apart.
    Cannot see: leaks under 1e-5 of the gradient, at positions that are not asked, in the compiled model alone; sharded
        weights; a `compute_loss` that gives the model other tokens than the batch's.
    Cannot see (cross_document_attention): Documents that the batch does not mark.
    """

    ids = {
        CAUSALITY: "A position's logits depend on later tokens.",
        DOCUMENTS: "A document's logits depend on its neighbour in the block.",
        ROWS: "One row of the batch changes another's logits.",
    }
    explains_symptoms = True
    rules_out = {CAUSALITY: "causal", ROWS: "row"}
    # One row is asked and another must be there to leak; more only where they are cheap. Chosen, not measured.
    MIN_ROWS, MAX_ROWS, MAX_TOKENS = 2, 4, 2048
    # Of the largest gradient. Masked tokens get exactly zero (21 families, fp32 and bf16); only mixing by FFT rounds,
    # by eps * log2(length) = 1e-6 in fp32, here with ten times the room. The tests' weakest leak is 2e-4.
    ROUNDING = 1e-5
    # Half of the logits moved by this many standard deviations though no gradient flows. Mixtures of experts round
    # differently with the number of tokens an expert gets, and a rounding can turn a token to another expert: a few
    # positions move far and the others by a few eps (bf16: 0.8 %). In fp32 such turns are rare and the others move by
    # 1e-6, so a thousandth tells; leaks of a hundredth were missed by half a deviation.
    UNPROVEN, UNPROVEN_FP32 = 0.5, 1e-3

    def probe(self, batch) -> Iterator[Verdict]:
        if batch.has_own_compute_loss:
            check_model_inputs(batch.model, batch.inputs, batch.loss_of())
        with batch.twin.compute_loss_context_manager():
            yield from probe_attention(batch.model, batch.inputs).values()


def check_model_inputs(model, inputs: dict, compute_loss: Callable[[], torch.Tensor]) -> None:
    """The probe runs the model, so a `compute_loss` of the user's own must give it the batch's tokens, once. Raises
    `CannotJudge` where it gives it others, or embeddings."""
    seen, embedded = [], []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    embedding = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(1))
    try:
        with torch.no_grad():
            compute_loss()
    finally:
        hook.remove()
        embedding.remove()
    given = [kwargs.get("input_ids", args[0] if args else None) for args, kwargs in seen]
    ids = inputs["input_ids"]
    is_same = [isinstance(each, torch.Tensor) and each.shape == ids.shape and torch.equal(each, ids) for each in given]
    if is_same != [True] or len(embedded) != 1:
        raise CannotJudge("compute_loss gives the model something else than the batch's tokens, or more than once")


def probe_attention(model: torch.nn.Module, inputs: dict) -> Results:
    """Ask a few rows of a micro-batch in train mode, by gradient, then in eval mode with the other variant of the
    attention mask, by changing tokens. Of each id its verdict. Raises `CannotJudge`.

    `model` is the eager, unwrapped module, `inputs` what training gives it. Nothing is left behind: no gradient, mode
    or hook, and the random generators are put back.
    """
    batch, rows = choose_rows(inputs)
    documents, scored = find_documents(batch), find_scored(batch)
    asked, others = choose_positions(documents, scored)
    setting = {"rows": rows, "mode": "train", "attention_mask": "as given"}
    results = _ask(model, batch, asked, documents, setting)
    if ROWS in findings_of(results) and len(asked) > 1:  # one row asked: whose gradient it is, is sure
        results = _ask(model, batch, dict([next(iter(asked.items()))]), documents, setting)
    try:
        variant, mask = other_mask(model, batch, documents)
        setting |= {"mode": "eval", "attention_mask": mask}
        in_eval = _change(model, variant, others or asked, documents, scored, setting)
    except CannotJudge:  # training's own mode has been judged
        return results
    return results | findings_of(in_eval) | findings_of(results)


def findings_of(results: Results) -> Results:
    return {name: result for name, result in results.items() if isinstance(result, Finding)}


def choose_rows(inputs: dict) -> tuple[dict, list[int]]:
    """The rows with the most documents, as a batch, and their numbers."""
    if inputs.get("input_ids") is None or inputs["input_ids"].ndim != 2:
        raise CannotJudge("the batch has no input_ids of rows and positions")
    num_rows, length = inputs["input_ids"].shape
    count = min(num_rows, Attention.MAX_ROWS, max(Attention.MIN_ROWS, Attention.MAX_TOKENS // length))
    if count == num_rows:
        return dict(inputs), list(range(num_rows))
    documents = find_documents(inputs)
    numbers = documents.amax(dim=1).tolist()
    rows = sorted(sorted(range(num_rows), key=lambda row: -numbers[row])[:count])
    batch = {name: value[rows] if _has_rows(value, num_rows) else value for name, value in inputs.items()}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if inputs.get(name) is not None:
            begins = torch.diff(documents[rows], dim=1, prepend=documents[rows][:, :1] - 1) != 0
            ends = torch.tensor([begins.numel()], device=begins.device)
            batch[name] = torch.cat([begins.flatten().nonzero().flatten(), ends]).to(inputs[name].dtype)
    return batch, rows


def _has_rows(value, num_rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == num_rows


def find_documents(batch: dict) -> torch.Tensor:
    """`[rows, positions]`: the number of the document in its row, 0 where the batch does not keep documents apart;
    PADDING where the attention mask is 0."""
    ids, positions, sequence = batch["input_ids"], batch.get("position_ids"), batch.get("seq_idx")
    begins = torch.zeros_like(ids, dtype=torch.bool)
    if positions is not None and positions.ndim == 2:
        begins[:, 1:] |= positions[:, 1:] <= positions[:, :-1]
    if sequence is not None:
        begins[:, 1:] |= sequence[:, 1:] != sequence[:, :-1]
    if (ends := batch.get("cu_seq_lens_q")) is not None:
        begins.view(-1)[ends[ends < ids.numel()].long()] = True
    mask = batch.get("attention_mask")
    is_padding = mask == 0 if mask is not None and mask.shape == ids.shape else torch.zeros_like(begins)
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


def choose_positions(documents: torch.Tensor, scored: torch.Tensor) -> tuple[dict[int, int], dict[int, int]]:
    """Row -> position of the half of the rows to ask, and of the other half. A position is scored, has a later one in
    its document and, where it can, a document before it."""
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
    asked = max(halves, key=lambda half: sum(int(documents[row].max()) + 1 for row in half))
    return asked, {row: place for row, place in chosen.items() if row not in asked}


def other_mask(model: torch.nn.Module, batch: dict, documents: torch.Tensor) -> tuple[dict, str]:
    """The batch with a mask of ones instead of none, or with none instead of ones: another path through the code.

    Restarted positions keep documents apart only without a mask (transformers 5.23), so they stay as they are."""
    mask, known = batch.get("attention_mask"), inspect.signature(model.forward).parameters
    if mask is None and "attention_mask" in known and not (documents > 0).any():
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, "ones"
    if mask is not None and mask.ndim == 2 and bool((mask == 1).all()):
        return {name: value for name, value in batch.items() if name != "attention_mask"}, "none"
    return batch, "as given"


# --- the model


def _logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    labels = inspect.signature(model.forward).parameters.get("labels")
    if labels is None or labels.default is not inspect.Parameter.empty:  # the loss costs more memory than the logits
        batch = {name: value for name, value in batch.items() if name not in ("labels", "shift_labels")}
    outputs = model(**batch)
    parts = (
        [outputs.get("logits")] if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    )
    logits = next((part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 3), None)
    if logits is None or logits.shape[:2] != batch["input_ids"].shape:
        raise CannotJudge(f"{type(model).__name__} gives no logits for each position")
    return logits


def input_gradient(model: torch.nn.Module, batch: dict, asked: dict[int, int], training: bool) -> torch.Tensor:
    """`[rows, positions]` float32: size of the gradient that the logits at `asked` (row -> position), in a random
    projection, give to each token's embedding."""
    leaves: list[torch.Tensor] = []

    def cut(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        with frozen(model, training), torch.enable_grad():
            logits = _logits(model, batch)
            projection = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0)).to(logits.device)
            total = sum((logits[row, place].float() * projection).sum() for row, place in asked.items())
            if total.requires_grad:
                total.backward()  # only `leaves` need it; torch.autograd.grad is refused by re-entrant checkpointing
    finally:
        hook.remove()
    sizes = [leaf.grad.float().norm(dim=-1) for leaf in leaves if leaf.grad is not None]
    if not sizes or any(size.shape != batch["input_ids"].shape for size in sizes):
        raise CannotJudge("the logits do not come from one embedding of each token")
    return torch.stack(sizes).sum(dim=0)


def _ask(model, batch: dict, asked: dict[int, int], documents: torch.Tensor, setting: dict) -> Results:
    sizes = input_gradient(model, batch, asked, setting["mode"] == "train")
    return judge_gradient(sizes, asked, documents, setting)


def _change(model, batch: dict, after: dict[int, int], documents, scored, setting: dict) -> Results:
    """Change the tokens after a position in some rows. What moves elsewhere is asked for its gradient, the proof."""
    changed = batch | {"input_ids": change_tokens(batch["input_ids"], after, documents)}
    pair = []
    for version in (batch, changed):
        with frozen(model, training=False), torch.no_grad():  # generators put back: the same draws for both
            pair.append(_logits(model, version))
    watched = (documents != PADDING) & scored
    for row, place in after.items():
        watched[row, place + 1 :] = False
    moved = movement(*pair, watched)
    del pair
    if not moved.any():
        return {}
    row, place = divmod(int(moved.argmax()), moved.shape[1])
    results = _ask(model, batch, {row: place}, documents, setting)
    return findings_of(results) or judge_movement(moved, watched, after, is_exact(model))


def is_exact(model: torch.nn.Module) -> bool:
    """Whether it computes in fp32 or finer, so that rounding is far below what tells."""
    kind = next((parameter.device.type for parameter in model.parameters()), "cpu")
    low = any(parameter.dtype.itemsize < 4 for parameter in model.parameters() if parameter.is_floating_point())
    return not low and not torch.is_autocast_enabled(kind)


def change_tokens(input_ids: torch.Tensor, after: dict[int, int], documents: torch.Tensor) -> torch.Tensor:
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


# --- the verdict


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


def judge_gradient(sizes: torch.Tensor, asked: dict[int, int], documents: torch.Tensor, setting: dict) -> Results:
    """Compare the gradient's sizes `[rows, positions]` with what the asked positions may see: earlier tokens of their
    own document. Padding decides nothing."""
    real, place = documents != PADDING, torch.arange(sizes.shape[1], device=sizes.device)
    largest = float(sizes[list(asked)].where(real[list(asked)], 0.0).max())
    if not sizes[real].isfinite().all() or largest == 0:
        raise CannotJudge("the gradient at the embeddings is zero or not finite")
    relative = torch.where(real, sizes / largest, 0.0)
    later, earlier, others = (torch.zeros_like(real) for _ in range(3))
    for row, t in asked.items():
        later[row] = real[row] & (place > t)
        earlier[row] = real[row] & (documents[row] < documents[row, t])
    others[[row for row in range(len(sizes)) if row not in asked]] = True
    parts = zip((CAUSALITY, ROWS, DOCUMENTS), (later, others & real, earlier), strict=True)
    results: Results = {name: _judge_part(name, relative, part, asked, setting) for name, part in parts}
    if len(sizes) == 1:
        results[ROWS] = Skip(ROWS, NotApplicable("one row in the batch"))
    if not earlier.any():
        reason = (
            CannotJudge("no scored position in a later document")
            if (documents > 0).any()
            else NotApplicable("positions never restart: nothing is kept apart")
        )
        results[DOCUMENTS] = Skip(DOCUMENTS, reason)
    return results


# Of each id: severity, what is seen, likely causes, action.
WORDS = {
    CAUSALITY: (
        "error",
        "later tokens",
        (
            "no causal mask reaches the attention (is_causal lost, an encoder without is_decoder)",
            "a mask that is dropped on one path only: with dropout, without padding, in one layer",
            "a layer that mixes along the row: a convolution padded on both sides, a mean",
        ),
        "compare the logits of a row with those of its first half alone: they must be equal there",
    ),
    ROWS: (
        "error",
        "tokens of another row",
        ("a mean or a norm over the batch dimension", "rows reshaped or transposed wrongly", "wrong cu_seq_lens"),
        "compare the logits of a row alone with those that it gets in the batch: they must be equal",
    ),
    DOCUMENTS: (
        "warning",
        "tokens of earlier documents",
        (
            "this model or attention ignores positions that restart",
            "a 2-D attention mask of ones beside position_ids, or use_cache=True: both turn document masking off",
            "flash attention with several rows and no cu_seq_lens",
        ),
        "pass position_ids without attention_mask and with use_cache=False, or let positions run on over the row",
    ),
}


def _judge_part(name: str, relative, forbidden, asked: dict[int, int], setting: dict) -> Verdict:
    """Of the row with the largest forbidden gradient."""
    row = int(relative.where(forbidden, 0.0).amax(dim=1).argmax())
    seen = (forbidden[row] & (relative[row] > Attention.ROUNDING)).nonzero().flatten()
    if not len(seen):
        return Attention.clear(name, PROBE)
    severity, what, causes, action = WORDS[name]
    seeing = row if row in asked else next(iter(asked))
    nearest = int((seen - asked[seeing]).abs().min())
    if name == CAUSALITY and len(seen) == nearest == 1:
        causes = ("the mask's diagonal is off by one: position i sees i+1", *causes)
    evidence = {"row": setting["rows"][seeing], "position": asked[seeing], "seen": len(seen)}
    evidence |= {"of": int(forbidden[row].sum()), "row_seen": setting["rows"][row], "nearest": nearest}
    evidence |= {"relative_gradient": float(relative[row, seen].max())}
    evidence |= {"mode": setting["mode"], "attention_mask": setting["attention_mask"]}
    found = f"position {evidence['position']} of row {evidence['row']} sees {len(seen)} of {evidence['of']} {what}"
    found += f" in {setting['mode']} mode" + (f", row {evidence['row_seen']}" if row != seeing else "")
    return Attention.finding(severity, found, "none", causes, action, evidence, name, PROBE)


def judge_movement(moved: torch.Tensor, watched: torch.Tensor, after: dict[int, int], exact: bool = False) -> Results:
    """Logits that moved though no gradient flows. `exact`: in fp32 a thousandth of a deviation is no rounding, in half
    of the watched logits or at the same distance before the change in every row."""
    limit = Attention.UNPROVEN_FP32 if exact else Attention.UNPROVEN
    own = torch.zeros_like(watched)
    own[list(after)] = True
    results: Results = {}
    for name, part in ((CAUSALITY, watched & own), (ROWS, watched & ~own)):
        size = float(moved[part].median()) if part.any() else 0.0
        if name == CAUSALITY and exact and size <= limit:
            size = same_distance(moved.where(part, 0.0), after)
        if size > limit:
            results[name] = Attention.finding(
                "error",
                found=f"logits moved by {size:.2g} deviations without gradient, when tokens changed",
                expected="no movement: they must not see these tokens",
                causes=("statistics over positions or rows without gradient", "masks made from later tokens"),
                action="change one token and look where the logits move",
                evidence={"movement": size},
                id=name,
                check=PROBE,
            )
    return results


def same_distance(moved: torch.Tensor, after: dict[int, int]) -> float:
    """The smallest of the rows' largest movements, where all lie equally far before the change; else 0. A token that
    a rounding turned to another expert does so in one row, and anywhere."""
    rows = moved[list(after)]
    distances = {place - int(row.argmax()) for place, row in zip(after.values(), rows, strict=True)}
    return float(rows.amax(dim=1).min()) if len(after) > 1 and len(distances) == 1 else 0.0
