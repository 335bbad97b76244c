"""RESULTS.md: one section a benchmark, replaced when it runs again; sections that do not run stay as they are."""

import os
import re
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import NamedTuple

RESULTS = Path(__file__).with_name("RESULTS.md")
ROOT = RESULTS.parents[2]
HEADER = """# Benchmarks

Written by `python -m tests.benchmarks`, which replaces the sections that it runs. Compare figures within a section:
they come from one run on one machine; other machines and other days differ.
"""
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "pyarrow")


class Result(NamedTuple):
    """A benchmark's outcome: `measured` says what and how, `rows` is the table (the first row's keys head it), `note`
    stands below it."""

    title: str
    measured: str
    rows: list[dict]
    note: str = ""


def format_section(name: str, result: Result, command: str) -> str:
    parts = [f"## {name}: {result.title}", result.measured, f"Repeat: `{command}`", format_table(result.rows)]
    return "\n\n".join([*parts, *([result.note] if result.note else []), environment()]) + "\n"


def format_table(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[format_value(row[key]) for key in rows[0]] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_value(value) -> str:
    """Whole numbers with commas, others to three significant digits; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def environment() -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    when = f"{datetime.now():%Y-%m-%d %H:%M}, commit {commit()}"
    return f"{when}, {processor()}, Python {python_version()}, {versions}"


def processor() -> str:
    """By its instructions, which decide what is fast, and its name where the machine tells one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    kinds = {"AMX-BF16": "amx_bf16", "AVX512-BF16": "avx512_bf16", "AVX512": "avx512f", "AVX2": "avx2"}
    best = next((kind for kind, flag in kinds.items() if flag in flags), "no vector instructions known")
    return f"{name}, {best}, {os.cpu_count()} CPUs"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    # Results themselves change when they are written
    changed = git("status", "--porcelain", "--", ".", ":!*RESULTS.md", ":!*results.json")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" + changes" if changed else "")


def write_section(name: str, section: str, path: Path = RESULTS) -> None:
    """Put `section` where the one of that name stood, or at the end."""
    text = path.read_text() if path.exists() else HEADER
    sections = [part.strip() + "\n" for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)]
    places = [i for i, part in enumerate(sections) if part.startswith(f"## {name}:")]
    sections[places[0] if places else len(sections) : places[0] + 1 if places else len(sections)] = [section]
    path.write_text("\n".join(sections))
