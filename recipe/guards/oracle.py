"""The forward pass of eight architectures in fp32, written down a second time: from a model's weights and config, with
plain torch operations and none of transformers' modules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from recipe.guards.guard import CannotJudge, NotApplicable
from recipe.internals import causal_class_of, is_compiled_module

ACTIVATIONS: dict[str, Callable] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Names:
    """Of weights. `norms`: before attention, after it, before the MLP, after it. `qkv`, `mlp`: linear layers; a gate
    comes first. `is_transposed`: matrices are `[in, out]`."""

    base: str = "model."
    embedding: str = "embed_tokens"
    layers: str = "layers"
    last_norm: str = "norm"
    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    is_transposed: bool = False


LLAMA = Names()
AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
GPT2 = Names(
    *("transformer.", "wte", "h", "ln_f", ("ln_1", None, "ln_2", None)),
    *(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc", "mlp.c_proj"), True),
)
GPT_NEOX = Names(
    *("gpt_neox.", "embed_in", "layers", "final_layer_norm", LLAMA.norms),
    *(("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
)
NAMES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **{"olmo2": replace(LLAMA, norms=AFTER), "gemma2": replace(LLAMA, norms=AROUND)},
    **{"gpt2": GPT2, "gpt_neox": GPT_NEOX},
}


@dataclass(frozen=True)
class Architecture:
    """What a config says. `scales`, `windows`: of each layer, a window in tokens, None where there is none. `rope`:
    its parameters, None for positions that are not rotated. `caps`: of attention scores and of logits."""

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    activation: str
    scales: tuple[float, ...]
    windows: tuple[int | None, ...]
    caps: tuple[float | None, float | None]
    rope: Mapping | None
    max_positions: int
    is_tied: bool
    is_parallel: bool
    embedding_scale: float = 1.0
    is_interleaved: bool = False  # neighbours are rotated together, as no transformers model of these does

    @property
    def names(self) -> Names:
        return NAMES[self.kind]

    @property
    def rotated(self) -> int:
        """Dimensions of a head. Only GPT-NeoX has a part by default; the scalings have one for all."""
        is_part = self.kind == "gpt_neox" or self.rope.get("rope_type", "default") != "default"
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0)) if is_part else self.head_dim

    @property
    def max_exact(self) -> int:
        """Tokens of a row. Dynamic scaling depends on rows before, from the configured length on."""
        is_dynamic = self.rope is not None and self.rope.get("rope_type") == "dynamic"
        return self.max_positions - is_dynamic


def read_architecture(model: torch.nn.Module) -> Architecture:
    """Of a model of transformers' own class, all parts of which are its own or torch's. Raises `NotApplicable`."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in NAMES:
        raise NotApplicable(f"no independent forward pass is written down for {kind or type(model).__name__}")
    if type(model) is not causal_class_of(config):
        raise NotApplicable(f"{type(model).__name__} is not transformers' own class for {kind}")
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("transformers.", "torch.")):
            raise NotApplicable(f"{name} is a {type(module).__name__}, which is not transformers' or torch's own")
        if name and "forward" in vars(module) and not is_compiled_module(module):
            raise NotApplicable(f"the forward method of {name} has been replaced")
    return _read_config(config, kind)


def _read_config(config, kind: str) -> Architecture:
    depth, num_heads = config.num_hidden_layers, config.num_attention_heads
    is_plain = kind in ("gpt2", "gpt_neox")  # one size of head, as many keys as queries, whatever else a config names
    head_dim = (not is_plain and getattr(config, "head_dim", None)) or config.hidden_size // num_heads
    scale = (config.query_pre_attn_scalar if kind == "gemma2" else head_dim) ** -0.5
    scales = [scale] * depth
    if kind == "gpt2":
        scales = [scale if config.scale_attn_weights else 1.0] * depth
        if config.scale_attn_by_inverse_layer_idx:
            scales = [each / number for number, each in enumerate(scales, 1)]
    types = getattr(config, "layer_types", None) if kind != "mistral" else None
    window = getattr(config, "sliding_window", None)
    found = Architecture(
        kind=kind,
        num_heads=num_heads,
        num_kv_heads=num_heads if is_plain else config.num_key_value_heads,
        head_dim=head_dim,
        eps=_first(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        activation=_first(config, "hidden_activation", "hidden_act", "activation_function"),
        scales=tuple(scales),
        windows=tuple(window if types is None or types[i] == "sliding_attention" else None for i in range(depth)),
        caps=(_first(config, "attn_logit_softcapping"), _first(config, "final_logit_softcapping")),
        rope=dict(rope) if (rope := _first(config, "rope_parameters")) else None,
        max_positions=config.max_position_embeddings,
        is_tied=config.tie_word_embeddings,
        is_parallel=getattr(config, "use_parallel_residual", False),
        embedding_scale=config.hidden_size**0.5 if kind == "gemma2" else 1.0,
    )
    _refuse(config, found)
    return found


def _first(config, *names: str):
    return next((getattr(config, name) for name in names if hasattr(config, name)), None)


def _refuse(config, found: Architecture) -> None:
    """Raises `NotApplicable` for what is not written down here."""
    if found.activation not in ACTIVATIONS:
        raise NotApplicable(f"the activation {found.activation} is not written down")
    if found.rope is not None and found.rope.get("rope_type", "default") not in ROPE_TYPES:
        raise NotApplicable(f"the rotary scaling {found.rope.get('rope_type')} is not written down")
    if found.kind != "gpt2" and "rope_theta" not in (found.rope or {}):
        raise NotApplicable("the config names no rope_theta")
    for name in ("add_cross_attention", "use_bidirectional_attention"):
        if getattr(config, name, False):
            raise NotApplicable(f"{name} is on")


# --- positions


def frequencies(found: Architecture) -> tuple[torch.Tensor, float]:
    """Radians a token of each rotated pair, `[rotated / 2]`, and the factor of cosine and sine.

    linear: Chen et al. 2023 (arXiv 2306.15595); dynamic: NTK-aware scaling, which leaves positions up to the
    configured length alone; llama3: the Llama 3.1 release; yarn: Peng et al. 2023 (arXiv 2309.00071)."""
    rope, dim, kind = found.rope, found.rotated, found.rope.get("rope_type", "default")
    inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "linear":
        return inverse / rope["factor"], 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 for fast pairs, 0 for slow ones
        return inverse * (kept + (1 - kept) / rope["factor"]), 1.0
    return _yarn(rope, inverse, dim, found.max_positions) if kind == "yarn" else (inverse, 1.0)


def _yarn(rope: Mapping, inverse: torch.Tensor, dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    length = rope["original_max_position_embeddings"]
    factor = rope["factor"] or max_positions / length

    def pair_with(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    def attention(scale: float, size: float = 1.0) -> float:
        return 0.1 * size * math.log(scale) + 1.0 if scale > 1 else 1.0

    low, high = pair_with(rope.get("beta_fast") or 32), pair_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slow = ((torch.arange(dim // 2) - low) / (high - low or 0.001)).clamp(0, 1)
    sizes = rope.get("mscale"), rope.get("mscale_all_dim")
    cosine = attention(factor, sizes[0]) / attention(factor, sizes[1]) if all(sizes) else attention(factor)
    given = rope.get("attention_factor")
    return inverse * (1 - slow + slow / factor), cosine if given is None else given


# --- the forward pass


class Oracle:
    """`weights`: a state_dict. `rounding`: relative size of noise at the places where a lower precision rounds, 0 for
    the exact forward pass; the noise is the same each time."""

    def __init__(self, found: Architecture, weights: Mapping[str, torch.Tensor], rounding: float = 0.0):
        self.found, self.names, self.weights, self.rounding = found, found.names, weights, rounding
        self.device = next(iter(weights.values())).device
        self.generator = torch.Generator(self.device).manual_seed(0)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, positions: torch.Tensor, is_key: torch.Tensor) -> torch.Tensor:
        """`[positions, vocabulary]` of one row. All arguments `[positions]`; `is_key`: what may be attended to."""
        found, names = self.found, self.names
        with torch.autocast(self.device.type, enabled=False):
            x = self._weight(f"{names.base}{names.embedding}.weight")[ids] * found.embedding_scale
            if found.kind == "gpt2":
                x = x + self._weight(f"{names.base}wpe.weight")[positions]
            turn = self._turn(positions) if found.rope else None
            x = self._noisy(x)
            for layer in range(len(found.windows)):
                x = self._block(x, layer, turn, is_key)
            x = self._norm(x, f"{names.base}{names.last_norm}")
            head = f"{names.base}{names.embedding}" if found.is_tied else "lm_head"
            logits = self._noisy(self._noisy(x) @ self._weight(f"{head}.weight").T)
            return _capped(logits, found.caps[1])

    def _block(self, x: torch.Tensor, layer: int, turn, is_key: torch.Tensor) -> torch.Tensor:
        path = f"{self.names.base}{self.names.layers}.{layer}."
        before, after, before_mlp, after_mlp = (name and path + name for name in self.names.norms)
        attended = self._norm(self._attend(self._norm(x, before), path, layer, turn, is_key), after)
        middle = self._noisy(x + attended)
        given = x if self.found.is_parallel else middle
        return self._noisy(middle + self._norm(self._mlp(self._norm(given, before_mlp), path), after_mlp))

    def _attend(self, x: torch.Tensor, path: str, layer: int, turn, is_key: torch.Tensor) -> torch.Tensor:
        found = self.found
        q, k, v = (part.transpose(0, 1) for part in self._heads(x, path))  # [heads, positions, head_dim]
        if turn is not None:
            q, k = self._noisy(self._rotate(q, *turn)), self._noisy(self._rotate(k, *turn))
        k, v = (part.repeat_interleave(found.num_heads // found.num_kv_heads, dim=0) for part in (k, v))
        scores = _capped(self._noisy(q @ k.transpose(1, 2) * found.scales[layer]), found.caps[0])
        place = torch.arange(len(x), device=x.device)
        distance, window = place[:, None] - place, found.windows[layer]
        is_visible = (distance >= 0) & is_key
        if window is not None:
            is_visible &= distance < window
        shares = self._noisy(scores.masked_fill(~is_visible, torch.finfo(scores.dtype).min).softmax(dim=-1))
        return self._linear((shares @ v).transpose(0, 1).flatten(1), path + self.names.out)

    def _heads(self, x: torch.Tensor, path: str) -> list[torch.Tensor]:
        """Queries, keys and values, each `[positions, heads, head_dim]`."""
        found, norms = self.found, (path + "self_attn.q_norm", path + "self_attn.k_norm", None)
        parts = [self._linear(x, path + name) for name in self.names.qkv]
        if found.kind == "gpt_neox":  # by head, then query, key, value
            return list(parts[0].unflatten(-1, (found.num_heads, 3, found.head_dim)).unbind(-2))
        if found.kind == "gpt2":
            parts = parts[0].chunk(3, dim=-1)
        if found.kind == "olmo2":  # over all heads
            parts = [self._norm(part, norm) for part, norm in zip(parts, norms, strict=True)]
        heads = [part.unflatten(-1, (-1, found.head_dim)) for part in parts]
        if found.kind == "qwen3":  # each head by itself
            heads = [self._norm(part, norm) for part, norm in zip(heads, norms, strict=True)]
        return heads

    def _mlp(self, x: torch.Tensor, path: str) -> torch.Tensor:
        *inner, down = (path + name for name in self.names.mlp)
        hidden = ACTIVATIONS[self.found.activation](self._linear(x, inner[0]))
        return self._linear(hidden * self._linear(x, inner[1]) if len(inner) > 1 else hidden, down)

    # --- parts

    def _turn(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse, factor = frequencies(self.found)
        angles = positions[:, None].float() * inverse.to(self.device)
        return angles.cos() * factor, angles.sin() * factor

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., : self.found.rotated], x[..., self.found.rotated :]
        # The order of the result is that of queries and of keys, whose product does not depend on it.
        pairs = (part[..., ::2], part[..., 1::2]) if self.found.is_interleaved else part.chunk(2, dim=-1)
        first, second = pairs
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def _norm(self, x: torch.Tensor, name: str | None) -> torch.Tensor:
        if name is None:
            return x
        weight, bias = self._weight(f"{name}.weight"), self.weights.get(f"{name}.bias")
        if self.found.kind in ("gpt2", "gpt_neox"):
            return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.float(), self.found.eps)
        scale = 1 + weight if self.found.kind == "gemma2" else weight
        return x * (x.square().mean(dim=-1, keepdim=True) + self.found.eps).rsqrt() * scale

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self._weight(f"{name}.weight"), self.weights.get(f"{name}.bias")
        y = self._noisy(x) @ (weight if self.names.is_transposed else weight.T)
        return self._noisy(y if bias is None else y + bias.float())

    def _weight(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise CannotJudge(f"the model has no weight {name}: parametrized, or named otherwise")
        return self.weights[name].float()

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rounding:
            return x
        noise = torch.rand(x.shape, generator=self.generator, device=x.device).mul_(2).sub_(1)
        return x * noise.mul_(self.rounding).add_(1)


def _capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else (x / cap).tanh() * cap
