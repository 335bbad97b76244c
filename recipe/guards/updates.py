"""Do the parameters follow the optimizer: covered by it, reached by a gradient, moved, kept by their precision, tied,
equal over ranks, and the same after a resume.

Measurements stay on the device, in few small tensors, so that the caller can copy them without waiting:

    before = sample_parameters(parameters)                 # on_pre_optimizer_step
    gradients = largest_gradients(parameters)
    moved = have_moved(before, sample_parameters(parameters))  # after the step
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recipe.guards.finding import CannotJudge, Finding
from recipe.guards.thresholds import (
    FROZEN_SHARE,
    FROZEN_STEPS,
    LOST_ELEMENTS,
    LOST_SHARE,
    LOST_SPACINGS,
    LOST_STEPS,
    MOVING_ELEMENTS,
    MOVING_RATE,
    PER_TENSOR,
    PLAIN_GRADIENT,
    RESUME_TOLERANCE,
    SMALL_SHARE,
    SMALL_UPDATE,
    STOPPED_STEPS,
    UNDONE_SHARE,
)

Parameters = list[tuple[str, torch.nn.Parameter]]

LOW_PRECISION = (torch.bfloat16, torch.float16)


# --- measuring


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, so that measuring never waits for another rank."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to PER_TENSOR strided elements, not copied."""
    values = _local(tensor).flatten()
    stride = -(-values.numel() // PER_TENSOR) | 1  # odd: does not fall on one column of a matrix again and again
    return values[::stride]


def _stack(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.to(values[0].device, non_blocking=True) for value in values])


def sample_parameters(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Up to PER_TENSOR strided elements of each parameter, copied, on its device."""
    return {name: sample(parameter).clone() for name, parameter in parameters}


def sample_gradients(parameters: Parameters) -> dict[str, torch.Tensor]:
    """The gradients of the elements in `sample_parameters`; parameters without one are missing."""
    return {name: sample(parameter.grad).clone() for name, parameter in parameters if parameter.grad is not None}


def largest_gradients(parameters: Parameters) -> torch.Tensor:
    """The largest absolute gradient of each parameter's sampled elements; 0 only if no element at all has one.

    Where the sampled ones have none (an embedding of which they are rows not seen) it is that of all elements, cut to
    PLAIN_GRADIENT: reached, but the sample need not move. Over steps and over ranks with shards, take the maximum.
    """
    sampled = _stack([_largest(parameter, sample) for _, parameter in parameters])
    anywhere = _stack([_largest(parameter, _local) for _, parameter in parameters])
    return torch.where(sampled > 0, sampled, anywhere.clamp(max=PLAIN_GRADIENT))


def _largest(parameter: torch.nn.Parameter, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if parameter.grad is None or part(parameter.grad).numel() == 0:
        return torch.zeros((), device=parameter.device)
    return torch.linalg.vector_norm(part(parameter.grad), math.inf, dtype=torch.float32)


def norm_of_gradients(parameters: Parameters) -> torch.Tensor:
    """A float32 scalar, over all parameters."""
    return torch.nn.utils.get_total_norm([p.grad for _, p in parameters if p.grad is not None]).float()


def have_moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    """Whether any sampled element of each parameter differs."""
    return _stack([(after[name] != before[name]).any() for name in before])


def count_kept(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], parameters: Parameters
) -> torch.Tensor:
    """`[kept, moved]` elements: those that a step moved, from `before` to `after`, and of these the ones that are now
    at least half as far from `before`."""
    counts = []
    for name, parameter in parameters:
        step, since = (after[name] - before[name]).abs(), (sample(parameter) - before[name]).abs()
        counts.append(torch.stack([((step > 0) & (2 * since >= step)).sum(), (step > 0).sum()]))
    return _stack(counts).sum(0)


def count_small(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    gradients: dict[str, torch.Tensor],
    rates: dict[str, float | None],
) -> torch.Tensor:
    """`[small, judged]` elements: those with a gradient, and of these the ones that a step did not move against it by
    SMALL_UPDATE of their learning rate. `rates`: by parameter; 0 and None (on a device) are not judged."""
    counts = [torch.zeros(2, dtype=torch.int64, device=next(iter(before.values())).device)]
    for name, gradient in gradients.items():
        if not (rate := rates[name]):
            continue
        judged = gradient != 0
        against = (before[name] - after[name]) * gradient.sign()
        small = judged & (against < SMALL_UPDATE * rate)
        counts.append(torch.stack([small.sum(), judged.sum()]))
    return _stack(counts).sum(0)


def count_moved(
    before: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], parameters: Parameters, rate_sum: float
) -> torch.Tensor:
    """`[moved, judged]` elements in low precision, after LOST_STEPS steps since `before`.

    Judged are elements with a gradient that `rate_sum` (the learning rates of these steps, added) should have moved,
    by an optimizer whose steps are of the size of its rate (Adam and its kin, Lion, Adafactor; not SGD).
    """
    counts = [torch.zeros(2, dtype=torch.int64, device=parameters[0][1].device)]
    for name, parameter in parameters:
        if parameter.dtype in LOW_PRECISION and name in gradients:
            old = before[name]
            judged = (gradients[name] != 0) & (_spacing(old) * LOST_SPACINGS <= rate_sum)
            counts.append(torch.stack([(judged & (sample(parameter) != old)).sum(), judged.sum()]))
    return _stack(counts).sum(0)


def _spacing(values: torch.Tensor) -> torch.Tensor:
    """The distance to the next number in the values' dtype. Too large for zeros: they move in any precision."""
    _, exponent = torch.frexp(values.float())
    return torch.ldexp(torch.full_like(values, torch.finfo(values.dtype).eps, dtype=torch.float32), exponent - 1)


def parameter_checksums(model: torch.nn.Module) -> torch.Tensor:
    """An int64 per parameter: its bit patterns, added with wrap-around. Exact, and the same in any order."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    if any(_is_partial(parameter) for parameter in parameters):
        raise CannotJudge("the parameters are sharded, so ranks hold different parts")
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return _stack([p.view(integers[p.element_size()]).sum(dtype=torch.int64) for p in parameters])


def _is_partial(parameter: torch.Tensor) -> bool:
    """Sharded (FSDP2, tensor parallel), without memory, or emptied by DeepSpeed's ZeRO 3."""
    return isinstance(parameter, DTensor) or parameter.is_meta or parameter.numel() == 0


def count_optimizer_steps(optimizer) -> int | None:
    """The steps that the optimizer itself has counted, as Adam does; None where it counts none."""
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    return int(counts[0]) if counts else None


def count_optimizer_states(optimizer) -> int:
    """Parameters for which the optimizer keeps a state (plain SGD keeps none)."""
    return sum(bool(state) for state in optimizer.state.values())


# --- covered, reached, moved


def check_optimizer_groups(
    step: int, tokens_seen: int, parameters: Parameters, optimizer: torch.optim.Optimizer, is_new_model: bool
) -> Finding | None:
    """Before step 1: every parameter that wants a gradient is in a parameter group, and few of a new model do not.

    `parameters`: of the model as the optimizer got it. Raises `CannotJudge` where an optimizer that is not torch's
    holds none of them: it may keep copies, and `check_frozen` sees whether those come back.
    """
    in_groups = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    held, twice = set(in_groups), {each for each, count in Counter(in_groups).items() if count > 1}
    training = [(name, p) for name, p in parameters if p.requires_grad]
    missing = [name for name, p in training if id(p) not in held]
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if missing and len(missing) == len(training) and not type(inner).__module__.startswith("torch.optim"):
        raise CannotJudge(f"{type(inner).__name__} holds none of the model's parameters itself, perhaps copies")
    if missing:
        found = f"{len(missing)} of {len(training)} trainable parameters in no optimizer group ({_first(missing)})"
        expected = "every parameter with requires_grad in one"
        causes = (
            "the optimizer was built before the model was wrapped, cast or resized",
            "parameter groups were chosen by name and miss some",
        )
        action = "build the optimizer from the final model, or set requires_grad to False"
        evidence = {"missing": missing[:20], "num_missing": len(missing), "num_trainable": len(training)}
        return Finding("frozen_parameters", "error", step, tokens_seen, found, expected, causes, action, evidence)
    if names := [name for name, p in parameters if id(p) in twice]:
        found = f"parameters that are in the optimizer more than once: {len(names)} ({_first(names)})"
        causes = ("a shared weight was given to the optimizer once for each module that holds it",)
        action, evidence = "give each parameter once, as model.parameters() does", {"names": names[:20]}
        expected = "once: each time it is there it is updated"
        return Finding("learning_rate_off", "error", step, tokens_seen, found, expected, causes, action, evidence)
    return _check_frozen_on_purpose(step, tokens_seen, parameters, is_new_model)


def _check_frozen_on_purpose(step, tokens_seen, parameters: Parameters, is_new_model: bool) -> Finding | None:
    frozen = [name for name, p in parameters if not p.requires_grad]
    total = sum(p.numel() for _, p in parameters)
    share = sum(p.numel() for _, p in parameters if not p.requires_grad) / max(1, total)
    if not frozen:
        return None
    is_odd = is_new_model and share > FROZEN_SHARE
    severity = "warning" if is_odd else "info"
    found = f"{share:.1%} of the parameters with requires_grad False ({_first(frozen)})"
    expected = "most of a new model trains" if is_odd else "so, if it is on purpose"
    causes = ("frozen on purpose (adapters, fixed positions)", "frozen by an earlier script")
    action = "parameter.requires_grad_(True) for what shall train"
    evidence = {"share": share, "frozen": frozen[:20], "num_frozen": len(frozen)}
    return Finding("frozen_parameters", severity, step, tokens_seen, found, expected, causes, action, evidence)


def check_frozen(
    step: int, tokens_seen: int, parameters: Parameters, largest: list[float], moved: list[bool], rates: list[float]
) -> Finding | None:
    """Over the first steps: every parameter that wants a gradient is reached by one, and moves.

    `largest`: of `largest_gradients` over the steps watched, `moved`: whether each parameter moved in any of them.
    `rates`: the learning rate of each step, 0 where the loss scaler skipped it. Silent until FROZEN_STEPS steps had a
    rate that moves a float32 weight.
    """
    if sum(rate > MOVING_RATE for rate in rates) < FROZEN_STEPS:
        return None
    rows = [(name, p, *row) for (name, p), *row in zip(parameters, largest, moved, strict=True) if p.requires_grad]
    still = [n for n, p, top, has_moved in rows if top > PLAIN_GRADIENT and not has_moved and _should_move(p)]
    if still:
        found = f"{len(still)} of {len(rows)} parameters have a gradient and do not move ({_first(still)})"
        causes = ("the optimizer holds other tensors than the model", "their group has a learning rate of 0")
        return _frozen_finding("error", step, tokens_seen, found, "every one moves", causes, still)
    unreached = [name for name, _, top, has_moved in rows if top == 0.0 and not has_moved]
    idle = [name for name in unreached if _is_idle_expert(name, unreached, parameters)]
    cut = [name for name in unreached if name not in idle]
    if not unreached:
        return None
    found = f"{len(cut or idle)} of {len(rows)} parameters without gradient in {len(rates)} steps"
    causes = ("the forward pass does not use them", "detach() or no_grad() on their path to the loss")
    if cut:
        return _frozen_finding("warning", step, tokens_seen, f"{found} ({_first(cut)})", "none", causes, cut)
    causes = ("experts to which no token was routed",)
    return _frozen_finding("info", step, tokens_seen, f"{found} ({_first(idle)})", "few, in passing", causes, idle)


def check_undone(step: int, tokens_seen: int, kept: int, moved: int) -> Finding | None:
    """Of the elements that the first steps moved, `kept` were not put back before the next step."""
    if moved == 0 or kept >= UNDONE_SHARE * moved:
        return None
    return Finding(
        "lost_updates",
        "info",  # weights that are masked or projected after each step are so on purpose
        step,
        tokens_seen,
        found=f"{1 - kept / moved:.0%} of the elements that a step moved were put back before the next step",
        expected="none",
        likely_causes=("weights are rounded or reset after each step", "another copy of the weights is written back"),
        action="look for what writes to the parameters outside of the optimizer",
        evidence={"kept": kept, "moved": moved},
    )


def check_small_updates(step: int, tokens_seen: int, small: int, judged: int) -> Finding | None:
    """In the first steps of a new run Adam moves a weight by about its learning rate: of `judged` elements `small`
    were not moved against their gradient by SMALL_UPDATE of it."""
    if small <= SMALL_SHARE * judged:
        return None
    return Finding(
        "lost_updates",
        "warning",
        step,
        tokens_seen,
        found=f"{small / judged:.0%} of the elements did not move against their gradient by {SMALL_UPDATE:.0%} of the "
        "learning rate",
        expected=f"under {SMALL_SHARE:.0%}: Adam's first steps are of that rate's size",
        likely_causes=("Adam's epsilon is larger than the gradients", "weights are rounded or written over"),
        action="compare the size of the gradients with adam_epsilon; look for what writes to the weights",
        evidence={"small": small, "judged": judged},
    )


def check_stopped(step: int, tokens_seen: int, parameters: Parameters, stopped: list[str]) -> Finding:
    """`stopped`: parameters that had a gradient before and have had none for STOPPED_STEPS steps."""
    idle = [name for name in stopped if _is_idle_expert(name, stopped, parameters)]
    cut = [name for name in stopped if name not in idle]
    found = f"{len(cut or idle)} of {len(parameters)} parameters trained before, without gradient for {STOPPED_STEPS}"
    found += f" steps ({_first(cut or idle)})"
    if not cut:
        causes = ("experts to which no token is routed any more",)
        return _frozen_finding("info", step, tokens_seen, found, "few, in passing", causes, idle)
    causes = ("requires_grad was set to False", "the forward pass no longer uses them")
    share = sum(p.numel() for name, p in parameters if name in cut) / sum(p.numel() for _, p in parameters)
    severity = "warning" if share > FROZEN_SHARE else "info"  # a few may be frozen on purpose
    return _frozen_finding(severity, step, tokens_seen, found, "so, if it is on purpose", causes, cut)


def _should_move(parameter: torch.Tensor) -> bool:
    """In low precision it may be a lost update, and few elements may all sit still under small gradients."""
    return parameter.dtype not in LOW_PRECISION and parameter.numel() >= MOVING_ELEMENTS


def _is_idle_expert(name: str, unreached: list[str], parameters: Parameters) -> bool:
    """One of a list inside a layer (`layers.0.experts.3.w1`), of which others of the same shape were reached.

    A list at the top is the layers themselves: one of them without gradient is a fault.
    """
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
    if len(numbers) < 2:
        return False
    begin, end = name[: numbers[-1].start()], name[numbers[-1].end() :]
    sibling = re.compile(re.escape(begin) + r"\d+" + re.escape(end))
    shapes = {other: p.shape for other, p in parameters if sibling.fullmatch(other)}
    return any(other not in unreached and shape == shapes[name] for other, shape in shapes.items())


def _frozen_finding(severity, step, tokens_seen, found, expected, causes, names) -> Finding:
    action = "follow the first of them from the forward pass to optimizer.param_groups"
    evidence = {"names": names[:20], "count": len(names)}
    return Finding("frozen_parameters", severity, step, tokens_seen, found, expected, causes, action, evidence)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_lost_updates(step: int, tokens_seen: int, moved: int, judged: int, learning_rate: float) -> Finding | None:
    """`moved` of the `judged` elements of `count_moved`: most elements in low precision follow the optimizer.

    Silent where too few can be judged: float32 weights, and learning rates as small as in a warmup.
    """
    if judged < LOST_ELEMENTS or moved >= LOST_SHARE * judged:
        return None
    found = f"{moved / judged:.0%} of the sampled low-precision weights moved in {LOST_STEPS} steps"
    expected = f"more than {LOST_SHARE:.0%} of those that the learning rate should move"
    causes = (
        "weights in bf16 or fp16 without an fp32 copy: updates are rounded away",
        "the optimizer holds other tensors than the model",
    )
    action = (
        "load the model in float32 and train with bf16=True (autocast), or use an optimizer with Kahan "
        "summation or stochastic rounding"
    )
    evidence = {"moved": moved, "judged": judged, "learning_rate": learning_rate, "steps": LOST_STEPS}
    return Finding("lost_updates", "warning", step, tokens_seen, found, expected, causes, action, evidence)


# --- tied, equal over ranks, the same after a resume


def check_tied(step: int, tokens_seen: int, model: PreTrainedModel) -> Finding | None:
    """Where the config ties them, the input and output embedding are one memory."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise CannotJudge("the model has no config of transformers that says whether to tie them")
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise CannotJudge("the model has no output embedding with a weight")
    embedding, output = model.get_input_embeddings().weight, head.weight
    if _is_partial(embedding) or _is_partial(output):
        raise CannotJudge("the embeddings are sharded or have no memory")
    if embedding.shape != output.shape:
        raise CannotJudge(f"the embedding is {tuple(embedding.shape)} and the head {tuple(output.shape)}")
    if embedding.data_ptr() == output.data_ptr():
        return None
    is_equal = torch.equal(embedding, output.to(embedding))
    found = f"embedding and head are two tensors, {'equal so far' if is_equal else 'with different values'}"
    expected = "one, since tie_word_embeddings is true"
    causes = (
        "the model was moved or emptied after tying (to_empty, a wrapper)",
        "a checkpoint without the head was loaded",
        "an adapter keeps a copy of each",
    )
    action = "model.tie_weights() before the optimizer is built, or tie_word_embeddings false"
    evidence = {"shape": list(embedding.shape), "is_equal": is_equal}
    return Finding("untied_weights", "warning", step, tokens_seen, found, expected, causes, action, evidence)


def check_ranks(step: int, tokens_seen: int, names: list[str], checksums: list[list[int]]) -> Finding | None:
    """`checksums`: those of `parameter_checksums`, one list per rank, gathered at the same step."""
    differing = [name for name, sums in zip(names, zip(*checksums, strict=True), strict=True) if len(set(sums)) > 1]
    if not differing:
        return None
    (usual, _), *_ = Counter(map(tuple, checksums)).most_common(1)
    odd = [rank for rank, sums in enumerate(checksums) if tuple(sums) != usual]
    found = f"{len(differing)} of {len(names)} parameters differ between ranks ({_first(differing)})"
    expected = f"equal bits on all {len(checksums)} ranks"
    causes = (
        "a different initialisation or checkpoint on a rank",
        "gradients clipped or changed before they were averaged",
        "an optimizer step taken on some ranks only",
    )
    action = "compare the first of them over ranks before step 1; broadcast the model from rank 0"
    evidence = {"differing": differing[:20], "num_differing": len(differing), "odd_ranks": odd}
    return Finding("rank_divergence", "error", step, tokens_seen, found, expected, causes, action, evidence)


def check_resume(
    step: int,
    tokens_seen: int,
    loss_before: float | None,
    loss_after: float | None,
    dtype: torch.dtype,
    states_before: int | None,
    states_after: int | None,
    steps_before: int | None = None,
    steps_after: int | None = None,
) -> Finding | None:
    """After loading a checkpoint, before the next step: the model and the optimizer are those that were saved.

    The losses are of one pinned batch in eval mode, at `dtype` (autocast's, if on). `states_*`: from
    `count_optimizer_states`, `steps_*` from `count_optimizer_steps`. What is None was not kept and is not judged.
    """
    evidence = {"loss_before": loss_before, "loss_after": loss_after}
    evidence |= {"states_before": states_before, "states_after": states_after}
    if loss_before is not None and loss_after is not None and math.isfinite(loss_before):
        tolerance = RESUME_TOLERANCE[dtype]
        if not abs(loss_after - loss_before) <= tolerance:  # a NaN is a jump
            found = f"loss of the pinned batch {loss_after:.4f}, {loss_after - loss_before:+.4f}"
            expected = f"{loss_before:.4f} as when it was saved, within {tolerance}"
            causes = ("weights are missing in the checkpoint or were not loaded", "weights untied on load")
            return _resume_finding("error", step, tokens_seen, found, expected, causes, evidence)
    if steps_before is not None and steps_after is not None and steps_after != steps_before and states_after:
        found, expected = f"an optimizer that has counted {steps_after} steps", f"{steps_before}, as when it was saved"
        causes = ("the optimizer's step count was not saved or not loaded: Adam corrects its averages by it",)
        return _resume_finding("warning", step, tokens_seen, found, expected, causes, evidence)
    if states_before is None or states_after is None or states_after >= states_before:
        return None
    found = f"optimizer state for {states_after} parameters"
    expected = f"{states_before}, as when it was saved"
    causes = ("optimizer.pt or scheduler.pt is missing: Trainer then starts both anew and says nothing",)
    return _resume_finding("warning", step, tokens_seen, found, expected, causes, evidence)


def _resume_finding(severity, step, tokens_seen, found, expected, causes, evidence) -> Finding:
    action = "resume from a complete checkpoint"
    return Finding("resume_jump", severity, step, tokens_seen, found, expected, causes, action, evidence)
