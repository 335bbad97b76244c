"""What `limits` measures, each call in a process of its own, as in measure.py."""

import itertools
import json
import math
import os
import random
import resource
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from recipe.plan import make_plan
from recipe.report import write_report
from tests.benchmarks.measure import open_stream
from tests.benchmarks.measure_guards import build, drop_guards, parse
from tests.benchmarks.measure_throughput import keys_of


def report(folder: str, num_steps: int) -> dict:
    """Writes `report.html` of a run with so many steps."""
    run_dir, chance = Path(folder), random.Random(0)
    (run_dir / "run.json").write_text(json.dumps({"arguments": {}, "result": {}}))
    with (run_dir / "steps.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            loss, norm = 3 + 7 * math.exp(-step / 1e4) + chance.gauss(0, 0.05), 1 + chance.random()
            known = {"learning_rate": 1e-3 * (1 - step / num_steps), "tokens_per_second": 5000 + chance.gauss(0, 50)}
            record = {"step": step, "tokens_seen": 1024 * step, "loss": loss, "grad_norm": norm, **known}
            file.write(json.dumps(record) + "\n")
    before, begin = peak_mebibytes(), time.perf_counter()
    page = write_report(run_dir)
    seconds = time.perf_counter() - begin
    sizes = {"file": (run_dir / "steps.jsonl").stat().st_size / 1e6, "page": page.stat().st_size / 1e6}
    return {"seconds": seconds, "before": before, "peak": peak_mebibytes(), **sizes}


def document(folder: str, kind: str, megabytes: int) -> dict:
    """Reads rows until one document of so many megabytes has been packed."""
    words = [f"word{number}" for number in range(5000)]
    chance, size = random.Random(0), megabytes * 10**6
    text = " ".join(chance.choices(words, k=size // 7))[:size]
    texts, path = [*(f"a short text {number} " * 30 for number in range(40)), text], Path(folder) / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=10)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    else:
        path.write_text("\n<|endoftext|>\n".join(texts))
    del text, texts
    before, begin = peak_mebibytes(), time.perf_counter()
    data = open_stream(folder, source=str(path), num_lanes=1, block_size=1024)
    tokens = 0
    for row in itertools.islice(data.loader.dataset, 100_000):
        tokens += sum(piece.num_tokens for piece in row.pieces if piece.document == 40)
        if row.state["pass"] > 0:
            break
    assert tokens > size // 10, f"the document was not read: {tokens} tokens"
    return {"seconds": time.perf_counter() - begin, "before": before, "peak": peak_mebibytes(), "tokens": tokens}


def plan(folder: str, name: str) -> dict:
    """Bytes in MB of the peak that is planned for a step, and of the peak over what there was before the model."""
    config, keys = keys_of(folder, name, steps=2)
    planned = make_plan(parse(folder, config, **keys))["step_memory"]["peak"]
    run = build(folder, config, **keys)
    drop_guards(run)
    weights = sum(weight.untyped_storage().nbytes() for weight in run.trainer.model.parameters())
    before = psutil.Process().memory_info().rss - weights
    run.trainer.train()
    return {"planned": planned / 1e6, "measured": (peak_mebibytes() * 2**20 - before) / 1e6}


def peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of pyarrow may abort the interpreter when it ends
