"""What the logits of a position depend on: later tokens, other rows, other documents.

Asked of the gradient, whose zeros are exact: a masked softmax gives masked tokens no gradient at all, in any precision
and however weak the layer, while two sets of logits differ by rounding too."""

import inspect
from contextlib import contextmanager

import torch

from recipe.guards.finding import CannotJudge, Finding, NotApplicable
from recipe.guards.probes.targets import IGNORE_INDEX
from recipe.guards.thresholds import (
    ATTENTION_MAX_ROWS,
    ATTENTION_MAX_TOKENS,
    ATTENTION_MIN_ROWS,
    ROUNDING,
    UNPROVEN,
    UNPROVEN_FP32,
)

IDS = ("non_causal_attention", "row_leak", "cross_document_attention")
PADDING = -1
GOLDEN = 0.618  # spreads positions over a row without meeting the powers of two where chunks and windows end

Results = dict[str, Finding | CannotJudge | None]


def probe_attention(model: torch.nn.Module, inputs: dict, step: int = 0, tokens_seen: int = 0) -> Results:
    """Ask a few rows of a micro-batch in train mode, by gradient, then in eval mode with the other variant of the
    attention mask, by changing tokens. Of each id: a finding, None, or the reason why it could not be judged.

    `model` is the eager, unwrapped module, `inputs` what training gives it. Nothing is left behind: no gradient, mode
    or hook, and the random generators are put back.
    """
    try:
        batch, rows = choose_rows(inputs)
        documents, scored = find_documents(batch), find_scored(batch)
        asked, others = choose_positions(documents, scored)
        setting = {"rows": rows, "mode": "train", "attention_mask": "as given", "step": step, "tokens": tokens_seen}
        results = _ask(model, batch, asked, documents, setting)
        if "row_leak" in _alarms(results) and len(asked) > 1:  # one row asked: whose gradient it is, is sure
            results = _ask(model, batch, dict([next(iter(asked.items()))]), documents, setting)
    except CannotJudge as reason:
        return dict.fromkeys(IDS, reason)
    try:
        variant, mask = other_mask(model, batch, documents)
        setting |= {"mode": "eval", "attention_mask": mask}
        in_eval = _change(model, variant, others or asked, documents, scored, setting)
    except CannotJudge:  # training's own mode has been judged
        return results
    return results | _alarms(in_eval) | _alarms(results)


def _alarms(results: Results) -> Results:
    return {name: result for name, result in results.items() if isinstance(result, Finding)}


# --- the batch


def choose_rows(inputs: dict) -> tuple[dict, list[int]]:
    """The rows with the most documents, as a batch, and their numbers."""
    if inputs.get("input_ids") is None or inputs["input_ids"].ndim != 2:
        raise CannotJudge("the batch has no input_ids of rows and positions")
    num_rows, length = inputs["input_ids"].shape
    count = min(num_rows, ATTENTION_MAX_ROWS, max(ATTENTION_MIN_ROWS, ATTENTION_MAX_TOKENS // length))
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


@contextmanager
def undisturbed(model: torch.nn.Module, training: bool):
    """Mode, frozen weights (no memory for their gradients, no casts left in autocast's cache) and generators, for as
    long as it lasts."""
    modes = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {parameter.device for parameter in trainable if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            model.train(training).requires_grad_(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in trainable:
                parameter.requires_grad_(True)


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
        with undisturbed(model, training), torch.enable_grad():
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
    return check_gradient(sizes, asked, documents, setting)


def _change(model, batch: dict, after: dict[int, int], documents, scored, setting: dict) -> Results:
    """Change the tokens after a position in some rows. What moves elsewhere is asked for its gradient, the proof."""
    changed = batch | {"input_ids": change_tokens(batch["input_ids"], after, documents)}
    pair = []
    for version in (batch, changed):
        with undisturbed(model, training=False), torch.no_grad():  # generators put back: the same draws for both
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
    return _alarms(results) or check_movement(moved, watched, after, setting, is_exact(model))


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


def check_gradient(sizes: torch.Tensor, asked: dict[int, int], documents: torch.Tensor, setting: dict) -> Results:
    """Hold the gradient's sizes `[rows, positions]` against what the asked positions may see: earlier tokens of their
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
    parts = zip(IDS, (later, others & real, earlier), strict=True)
    results: Results = {name: _finding(name, relative, part, asked, setting) for name, part in parts}
    if len(sizes) == 1:
        results["row_leak"] = NotApplicable("one row in the batch")
    if not earlier.any():
        results["cross_document_attention"] = (
            CannotJudge("no scored position in a later document")
            if (documents > 0).any()
            else NotApplicable("positions never restart: nothing is kept apart")
        )
    return results


# Of each id: severity, what is seen, likely causes, action.
WORDS = {
    "non_causal_attention": (
        "error",
        "later tokens",
        (
            "no causal mask reaches the attention (is_causal lost, a mask of None, an encoder without is_decoder)",
            "a mask that is dropped on one path only: with dropout, without padding, in one layer",
            "a layer that mixes along the row: a convolution padded on both sides, a mean over positions",
        ),
        "compare the logits of a row with those of its first half alone: they must be equal there",
    ),
    "row_leak": (
        "error",
        "tokens of another row",
        (
            "a mean or a norm over the batch dimension",
            "rows and positions reshaped or transposed wrongly",
            "rows laid one after another with wrong boundaries (cu_seq_lens)",
        ),
        "compare the logits of a row alone with those that it gets in the batch: they must be equal",
    ),
    "cross_document_attention": (
        "warning",
        "tokens of earlier documents",
        (
            "positions restart, which isolates nothing by itself: this model or attention ignores them",
            "a 2-D attention mask of ones beside position_ids, or use_cache=True: both turn document masking off",
            "flash attention with several rows and no cu_seq_lens",
        ),
        "pass position_ids without attention_mask and with use_cache=False, or let positions run on over the row",
    ),
}


def _finding(name: str, relative, forbidden, asked: dict[int, int], setting: dict) -> Finding | None:
    """Of the row with the largest forbidden gradient; None where there is none."""
    row = int(relative.where(forbidden, 0.0).amax(dim=1).argmax())
    seen = (forbidden[row] & (relative[row] > ROUNDING)).nonzero().flatten()
    if not len(seen):
        return None
    severity, what, causes, action = WORDS[name]
    seeing = row if row in asked else next(iter(asked))
    distances = (seen - asked[seeing]).abs()
    number, nearest, share = int(forbidden[row].sum()), int(distances.min()), float(relative[row, seen].max())
    if name == "non_causal_attention" and len(seen) == nearest == 1:
        causes = ("the mask's diagonal is off by one: position i sees i+1", *causes)
    evidence = {"row": setting["rows"][seeing], "position": asked[seeing], "seen": len(seen), "of": number}
    evidence |= {"row_seen": setting["rows"][row], "nearest": nearest, "relative_gradient": share}
    evidence |= {"mode": setting["mode"], "attention_mask": setting["attention_mask"]}
    where = f"row {evidence['row_seen']}" if row != seeing else f"the nearest {nearest} away"
    found = f"position {asked[seeing]} of row {evidence['row']} sees {len(seen)} of {number} {what} ({where})"
    found += f", gradient up to {share:.1e} of the largest, in {setting['mode']} mode"
    return Finding(name, severity, setting["step"], setting["tokens"], found, "none", causes, action, evidence)


def check_movement(
    moved: torch.Tensor, watched: torch.Tensor, after: dict[int, int], setting: dict, exact: bool = False
) -> Results:
    """Logits that moved though no gradient flows. `exact`: in fp32 a thousandth of a deviation is no rounding, in half
    of the watched logits or at the same distance before the change in every row."""
    limit = UNPROVEN_FP32 if exact else UNPROVEN
    own = torch.zeros_like(watched)
    own[list(after)] = True
    results: Results = {}
    for name, part in (("non_causal_attention", watched & own), ("row_leak", watched & ~own)):
        size = float(moved[part].median()) if part.any() else 0.0
        if name == "non_causal_attention" and exact and size <= limit:
            size = same_distance(moved.where(part, 0.0), after)
        if size > limit:
            found = (
                f"logits moved by {size:.2g} deviations when tokens that they must not see changed, without gradient"
            )
            causes = ("statistics over positions or rows, computed without gradient", "masks made from later tokens")
            action, evidence = "change one token and look where the logits move", {"movement": size}
            where = (setting["step"], setting["tokens"])
            results[name] = Finding(name, "error", *where, found, "no movement", causes, action, evidence)
    return results


def same_distance(moved: torch.Tensor, after: dict[int, int]) -> float:
    """The smallest of the rows' largest movements, where all lie equally far before the change; else 0. A token that
    a rounding turned to another expert does so in one row, and anywhere."""
    rows = moved[list(after)]
    distances = {place - int(row.argmax()) for place, row in zip(after.values(), rows, strict=True)}
    return float(rows.amax(dim=1).min()) if len(after) > 1 and len(distances) == 1 else 0.0
