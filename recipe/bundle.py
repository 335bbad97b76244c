"""`report --bundle`: what is needed to debug a finding, without data, paths or secrets.

An allow list. Settings keep numbers and the names that this package and transformers use; every other string in them
is removed, also from the texts that may quote it, together with everything that looks like a key or a path.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from recipe import config_checks as checks
from recipe.arguments import FIELDS, TYPES
from recipe.errors import UserError
from recipe.guards.finding import FINDING_IDS, FINDINGS, Finding
from recipe.guards.records import StepRecord, parse_object, read_lines
from recipe.guards.trajectory import TRAJECTORIES
from recipe.rundir import PACKAGES

FILES = ("run.json", "exit.json", "findings.jsonl", "steps.jsonl", "evals.jsonl")
REMOVED = "(removed)"
SETTINGS = ("started", "finished", "resumed_from", "config_path", "commit", "is_dirty", "model", "source")
REFERENCE = ("name", "belongs_to", "points", "window", "above", "red_flags", "grad_norm_phases")
# Strings that settings keep, under any key: none of them can be a name that the user chose.
WORDS = {
    *(word for kind in TYPES.values() for word in kind.choices),
    *(word for words in checks.WORDS.values() for word in words),
    *(path.stem for path in TRAJECTORIES.glob("*.json")),
    *("none", "docstrings", "passive", "inductor", "default", "reduce-overhead", "max-autotune", "nccl", "gloo"),
    *FINDINGS,
}
HASHES_AND_DATES = {"commit", "content_hash", "started", "finished"}
HASH_OR_DATE = re.compile(r"[0-9a-fT:+-]+")
VERSION = re.compile(r"\d[\w.+-]{0,40}")
# A folder may be called `runs` or `loss`; such words stay readable in findings, and so does every config key.
COMMON = "home users data datasets text content train runs run model models tokenizer config json parquet recipe"
COMMON_WORDS = {
    word
    for text in (COMMON, *PACKAGES, *FIELDS, *StepRecord.__annotations__, *FINDINGS, *FINDINGS.values())
    for word in re.findall(r"[^\W\d_]+", text.lower())
}
KEYS = re.compile(
    r"\bBearer\s+\S+"
    r"|\b(?:hf_|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|sk-|AKIA|AIza)[\w-]{4,}"
    r"|\b(?:\w*_key|api-?key|key|\w*token|\w*secret|passw\w*)['\"]?(?:\s*=\s*|:\s*)\S+"
    r"|\b(?=[\w-]*[0-9])(?=[\w-]*[A-Za-z])[\w-]{20,}[\w.+=-]*"
    r"|(?<!\S)[^\s@]+@\S+",
    re.IGNORECASE,
)
# To the end of the line, as a path may hold spaces and quotes. Guards use a slash only in ratios such as `1/8`.
PATHS = re.compile(r"(?<!\S)(?!1/\d+\b(?![/\\.]))\S*[/\\].*")
QUOTED = re.compile(r"(?<!\w)(['\"`]).+?\1(?!\w)", re.DOTALL)


def write_bundle(run_dir: Path) -> Path:
    """Packs findings, steps, evaluations, exit and configuration into `bundle.zip` in the run directory.

    Left out are samples, checkpoints and the guards' state, which hold text or token ids. UserError where there is no
    run.
    """
    if not any((run_dir / name).is_file() for name in FILES):
        raise UserError(f"no run in {run_dir}: expected a directory with run.json or steps.jsonl in it")
    run, ended = _read_object(run_dir / "run.json"), _read_object(run_dir / "exit.json")
    known = _known_names(run)
    packed = {"run.json": [_pack_run(run, known)]} if run else {}
    if ended:  # without run.json, nothing says which names its reason may quote
        reason = _pack(ended.get("reason"), known, is_text=bool(run))
        packed["exit.json"] = [{"code": _pack(ended.get("code"), known), "reason": reason}]
    packed["findings.jsonl"] = [_pack_finding(record, known) for record in read_lines(run_dir / "findings.jsonl")]
    for name in ("steps.jsonl", "evals.jsonl"):
        packed[name] = [_pack(record, known) for record in read_lines(run_dir / name)]
    bundle = run_dir / "bundle.zip"
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, records in packed.items():
            indent = 2 if name.endswith(".json") else None
            archive.writestr(name, "".join(json.dumps(record, indent=indent) + "\n" for record in records))
    return bundle


def _read_object(file: Path) -> dict:
    return (parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None) or {}


def _part(run: dict, name: str, keys: Iterable[str] | None = None) -> dict:
    """The `keys` of a section of run.json; empty where it is missing."""
    section = run[name] if isinstance(run.get(name), dict) else {}
    return {key: section[key] for key in (section if keys is None else keys) if key in section}


def _pack_run(run: dict, known: re.Pattern) -> dict:
    result, versions = _part(run, "result"), _part(run, "versions", ("python", *PACKAGES))
    texts = {key: result.pop(key) for key in ("verdict", "guards") if key in result}
    spent = _part(result, "tokens_by_source").values()
    return {
        **{key: _pack(run.get(key), known, key) for key in SETTINGS},
        "arguments": _pack(_part(run, "arguments", FIELDS), known),
        "versions": {key: value for key, value in versions.items() if VERSION.fullmatch(str(value))},
        "device": _pack(_part(run, "device", ("name", "type", "count", "kernels")), known, is_text=True),
        "trajectory": _pack(_part(run, "trajectory", REFERENCE), known) or None,
        "failure": _pack(run.get("failure"), known, is_text=True),
        "result": _pack(result | {"tokens_by_source": [*spent]}, known) | _pack(texts, known, is_text=True),
    }


def _pack_finding(record: dict, known: re.Pattern) -> dict:
    texts = _part({"finding": record}, "finding", [field.name for field in fields(Finding)])
    return _pack(texts, known, is_text=True) | {"id": texts.get("id") if texts.get("id") in FINDING_IDS else REMOVED}


def _pack(value, known: re.Pattern, key: str = "", is_text: bool = False):
    """Numbers, known names, and the recipe's own texts (`is_text`) without what they quote."""
    if isinstance(value, dict):
        return {_strike_out(name, known): _pack(inner, known, name, is_text) for name, inner in value.items()}
    if isinstance(value, list):
        return [_pack(inner, known, is_text=is_text) for inner in value]
    if not isinstance(value, str) or (key in HASHES_AND_DATES and HASH_OR_DATE.fullmatch(value)):
        return value
    return _strike_out(value, known) if is_text or value in WORDS else REMOVED


def _strike_out(text: str, known: re.Pattern) -> str:
    if text not in WORDS and text not in FIELDS:
        for pattern in (KEYS, known, QUOTED, PATHS):
            text = pattern.sub(REMOVED, text)
    return text


def _known_names(run: dict) -> re.Pattern:
    """Matches every string that is removed from the settings, each part of a path among them, and what follows it
    without a space, as in `my_run-2/checkpoint-100`."""
    reference, spent = _part(run, "trajectory", REFERENCE), _part(_part(run, "result"), "tokens_by_source")
    settings = [run.get(key) for key in ("config_path", "resumed_from", "arguments", "source")]
    names = set(_strings([*settings, reference, *spent]))
    parts = {part.strip() for name in names for part in re.split(r"[/\\:?&=#]| \+ ", name)}
    names |= parts | {Path(part).stem for part in parts}
    telling = sorted((name for name in names if len(name) >= 4 and not _is_common(name)), key=len, reverse=True)
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, telling)) or '(?!)'})[\w./\\-]*", re.IGNORECASE)


def _is_common(name: str) -> bool:
    words = re.findall(r"[^\W\d_]+", name.lower())
    return name in WORDS or (bool(words) and COMMON_WORDS.issuperset(words))


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)
