"""`report --bundle`: what is needed to debug a finding, without data, paths or secrets.

An allow list: numbers, finding ids and other names of this package and of transformers, versions, hashes and dates.
Every other string is removed, texts of findings among them: their numbers are in the evidence.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipe import config_checks as checks
from recipe.arguments import FIELDS
from recipe.errors import UserError
from recipe.guards import FINDING_IDS
from recipe.guards.guard import SEVERITIES
from recipe.guards.records import iterate_lines, parse_object
from recipe.guards.trajectory import TRAJECTORIES
from recipe.plain_json import dumps
from recipe.read_config import known_types
from recipe.report import folder_of
from recipe.rundir import PACKAGES

FILES = ("run.json", "exit.json", "findings.jsonl", "steps.jsonl", "evals.jsonl")
REMOVED = "(removed)"
KEPT = 10_000  # of the records of a file: an issue takes 25 MB
SECTIONS = {  # of run.json -> the keys that are kept, None for all
    "arguments": FIELDS,
    "versions": ("python", *PACKAGES),
    "device": ("name", "type", "count"),
    "model": None,
    "source": None,
    "trajectory": ("name", "belongs_to", "points", "window", "above", "red_flags", "grad_norm_phases"),
    "result": None,
}
# None of these strings can be a name that the user chose.
WORDS = {
    *(word for kind in known_types().values() for word in kind.choices),
    *(word for words in checks.WORDS.values() for word in words),
    *(path.stem for path in TRAJECTORIES.glob("*.json")),
    *("none", "docstrings", "passive", "inductor", "default", "reduce-overhead", "max-autotune", "nccl", "gloo"),
    *("healthy", "nothing_learned", "not_judged", "findings", "cpu", "cuda"),
    *SEVERITIES,
    *FINDING_IDS,
}
# Strings under these keys are kept where they look like one.
PATTERNS = {
    **dict.fromkeys(("commit", "content_hash", "started", "finished"), re.compile(r"[0-9a-fT:+-]+")),
    "check": re.compile(r"[a-z_]{1,20}"),
    **dict.fromkeys(SECTIONS["versions"], re.compile(r"\d[\w.+-]{0,40}")),
}
KEY = re.compile(r"[a-z_][a-z0-9_]{0,40}")


def write_bundle(run_dir: Path) -> Path:
    """Packs findings, steps, evaluations, exit code and configuration into `bundle.zip` in the run directory.

    Left out are samples, checkpoints and the guards' state, which hold text or token ids. UserError where there is no
    run.
    """
    run_dir = folder_of(run_dir)
    if not any((run_dir / name).is_file() for name in FILES):
        raise UserError(f"no run in {run_dir}: expected a directory with run.json or steps.jsonl in it")
    run, ended = _read_object(run_dir / "run.json"), _read_object(run_dir / "exit.json")
    packed = {"run.json": [_pack_run(run)]} if run else {}
    if ended:
        packed["exit.json"] = [_pack({key: ended.get(key) for key in ("code", "reason")})]
    packed |= {name: _chosen(run_dir / name) for name in FILES[2:]}
    bundle = run_dir / "bundle.zip"
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, records in packed.items():
            indent = 2 if name.endswith(".json") else None
            with archive.open(name, "w") as file:
                for record in records:
                    file.write((dumps(record, indent=indent) + "\n").encode())
    return bundle


def _chosen(path: Path) -> Iterator[dict]:
    """The records of a file, packed; of a long one the last `KEPT` and evenly spaced ones of those before."""
    count = sum(1 for _ in iterate_lines(path))
    every = 1 + max(0, count - KEPT) // KEPT
    for place, record in enumerate(iterate_lines(path)):
        if record is not None and (place % every == 0 or place >= count - KEPT):
            yield _pack(record)


def _read_object(file: Path) -> dict:
    return (parse_object(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None) or {}


def _pack_run(run: dict) -> dict:
    packed = _pack({key: run.get(key) for key in ("started", "finished", "commit", "is_dirty", "failure")})
    for name, keys in SECTIONS.items():
        packed[name] = _pack(_part(run.get(name), keys))
    if isinstance(device := run.get("device"), dict):  # the maker's name for it
        packed["device"]["name"] = device.get("name")
    spent = run["result"].get("tokens_by_source") if isinstance(run.get("result"), dict) else None
    packed["result"]["tokens_by_source"] = _pack([*spent.values()] if isinstance(spent, dict) else [])
    return packed


def _part(section, keys: Iterable[str] | None) -> dict:
    section = section if isinstance(section, dict) else {}
    return {key: section[key] for key in (section if keys is None else keys) if key in section}


def _pack(value, key: str = ""):
    if isinstance(value, dict):
        return {name: _pack(inner, name) for name, inner in value.items() if KEY.fullmatch(name)}
    if isinstance(value, list):
        return [_pack(inner) for inner in value]
    if not isinstance(value, str) or value in WORDS or (key in PATTERNS and PATTERNS[key].fullmatch(value)):
        return value
    return REMOVED
