"""`report --bundle`: what somebody else needs to look into a finding, without data, paths or secrets."""

import json
import re
import zipfile
from pathlib import Path

from recipe.errors import UserError
from recipe.guards.records import parse_object, read_lines

RECORDS = ("findings.jsonl", "steps.jsonl", "evals.jsonl")
OBJECTS = ("run.json", "exit.json")
SECRET_KEYS = re.compile(r"token$|token_id$|secret|password|api_?key|credential|hub_model_id|run_name", re.I)
# URLs, absolute and home paths, and what looks like a key
SECRET_TEXT = re.compile(r"\w+://\S+|(?<![\w.])~?/[^\s'\",;)]+|[A-Za-z]:\\\S+|\b(?:hf_|sk-|AKIA|ghp_)\w{8,}")
REMOVED = "(removed)"


def write_bundle(run_dir: Path) -> Path:
    """Packs findings, steps, evaluations, exit and configuration into `bundle.zip` in the run directory.

    Left out are samples, checkpoints and the guards' state, which hold text or token ids; names and paths of sources
    and everything that looks like a key are struck out. UserError where there is no run.
    """
    if not any((run_dir / name).is_file() for name in (*RECORDS, *OBJECTS)):
        raise UserError(f"no run in {run_dir}: expected a directory with run.json or steps.jsonl in it")
    run = _read_object(run_dir / "run.json")
    names = _source_names(run)
    bundle = run_dir / "bundle.zip"
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in OBJECTS:
            if (run_dir / name).is_file():
                archive.writestr(name, json.dumps(_without_secrets(_read_object(run_dir / name), names), indent=2))
        for name in RECORDS:
            records = [_without_secrets(record, names) for record in read_lines(run_dir / name)]
            archive.writestr(name, "".join(json.dumps(record) + "\n" for record in records))
    return bundle


def _read_object(file: Path) -> dict:
    return (parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None) or {}


def _source_names(run: dict) -> list[str]:
    """How the run calls its sources, longest first; findings may quote them."""
    source, arguments = run.get("source") or {}, run.get("arguments") or {}
    named = [source.get("name"), arguments.get("source"), *(part.get("name") for part in source.get("parts") or [])]
    if isinstance(arguments.get("source"), list):
        named += [entry.get("path") for entry in arguments["source"] if isinstance(entry, dict)]
    texts = {name for name in named if isinstance(name, str) and name and name != "docstrings"}
    return sorted(texts, key=len, reverse=True)


def _without_secrets(value, names: list[str], key: str = ""):
    if isinstance(value, dict):
        return {_without_secrets(name, names): _without_secrets(inner, names, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner, names, key) for inner in value]
    if not isinstance(value, str):
        return value
    if SECRET_KEYS.search(key) and value:
        return REMOVED
    for name in names:
        value = value.replace(name, "(source)")
    return SECRET_TEXT.sub(REMOVED, value)
