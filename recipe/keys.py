"""The keys of a configuration: type, default, group and one line on each.

Read from the sources of the classes that define them, since torch and transformers take seconds to import: what is
mistyped is refused, and `--help` printed, without them.
"""

import ast
import difflib
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

GROUPS = {"ModelArguments": "Model", "DataArguments": "Data", "GuardArguments": "Guards"}
PLAIN = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
# transformers' own hints are too wide (a string of kwargs only fails later) or wrong (`fsdp` is a bool in v5).
HINTS = {
    "lr_scheduler_kwargs": "dict | None",
    "activation_checkpointing_kwargs": "dict | None",
    "fsdp": "bool | str | None",
    "output_dir": "str",
    "report_to": "str | list[str]",
    "trackio_static_space_id": "bool | str | None",
    "optim": 'Literal["muon"] | OptimizerNames',
}
# What a key does here, where transformers' own text is about something else.
TEXTS = {
    "output_dir": "the run directory; default: runs/ and the name of the config",
    "max_steps": "steps of the run; or give train_tokens",
    "learning_rate": "the peak, after the warm-up",
    "warmup_steps": "steps from 0 to learning_rate; below 1 a share of all steps",
    "per_device_train_batch_size": "rows of a micro-batch; a step has this x gradient_accumulation_steps x processes",
    "gradient_accumulation_steps": "micro-batches of a step",
    "bf16": "mixed precision in bfloat16; default: on where a GPU has it, or a CPU is faster with it",
    "optim": "the optimizer; muon: hidden matrices by Muon, all else by AdamW",
    "optim_args": "muon: embedding_lr_ratio=X, times learning_rate for embeddings and head; GaLore and others: theirs",
    "tf32": "TF32 in fp32 matrix products; default: on where the GPU has it",
    "use_cpu": "train on the CPU; default: on where there is no GPU",
    "report_to": "trackers: trackio, tensorboard, wandb, ...; several as a list",
    "resume_from_checkpoint": "`latest`, `auto` (the latest, else a new run), or the path of a checkpoint",
    "seed": "seed of the initial weights",
}
# Of a model's JSON. The last three are in those of transformers 4, and LlamaConfig still reads them.
NOT_DECLARED = {"model_type": str, "output_attentions": bool, "unk_token_id": int}
NOT_DECLARED |= {"rope_theta": float, "rope_scaling": dict, "torch_dtype": str}
LINE = 120  # columns of a line of the help
CHOICES_SHOWN = 6
PAGE = "docs/keys.md"  # whole texts and all values


class FieldType(NamedTuple):
    kinds: tuple[type, ...]  # plain types; a value must have one of them
    choices: tuple[str, ...]  # the only strings allowed, where a Literal or an Enum limits them


class Required:
    """Stands for the default of a key that has none."""


class Key(NamedTuple):
    group: str
    type: FieldType
    default: Any
    text: str


@cache
def all_keys() -> dict[str, Key]:
    """Ours, then TrainingArguments', each in its declared order."""
    package = Path(importlib.util.find_spec("transformers").origin).parent  # finds it without importing it
    return _ours() | _of_training_arguments(package)


@cache
def model_keys() -> dict[str, Key]:
    """Of a model's JSON: LlamaConfig's, and those that each configuration has."""
    package = Path(importlib.util.find_spec("transformers").origin).parent
    found = {name: Key("Model", FieldType((kind, NoneType), ()), None, "") for name, kind in NOT_DECLARED.items()}
    classes = {"configuration_utils": "PreTrainedConfig", "models/llama/configuration_llama": "LlamaConfig"}
    for module, name in classes.items():
        tree = ast.parse((package / f"{module}.py").read_text(encoding="utf-8"))
        for field, node in _fields(_class(tree, name)):
            if not ast.unparse(node.annotation).startswith("ClassVar") and not field.startswith("_"):
                found[field] = Key("Model", _type_of(node.annotation, {}), _default(node.value, {}), "")
    return found


@cache
def source_types() -> dict[str, FieldType]:
    """Of the keys that an entry of a mixture may have."""
    tree = ast.parse((Path(__file__).parent / "arguments.py").read_text(encoding="utf-8"))
    return {name: _type_of(node.annotation, {}) for name, node in _fields(_class(tree, "SourceArguments"))}


def unknown_key(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, [*known], n=1)
    return f"unknown key; did you mean {nearest[0]}?" if nearest else "unknown key"


def _ours() -> dict[str, Key]:
    source = (Path(__file__).parent / "arguments.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    return {
        name: Key(group, _type_of(node.annotation, {}), _default(node.value, {}), _comment_of(node, lines))
        for of_class, group in GROUPS.items()
        for name, node in _fields(_class(tree, of_class))
    }


def _of_training_arguments(package: Path) -> dict[str, Key]:
    trees = [
        ast.parse((package / f"{name}.py").read_text(encoding="utf-8")) for name in ("training_args", "trainer_utils")
    ]
    enums = {node.name: _members(node) for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    definition = _class(trees[0], "TrainingArguments")
    variables = {
        node.targets[0].id: node.value
        for node in ast.walk(definition)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    groups, found = _groups_of(ast.get_docstring(definition)), {}
    groups["resume_from_checkpoint"] = "Resuming Training"  # there among flags that Trainer does not use
    for name, node in _fields(definition):
        hint = ast.parse(HINTS[name], mode="eval").body if name in HINTS else node.annotation
        text = TEXTS.get(name) or _first_sentence(_help_of(node.value))
        found[name] = Key(groups.get(name, "Other"), _type_of(hint, enums), _default(node.value, variables), text)
    return found


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(definition: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign]]:
    return ((node.target.id, node) for node in definition.body if isinstance(node, ast.AnnAssign))


def _members(definition: ast.ClassDef) -> tuple[str, ...]:
    values = [node.value for node in definition.body if isinstance(node, ast.Assign)]
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


def _type_of(hint: ast.expr, enums: dict[str, tuple[str, ...]]) -> FieldType:
    kinds, choices = [], []
    for member in _union(hint):
        name = member.value.id if isinstance(member, ast.Subscript) else getattr(member, "id", None)
        if isinstance(member, ast.Constant) and member.value is None:
            kinds.append(NoneType)
        elif name == "Literal":
            choices += [node.value for node in getattr(member.slice, "elts", [member.slice])]
        elif name in PLAIN:
            kinds.append(PLAIN[name])
        else:
            choices += enums.get(name, ())
    return FieldType(tuple(dict.fromkeys([str] * bool(choices) + kinds)), tuple(choices))


def _union(hint: ast.expr) -> list[ast.expr]:
    return [*_union(hint.left), *_union(hint.right)] if isinstance(hint, ast.BinOp) else [hint]


def _default(value: ast.expr | None, variables: dict[str, ast.expr]) -> Any:
    if isinstance(value, ast.Call):  # field(default=..., metadata=...)
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            return PLAIN[given["default_factory"].id]()
        value = given.get("default")
    if isinstance(value, ast.Name):
        value = variables[value.id]
    return Required if value is None else ast.literal_eval(value)


# --- help


class Shown(NamedTuple):
    """A key as it is shown, in words."""

    name: str
    kinds: list[str]
    default: str
    text: str
    choices: tuple[str, ...]


def shown_keys() -> dict[str, list[Shown]]:
    """Every key by group. Keys that the recipe refuses are left out."""
    from recipe.config_checks import DEFAULTS, FIXED, REFUSED

    keys = {name: key for name, key in all_keys().items() if name not in REFUSED}
    groups: dict[str, list[Shown]] = {}
    for name, key in keys.items():
        if name not in FIXED:
            groups.setdefault(key.group, []).append(_shown(name, key, DEFAULTS.get(name, key.default)))
    groups["Fixed by the recipe: no other value is accepted"] = [
        _shown(name, keys[name]._replace(text=reason), value) for name, (value, reason) in FIXED.items()
    ]
    return groups


def _shown(name: str, key: Key, default: Any) -> Shown:
    names = {kind: word for word, kind in PLAIN.items()}
    kinds = [names[kind] for kind in key.type.kinds if kind is not NoneType]
    value = "required" if default is Required else json.dumps(default)
    return Shown(name, kinds, value, key.text[:1].upper() + key.text[1:], key.type.choices)


def format_help() -> str:
    """One line for each key: name, type, default, text; where it is cut, it names the page that has the whole text."""
    groups = shown_keys().items()
    return "\n\n".join("\n".join([f"{group}:", *map(_line, keys)]) for group, keys in groups)


def _line(key: Shown) -> str:
    left = f"  {key.name:<36} {'|'.join(key.kinds):<8} {key.default:<10} "
    one_of = f" [{', '.join(key.choices)}]" if key.choices else ""
    room = LINE - len(left)
    if len(key.text + one_of) <= room:
        return left + key.text + one_of
    more = f" ... ({f'{len(key.choices)} values' if key.choices else 'more'}: {PAGE})"
    return (
        left + textwrap.shorten(key.text, room, placeholder=more)
        if len(key.text) + len(more) > room
        else left + key.text + more
    )


def format_page() -> str:
    """The same in Markdown, a table for each group, with all values that a key may have."""
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    tables = ["\n".join([f"## {group}", "", *head, *map(_row, keys)]) for group, keys in shown_keys().items()]
    return "\n\n".join(tables) + "\n"


def _row(key: Shown) -> str:
    parts = key.text.replace("|", "\\|").rstrip(".").split("`")  # every second one is code
    text = "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))
    one_of = f". One of {', '.join(f'`{choice}`' for choice in key.choices)}" if key.choices else ""
    return f"| `{key.name}` | {' or '.join(key.kinds)} | `{key.default}` | {text}{one_of} |"


def _comment_of(node: ast.AnnAssign, lines: list[str]) -> str:
    """The comment behind a field, or the lines above it."""
    behind = lines[node.end_lineno - 1][node.end_col_offset :].strip()
    if behind.startswith("#"):
        return behind.removeprefix("#").strip()
    above, number = [], node.lineno - 2
    while lines[number].strip().startswith("#"):
        above.insert(0, lines[number].strip().removeprefix("#").strip())
        number -= 1
    return " ".join(above)


def _groups_of(docstring: str) -> dict[str, str]:
    """Key -> the heading ("> Optimizer") that it stands under."""
    group, groups = "Output", {}
    for line in docstring.splitlines():
        if heading := re.match(r"    > (.+)", line):
            group = heading[1].strip()
        elif name := re.match(r"\s*(\w+) \(`", line):
            groups.setdefault(name[1], group)
    return groups


def _help_of(value: ast.expr | None) -> str:
    """Its words: the text of a few is put together by calls."""
    metadata = [keyword.value for keyword in getattr(value, "keywords", ()) if keyword.arg == "metadata"]
    entries = zip(metadata[0].keys, metadata[0].values, strict=True) if metadata else ()
    node = next((node for key, node in entries if key.value == "help"), ast.Constant(""))
    words = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))
    return " ".join(words)


def _first_sentence(text: str) -> str:
    text = " ".join(text.replace("%%", "%").split())
    ended = re.match(r".*?[^\s.]{3,}[.!?](?=\s|$)", text)  # not behind "e.g."
    return ended[0] if ended else text
