"""The JSON of a new model: what can be said of it without torch and transformers, which take seconds to import."""

import difflib
import math
from types import NoneType
from typing import Any

from recipe import config_checks as checks
from recipe.keys import Key, model_keys

COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
ROPE = ("rope_type", "rope_theta", "partial_rotary_factor")
SHARES = ("initializer_range", "attention_dropout")  # from 0 to 1


def to_read(values: dict[str, Any]) -> dict[str, Any]:
    """For LlamaConfig. Keys that begin with "_" are comments, as in a configuration; 64.0 is a whole number, and 0 a
    number, which LlamaConfig tells apart."""
    known = model_keys()
    return {name: _to_kind(value, known.get(name)) for name, value in values.items() if not name.startswith("_")}


def _to_kind(value: Any, key: Key | None) -> Any:
    kinds = {*key.type.kinds} - {NoneType} if key else set()
    if kinds == {int} and type(value) is float and value % 1 == 0:
        return int(value)
    return float(value) if kinds == {float} and type(value) is int else value


def find_problem(values: Any) -> str | None:
    """Of the content of a model's JSON. Unknown keys are a problem, since LlamaConfig would silently keep them, and so
    are shapes that it accepts but with which no forward pass works."""
    if not isinstance(values, dict):
        return f"holds {checks.show(values)}, not an object of LlamaConfig's keys"
    if values.get("model_type", "llama") != "llama":
        return (
            f"model_type {values['model_type']!r}; the recipe builds llama models from a JSON "
            "(others can be continued with model_name_or_path)"
        )
    values, known = to_read(values), model_keys()
    if not values:
        return "holds no key; LlamaConfig's defaults are a model of 6.7B parameters (see recipe/configs for others)"
    if unknown := sorted(values.keys() - known):
        return f"LlamaConfig has no key {', '.join(_with_hint(name, known) for name in unknown)}"
    for name, value in values.items():
        kinds = known[name].type.kinds
        if kinds and list not in kinds and (problem := checks.type_problem(value, known[name].type)):
            return f"{name}: {problem}"
    return _rope_problem(values) or _number_problem({name: key.default for name, key in known.items()} | values)


def _with_hint(name: str, known: dict[str, Key]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name} (did you mean {near[0]}?)" if near else f"{name} (remove it)"


def _rope_problem(values: dict[str, Any]) -> str | None:
    """Of keys that transformers would look at in the first forward pass, or never."""
    if "rope_theta" in values and not (values["rope_theta"] or 0) > 0:
        return f"rope_theta must be above 0, got {checks.show(values['rope_theta'])}"
    where = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(where) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        return f"{where}: rope_type: expected text, got {checks.show(kind)}"
    word = next((name for name, each in rope.items() if isinstance(each, str) and "type" not in name), None)
    if word is not None:
        return f"{where}: {word}: expected a number, got {checks.show(rope[word])}"
    for name in ("rope_theta", "factor"):
        if name in rope and (type(rope[name]) not in (int, float) or rope[name] <= 0):
            return f"{where}: {name} must be a number above 0, got {checks.show(rope[name])}"
    if kind == "default" and (unknown := sorted(rope.keys() - {*ROPE})):
        return f"{where}: rope_type default has no {', '.join(unknown)}, only {', '.join(ROPE)}"
    return None


def _number_problem(values: dict[str, Any]) -> str | None:
    for name in COUNTS:
        if values[name] < 1:
            return f"{name} must be at least 1, got {values[name]}"
    for name in SHARES:
        if values[name] is not None and not 0 <= values[name] <= 1:
            return f"{name} must be from 0 to 1, got {checks.show(values[name])}"
    if not 0 <= values["rms_norm_eps"] < math.inf:
        return f"rms_norm_eps must be 0 or above, got {checks.show(values['rms_norm_eps'])}"
    heads = values["num_attention_heads"]
    kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    if kv_heads < 1 or heads % kv_heads:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    if values["hidden_size"] % heads:
        return f"hidden_size {values['hidden_size']} is not a multiple of num_attention_heads {heads}"
    size = values["hidden_size"] // heads if values["head_dim"] is None else values["head_dim"]
    if size < 2 or size % 2:  # positions turn pairs
        return f"a head has {size} dimensions; they must be even"
    return None
