"""A run directory -> README.md of its trained model, from the run's files only."""

import json
from pathlib import Path

from recipe.report import Run, key_figures, load_run, show


def write_model_card(run_dir: Path, model_dir: Path) -> Path:
    """Writes `README.md` for the trained model into `model_dir`, from the run's files only, and returns its path."""
    run = load_run(run_dir)
    model, source, arguments = run.part("model"), run.part("source"), run.part("arguments")
    device, start = run.part("device"), arguments.get("model_name_or_path")
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- pretraining
---

# {run.name}

A base language model of {show(model.get("parameters"))} parameters, block size {show(model.get("block_size"))},
{show(model.get("vocab_size"))} token ids, {f"trained on from `{start}`" if start else "trained from scratch"}.

Trained on {show(run.part("result").get("tokens_seen"))} tokens of `{source.get("name") or "a source not recorded"}`:
{show(source.get("documents"))} documents, {show(source.get("bytes"))} bytes, content hash
`{source.get("content_hash") or "not recorded"}`.

Ran on {show(device.get("count"))} x {show(device.get("name"))}: {show(device.get("kernels"))}.

## Figures

| | | |
|---|---|---|
{_markdown_rows(run)}

Evaluation is on documents of the same source that were held out of training.

Verdict of the run's guards: **{run.part("result").get("verdict") or "unfinished, no result recorded"}**

{_markdown_findings(run)}

## Limits

It continues text. It was not taught to follow instructions or to decline any, and what it writes may be false or
offensive. The run's `report.html` has its curves and findings.

## Resolved arguments

```json
{json.dumps(arguments, indent=1, ensure_ascii=False)}
```
"""
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return model_dir / "README.md"


def _markdown_rows(run: Run) -> str:
    rows = (f"| {' | '.join(text.replace('|', '/') for text in figure)} |" for figure in key_figures(run).values())
    return "\n".join(rows)


def _markdown_findings(run: Run) -> str:
    lines = [f"- {f.get('severity')}: `{f.get('id')}` at step {show(f.get('step'))}" for f in run.findings]
    return "\n".join(lines) or "No findings."
