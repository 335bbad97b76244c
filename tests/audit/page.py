"""docs/audit.md: the results as a page that a person reads."""

from pathlib import Path

from tests.audit.faults import FAULTS
from tests.audit.results import DOCUMENTS

PAGE = Path(__file__).parents[2] / "docs" / "audit.md"
HEADER = """# Faults in the model classes of transformers

Written by `python -m tests.audit`, which measures all of it again; `tests/audit/results.json` has the numbers.

Every class of transformers' mappings for causal language models, sequence-to-sequence models and image-text-to-text
models, as a tiny model with random weights on a CPU in fp32, called on texts only, with eager and sdpa attention. The
questions:

| check | question |
|---|---|
| loss | is the loss the mean cross entropy with the next token, over the scored labels? |
| num_items | with `num_items_in_batch`, is it the sum divided by that? |
| trainer | is the loss of a step of two uneven micro-batches under stock Trainer the mean over its scored labels? |
| label_leak | encoder-decoders: does a position see its own label? |
| causal, rows | do logits move with later tokens, or with other rows' tokens? |
| documents | packed by `position_ids`: do logits move with the document before, or differ from the document alone? |
| padding | are the logits of real tokens the same with right padding and a mask as alone? |
| repeatable | do two evaluations agree, with a longer batch in between? |
| cache, static | are the logits of `generate` with a dynamic or static cache those of one forward pass without? |
| equals_eager | are the logits of sdpa those of eager? |

"Moves" is judged against rounding: every weight is moved by its last bit, and a difference is a fault above 300 times
what that does to the logits, unclear above 30 times. Every parameter gets noise first, so that gates which begin at
zero hide nothing. A fault is listed only if a script in `tests/audit/confirm/`, which imports nothing but torch and
transformers, finds it too; a class that the script does not cover stays "open"."""
LIMITS = """## What this does not say

- Tiny random models on a CPU: kernels of GPUs (flash attention, fused recurrence) are not run.
- Images and sound are not given. Classes that need them are "not audited".
- Packed documents that are "not kept apart" are a limit, not a fault: the class does not read `position_ids` for it.
  "Partly": its masks keep documents apart, other layers (recurrent, convolution, compression) do not."""


def format_summary(results: dict) -> str:
    """The sentences of README."""
    summary, version = results["summary"], results["versions"]["transformers"]
    shorts = {fault.name: fault.short for fault in FAULTS}
    told = {True: [], False: []}
    for each in results["faults"]:
        number = len(each["classes"])
        told[bool(each["upstream"])].append(shorts[each["name"]] + (f" ({number} classes)" if number > 1 else ""))
    return (
        f"{summary['classes'] - summary['not audited']} of {summary['classes']} classes of transformers {version} run "
        f"as tiny models on texts; {summary['fault']} have faults that scripts confirm. Known: "
        f"{'; '.join(told[True])}. New: {'; '.join(told[False])}."
    )


def write_page(results: dict) -> None:
    PAGE.write_text(format_page(results), encoding="utf-8")


def format_page(results: dict) -> str:
    parts = [HEADER, _environment(results), "## Summary", _summary(results["summary"]), "## Faults"]
    for listed in results["faults"]:
        parts += _fault(listed)
    parts += ["## Open: measured, not confirmed by a script", *_table(results, ("open",))]
    parts += ["## By class", *_table(results, ("pass", "fault", "open", "not audited"))]
    parts += ["## The guards' probes on the same models", _disagreements(results["disagreements"]), LIMITS]
    return "\n\n".join(parts) + "\n"


def _environment(results: dict) -> str:
    names = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return (
        f"{results['date']}, {names}, {results['cpus']} CPU cores with a load average of {results['load']}: "
        f"{results['minutes']:.0f} minutes, and {results['processor_minutes']:.0f} minutes of processor time."
    )


def _summary(summary: dict) -> str:
    rows = [(summary["classes"], "classes"), (summary["pass"], "without a fault"), (summary["fault"], "with a fault")]
    rows += [(summary["open"], "open: something differs that no script has confirmed")]
    rows += [(summary["not audited"], "not audited: no tiny model of them runs on texts here")]
    rows += [
        (summary["faults"], f"kinds of faults, {summary['new_faults']} of them in no public thread that was found")
    ]
    rows += [(summary["documents"][name], f"packed documents: {name}") for name in DOCUMENTS]
    return "\n".join(["| number | of |", "|---|---|", *(f"| {number} | {what} |" for number, what in rows)])


def _fault(listed: dict) -> list[str]:
    fault = next(each for each in FAULTS if each.name == listed["name"])
    known = f"Known: {fault.upstream}" if fault.upstream else "No public thread found"
    known += f" ({fault.related})." if fault.related else "."
    classes = listed["classes"]
    name, first = next(iter(classes.items()))
    parts = [
        f"### {fault.title}",
        fault.effect,
        f"{known} Confirmed by `tests/audit/confirm/{fault.name}.py`.",
        f"Measured, {name}: {first['measured']}. Script: {first['confirmed']}.",
        f"{len(classes)} classes: {', '.join(classes)}.",
    ]
    return parts + (
        ["To be filed:", "\n".join(f"> {line}".rstrip() for line in fault.report.splitlines())] * bool(fault.report)
    )


def _table(results: dict, verdicts: tuple[str, ...]) -> list[str]:
    rows = [row for row in results["classes"] if row["verdict"] in verdicts]
    if not rows:
        return ["None."]
    lines = ["| class | verdict | packed documents | evidence and notes |", "|---|---|---|---|"]
    for row in rows:
        titles = [f"fault: {name}" for name in row["faults"]]
        said = "; ".join([*titles, *row["evidence"], *row["notes"]]).replace("|", "/")
        lines.append(f"| {row['class']} | {row['verdict']} | {row.get('documents', '')} | {said} |")
    return ["\n".join(lines)]


def _disagreements(gaps: list[str]) -> str:
    if not gaps:
        return "The probes of `recipe.guards` for loss targets and attention say the same as the direct tests."
    told = "Where a probe of `recipe.guards` and a direct test disagree:"
    return "\n".join([told, "", *(f"- {gap}" for gap in gaps)])
