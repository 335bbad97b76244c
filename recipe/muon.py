"""Muon for hidden matrices, AdamW for all else, in one optimizer: `"optim": "muon"`.

    trainer = Trainer(model, args, ...)
    trainer.optimizer = make_muon(model, trainer)  # with the settings of `args`

Keller Jordan's post (kellerjordan.github.io/posts/muon) and torch.optim.Muon define the update; Moonlight (arXiv
2502.16982) scales it by 0.2 sqrt(max(rows, columns)), so that its elements are as large as AdamW's and one learning
rate serves both. torch's own iterates in bf16 on every device, which most CPUs emulate, and matrix by matrix. The rate
of embeddings and head may be a multiple of it: `"optim_args": "embedding_lr_ratio=2"`.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import Embedding, Module, Parameter
from torch.optim import Optimizer
from torch.optim.adamw import adamw

if TYPE_CHECKING:  # a second of start-up, for which `plan` has no use
    from transformers import Trainer

from recipe.conflicts import embedding_lr_ratio
from recipe.errors import UserError
from recipe.internals import has_fast_bf16_cpu

MOMENTUM, STEPS, EPSILON = 0.95, 5, 1e-7  # torch's defaults, as are the coefficients
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates, Moonlight's section 2.2
WIDE = 1.5  # columns of a row from which iterating on x x^T takes fewer FLOPs, see `_iterate_gram`
AT_ONCE = 16  # matrices of one shape, on each rank. Chosen: bounds the copies that a step makes


class Muon(Optimizer):
    """Groups with `momentum` are updated by Muon, groups with `betas` by torch's fused AdamW.

    `world_size` above 1: each rank orthogonalizes its share of the matrices and gathers the others' (all ranks must
    hold the same gradients, as under DDP). State: `momentum_buffer`, or `exp_avg`, `exp_avg_sq` and `step`, as torch
    names them. The step does nothing where the attribute `found_inf`, a tensor on the device, is 1.
    """

    _step_supports_amp_scaling = True  # as torch's fused optimizers: reads `found_inf` and `grad_scale`

    def __init__(self, groups: list[dict], lr: float, world_size: int = 1):
        self._world_size = world_size
        super().__init__(groups, {"lr": lr})
        if not all({"momentum", "betas"} & group.keys() for group in self.param_groups):
            raise ValueError(
                "Muon is given groups that say what Muon and what AdamW trains: make it by "
                "recipe.muon.make_muon(model, trainer), or the groups by group_parameters"
            )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and "momentum" in group:
                for same in _equal_shapes(parameters, AT_ONCE * self._world_size):
                    self._step_matrices(group, same)
            elif parameters:
                self._step_others(group, parameters)
        return loss

    def _step_matrices(self, group: dict, same: Sequence[Parameter]) -> None:
        gradients, is_applied = torch.stack([p.grad for p in same]), 1.0
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradients /= scale
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            gradients = torch.where(found_inf > 0, 0.0, gradients)
            is_applied = 1 - found_inf
        buffers = [self._buffer(p) for p in same]
        momentum = torch.stack(buffers)
        momentum.lerp_(gradients, (1 - group["momentum"]) * is_applied)
        for buffer, new in zip(buffers, momentum, strict=True):
            buffer.copy_(new)
        updates = self._orthogonalize(gradients.lerp_(momentum, group["momentum"]))
        updates *= is_applied * -group["lr"] * RMS * max(same[0].shape) ** 0.5
        for parameter, update in zip(same, updates, strict=True):
            parameter.mul_(1 - is_applied * group["lr"] * group["weight_decay"]).add_(update)

    def _buffer(self, parameter: Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _orthogonalize(self, matrices: torch.Tensor) -> torch.Tensor:
        """On several ranks each does its share. All get the same bits, whoever computed them."""
        if self._world_size == 1:
            return orthogonalize(matrices)
        share = -(-len(matrices) // self._world_size)
        first = torch.distributed.get_rank() * share
        own = torch.zeros(share, *matrices.shape[1:], dtype=matrices.dtype, device=matrices.device)
        if len(mine := matrices[first : first + share]):
            own[: len(mine)] = orthogonalize(mine)
        parts = [torch.empty_like(own) for _ in range(self._world_size)]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts)[: len(matrices)]

    def _step_others(self, group: dict, parameters: Sequence[Parameter]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        names = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([self.state[p][name] for p in parameters] for name in names)
        (beta1, beta2), scaling = group["betas"], ("grad_scale", "found_inf")
        adamw(
            parameters,
            [p.grad for p in parameters],
            averages,
            squares,
            [],
            steps,
            fused=True,
            **{name: getattr(self, name, None) for name in scaling},
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix of each, roughly: Newton-Schulz brings singular values to 0.7 to 1.2.

    `matrices`: float `[count, rows, columns]`, of any scale. `dtype`: of the iteration; None: that in which the device
    is fast. Returns float32.
    """
    dtype = dtype or fast_dtype(matrices.device)
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp_min(EPSILON)
    x = (x.mT if is_tall else x).to(dtype).contiguous()
    is_wide = x.shape[2] > WIDE * x.shape[1] and dtype in (torch.float32, torch.float64)
    x = _iterate_gram(x) if is_wide else _iterate(x)
    return (x.mT if is_tall else x).float()


def _iterate(x: torch.Tensor) -> torch.Tensor:
    """x <- a x + (b G + c G^2) x with G = x x^T: 20 m^2 n + 10 m^3 FLOPs of an m x n matrix."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: torch.Tensor) -> torch.Tensor:
    """The same, of G alone: with P = a + b G + c G^2 the next G is P G P, and at the end x is multiplied by all P at
    once: 4 m^2 n + 34 m^3 FLOPs. Rounding of G grows 12-fold in each iteration: of bf16 nothing would be left."""
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for step in range(STEPS):
        rest = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a
        if product is None:
            product = rest.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, rest, product, beta=a)
        if step < STEPS - 1:
            gram = torch.baddbmm(gram, rest, gram, beta=a)
            gram = torch.baddbmm(gram, gram, rest, beta=a)
    return product @ x


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device has units for it; elsewhere it is emulated, and fp32 is faster."""
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = device.type == "cpu" and has_fast_bf16_cpu()
    return torch.bfloat16 if has_units else torch.float32


def _equal_shapes(parameters: Sequence[Parameter], at_most: int) -> Iterator[list[Parameter]]:
    by_shape = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    for same in by_shape.values():
        for start in range(0, len(same), at_most):
            yield same[start : start + at_most]


# --- which parameters


def is_hidden_matrix(parameter: Parameter, others: Collection[int]) -> bool:
    """`others`: ids of the parameters of `outer_parameters`."""
    return parameter.dim() == 2 and min(parameter.shape) > 1 and id(parameter) not in others


def outer_parameters(model: Module) -> set[int]:
    """Ids of the parameters of embeddings and head: their rows are tokens, which Muon's update does not suit."""
    head = model.get_output_embeddings()
    modules = [module for module in model.modules() if isinstance(module, Embedding)] + [head] * (head is not None)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def group_parameters(
    model: Module,
    decayed: Collection[str],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    embedding_lr: float | None = None,
) -> list[dict]:
    """Groups for `Muon`: hidden matrices, embeddings and head, other weights; each with decay and without. `decayed`:
    names, of Trainer's `get_decay_parameter_names`. `embedding_lr`: of embeddings and head; None: the optimizer's.
    Raises `UserError` for models without hidden matrices and for adapters."""
    if getattr(model, "peft_config", None):
        raise UserError("optim muon: an adapter's matrices are factors of an update; use adamw_torch_fused")
    outer = outer_parameters(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if name in decayed and is_hidden_matrix(p, outer)]
    if not matrices:
        raise UserError(f"optim muon: {type(model).__name__} has no hidden matrix to train; use adamw_torch_fused")
    taken = {id(p) for p in matrices}
    adam = {"betas": betas, "eps": eps, "fused": True}
    groups = [{"params": matrices, "weight_decay": weight_decay, "momentum": MOMENTUM}]
    rest = [(p, (id(p) in outer, name in decayed)) for name, p in named if id(p) not in taken]
    for kind in itertools.product((True, False), repeat=2):
        is_outer, is_decayed = kind
        rate = {"lr": embedding_lr} if is_outer and embedding_lr is not None else {}
        if others := [p for p, its_kind in rest if its_kind == kind]:
            groups.append({"params": others, "weight_decay": weight_decay * is_decayed, **adam, **rate})
    return groups


def make_muon(model: Module, trainer: "Trainer") -> Muon:
    """With the settings of the trainer's arguments."""
    args, decayed = trainer.args, trainer.get_decay_parameter_names(model)
    groups = group_parameters(
        model,
        decayed,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        embedding_lr=args.learning_rate * embedding_lr_ratio(args.optim_args),
    )
    return Muon(groups, lr=args.learning_rate, world_size=args.world_size)
