"""The JSON of a new model: what can be said of it without torch and transformers, which take seconds to import."""

import difflib
from typing import Any

from recipe import config_checks as checks
from recipe.keys import model_keys

COUNTS = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")

ROPE = ("rope_type", "rope_theta", "partial_rotary_factor")


def without_comments(values: dict[str, Any]) -> dict[str, Any]:
    """Keys that begin with "_" are comments, as in a configuration."""
    return {name: value for name, value in values.items() if not name.startswith("_")}


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
    values, known = without_comments(values), model_keys()
    if unknown := sorted(values.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        return f"LlamaConfig has no key {', '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else "")
    for name, value in values.items():
        kinds = known[name].type.kinds
        if kinds and list not in kinds and (problem := checks.type_problem(value, known[name].type)):
            return f"{name}: {problem}"
    if problem := _rope_problem(values.get("rope_parameters") or {}):
        return f"rope_parameters: {problem}"
    return _shape_problem({name: key.default for name, key in known.items()} | values)


def _rope_problem(values: dict[str, Any]) -> str | None:
    """Of keys that transformers would look at in the first forward pass, or never."""
    kind = values.get("rope_type", "default")
    word = next((name for name, value in values.items() if isinstance(value, str) and name != "rope_type"), None)
    if word is not None:
        return f"{word}: expected a number, got {checks.show(values[word])}"
    if values.get("rope_theta", 1) is not None and values.get("rope_theta", 1) <= 0:
        return f"rope_theta must be above 0, got {checks.show(values['rope_theta'])}"
    if kind == "default" and (unknown := sorted(values.keys() - set(ROPE))):
        return f"rope_type default has no {', '.join(unknown)}, only {', '.join(ROPE)}"
    return None


def _shape_problem(values: dict[str, Any]) -> str | None:
    for name in COUNTS:
        if values[name] < 1:
            return f"{name} must be at least 1, got {values[name]}"
    heads = values["num_attention_heads"]
    kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    if kv_heads < 1 or heads % kv_heads:
        return f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    if values["hidden_size"] % heads and values["head_dim"] is None:
        return f"hidden_size {values['hidden_size']} is not a multiple of num_attention_heads {heads}"
    return None
