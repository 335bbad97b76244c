"""docs/reports.md from the results."""

HEAD = """# Public reports

Each row is a small program modelled on a public report of a silent training bug, or of a healthy training that the
guards once judged wrongly, run on a tiny model. `python -m tests.reports` runs them all and writes this page;
`--only NAME` runs some. The programs are in `tests/reports/`. Each models what a thread describes with another model
and other text, so a row says what the guards do with that mechanism, not with the reporter's own training.

**Said** is what the guards said: severity, id, step (0: before step 1), what was found. *Beside* is a
second run. Where the report is of a fault, it is the same training without the fault, and must be silent. Where the
report is of a healthy training, the program must be silent, and the second run is the same training with a learning
rate that goes negative, which must be named, so that silence means that it judged. Ids that name the fault were
noted before the run.

- **right**: the first warning or error has an id that names the fault, and the healthy run has none
- **named otherwise**: the first warning or error has another id
- **missed**: no warning and no error
- **false alarm**: the healthy run raised a warning or an error

The reasons stand below each table. Two more reports were tried and do not reproduce with transformers 5.23, where
`resize_token_embeddings` keeps the parameter that the optimizer holds
([transformers#3532](https://github.com/huggingface/transformers/issues/3532); the program below replaces it as the
function once did), and a run that is resumed at the end of a dataset without length trains on
([transformers#26413](https://github.com/huggingface/transformers/issues/26413)).
"""
TITLES = {
    "given": "## Reports that the guards were fixed with",
    "found": "## Reports found after that",
}
# When they were first run, on 2026-11-28, before any guard was changed for one of them.
FIRST = {"found": "When they were first tried, before any guard was changed for one of them, 8 of 13 were right.\n\n"}
COLUMNS = "| report | what was run | said | beside it | said | judgement |\n|---|---|---|---|---|---|"


def format_page(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    when = f"Run on {results['date']} at commit {results['commit']} in {results['minutes']:.0f} minutes"
    parts = [HEAD, f"{when}, with\n{versions}.\n"]
    for part, title in TITLES.items():
        rows = results[part]
        if rows:
            right = sum(row["judgement"] == "right" for row in rows)
            parts.append(f"{title}\n\n{FIRST.get(part, '')}Right: {right} of {len(rows)}.\n")
            parts.append("\n".join([COLUMNS, *map(_line, rows)]) + "\n")
            parts += [_reasons(rows)] if any(row["missed"] for row in rows) else []
    return "\n".join(parts)


def _line(row: dict) -> str:
    report = f"`{row['name']}`: {row['says']} {', '.join(map(_link, row['threads']))}"
    cells = [report]
    for what, said in zip(row["what"], row["said"], strict=True):
        cells += [what, "; ".join(said) or "silent"]
    return "| " + " | ".join([*cells, f"**{row['judgement']}**"]) + " |"


def _link(thread: str) -> str:
    """`owner/name#number`, or an address."""
    if thread.startswith("https://"):
        return f"[{thread.rsplit('/', 1)[1]}]({thread})"
    return f"[{thread}](https://github.com/{thread.replace('#', '/issues/')})"


def _reasons(rows: list[dict]) -> str:
    lines = [f"- `{row['name']}`: {row['missed']}" for row in rows if row["missed"] and row["judgement"] != "right"]
    return "\n".join(["Why:\n", *lines]) + "\n"
