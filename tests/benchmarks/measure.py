"""What the benchmarks measure, each call in a process of its own: `run_fresh` starts one that runs one function here.

All of them return plain numbers. Imports are outside of every timing. `open_stream`, `read_pass` and `passes` are all
that is known here of the recipe's stream.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, default_data_collator

from recipe.arguments import parse_config
from recipe.data.hold_out import HoldOutFilter, digest_of
from recipe.data.packing import Row
from recipe.data.pipeline import Data, build_data

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}  # never built


def run_fresh(function, cache: Path | None = None, environment: dict | None = None, **arguments) -> dict:
    """Call `function(folder, **arguments)` in a fresh process with a scratch folder, and that as cache if none is
    given; returns what it returned."""
    with tempfile.TemporaryDirectory(prefix="recipe-benchmark-") as folder:
        command = fresh_command(function, folder=folder, **arguments)
        variables = fresh_environment(cache or folder) | (environment or {})
        done = subprocess.run(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def fresh_command(function, **arguments) -> list[str]:
    return [sys.executable, "-m", function.__module__, function.__name__, json.dumps(arguments)]


def fresh_environment(cache: str | Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    return kept | {"RECIPE_CACHE": f"{cache}/recipe", "HF_HOME": f"{cache}/huggingface", "HF_HUB_OFFLINE": "1"}


# --- the recipe


def open_stream(folder: str, **keys) -> Data:
    """The recipe's data as a run would open it. The hold-out is the first 20 documents unless `keys` say otherwise."""
    folder = Path(folder)
    (folder / "model.json").write_text(json.dumps(MODEL))
    values = {"model_config": str(folder / "model.json"), "tokenizer": "tokenizer/llama-32k", "use_cpu": True}
    values |= {"eval_skip": 0, "eval_documents": 20, "block_size": 256, "max_steps": 1, "output_dir": f"{folder}/run"}
    (folder / "config.json").write_text(json.dumps(values | keys))
    return build_data(parse_config(folder / "config.json"))


def read_pass(data: Data) -> Iterator[tuple[Row, bool]]:
    """Rows in canonical order until every lane has gone through its documents; and whether no lane has wrapped yet."""
    wrapped = set()
    for row in data.loader.dataset:
        if row.state["pass"] > 0:
            wrapped.add(row.lane)
        if len(wrapped) == data.loader.dataset.num_lanes:
            return
        yield row, not wrapped


def passes(data: Data) -> int:
    """Complete passes of the loader's fastest lane."""
    return data.loader.passes(0)


def first_row(folder: str, **keys) -> dict:
    """Seconds to open the stream and from there to its first row, and how many row groups that read."""
    opened_groups = count_row_groups()
    started = time.perf_counter()
    data = open_stream(folder, **keys)
    opened = time.perf_counter()
    next(iter(data.loader))
    return {"open": opened - started, "row": time.perf_counter() - opened, "row groups": len(opened_groups)}


def count_row_groups() -> list[int]:
    """A list to which every row group that pyarrow's ParquetFile reads is added from now on."""
    read, opened = pq.ParquetFile.read_row_group, []

    def read_row_group(self, i, *arguments, **options):
        opened.append(i)
        return read(self, i, *arguments, **options)

    pq.ParquetFile.read_row_group = read_row_group
    return opened


def stream_speed(folder: str, **keys) -> dict:
    """Tokens a second of the loader's second pass: what it has buffered when a pass begins and ends cancels out."""
    data = open_stream(folder, per_device_train_batch_size=8, block_size=1024, **keys)
    batches, total = iter(data.loader), 0
    while passes(data) < 1:
        next(batches)
    started = time.perf_counter()
    while passes(data) < 2:
        total += next(batches)["input_ids"].numel()
    return {"rate": total / (time.perf_counter() - started)}


def copies_cost(folder: str, files: list[str], held_out: int) -> dict:
    """Seconds to ask of every document whether it is a copy of a held-out one, to tokenize it, and to compare all
    their texts whole."""
    texts = read_texts(files)
    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer/llama-32k/tokenizer.json"))
    hold_out_filter, found = HoldOutFilter(texts[:held_out]), {"documents": len(texts), "bytes": sum(map(len, texts))}
    started = time.perf_counter()
    found["copies"] = sum(map(hold_out_filter.holds, texts[held_out:]))
    found["ask"] = time.perf_counter() - started
    started = time.perf_counter()
    for text in texts[held_out:]:
        digest_of(text)
    found["hash all"] = time.perf_counter() - started
    started = time.perf_counter()
    tokenizer.encode_batch_fast(texts[held_out:], add_special_tokens=False)
    return found | {"tokenize": time.perf_counter() - started}


def read_batches(folder: str, minutes: float, **keys) -> dict:
    """Reads on for `minutes`; prints a line when the first batch is there."""
    data = open_stream(folder, per_device_train_batch_size=8, block_size=1024, dataloader_num_workers=2, **keys)
    batches = iter(data.loader)
    tokens = next(batches)["input_ids"].numel()
    print("reading", flush=True)
    started = time.perf_counter()
    while time.perf_counter() - started < 60 * minutes:
        tokens += next(batches)["input_ids"].numel()
    return {"tokens": tokens}


# --- beside it


def load_streaming(files: list[str]) -> datasets.IterableDataset:
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)


def datasets_first_row(folder: str, files: list[str], skip: int) -> dict:
    started = time.perf_counter()
    rows = load_streaming(files).skip(skip)
    opened = time.perf_counter()
    next(iter(rows))
    return {"open": opened - started, "row": time.perf_counter() - opened}


def tokenizer_speed(folder: str, files: list[str]) -> dict:
    """Tokens a second of tokenizers alone, the texts in memory: what no pipeline can exceed."""
    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer/llama-32k/tokenizer.json"))
    texts = read_texts(files)
    tokenizer.encode_batch_fast(texts[:8], add_special_tokens=False)
    started, total = time.perf_counter(), 0
    for i in range(0, len(texts), 256):
        total += sum(map(len, tokenizer.encode_batch_fast(texts[i : i + 256], add_special_tokens=False)))
    return {"rate": total / (time.perf_counter() - started)}


def stock_speed(folder: str, files: list[str], workers: int, block_size: int = 1024) -> dict:
    """Tokens a second of one pass in the way of transformers' run_clm: map(tokenize), map(group_texts), DataLoader.

    It maps 1,000 documents at a time, so batches come in bursts, and a window shorter than a pass means little.
    """
    tokenizer = AutoTokenizer.from_pretrained("tokenizer/llama-32k")

    def tokenize(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        joined = {key: list(chain(*examples[key])) for key in examples}
        length = len(joined["input_ids"]) // block_size * block_size
        result = {key: [t[i : i + block_size] for i in range(0, length, block_size)] for key, t in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    rows = load_streaming(files)
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names).map(group_texts, batched=True)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, num_workers=workers, collate_fn=default_data_collator)
    next(iter(load_streaming(files)))  # what is imported late
    started = time.perf_counter()
    total = sum(batch["input_ids"].numel() for batch in loader)
    return {"rate": total / (time.perf_counter() - started)}


def read_texts(files: list[str]) -> list[str]:
    return [text or "" for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


# --- how well is it mixed


def shuffle_quality(folder: str, files: list[str], source: str, lags: list[int], **keys) -> dict:
    """For each order: how far documents travel, and how the losses of a fixed unigram model depend on those before."""
    data = open_stream(folder, source=source, **keys)
    ids = [np.array([*ids, data.tokenizer.eos_token_id]) for ids in tokenize_all(read_texts(files), data.tokenizer)]
    counts = np.bincount(np.concatenate(ids), minlength=len(data.tokenizer)) + 1
    nats = -np.log(counts / counts.sum())

    streamed, stream_rows = [], []
    for row, is_first_pass in read_pass(data):
        streamed += row.documents
        if is_first_pass:
            stream_rows.append(nats[row.input_ids].mean())
    streamed = list(dict.fromkeys(streamed))
    members = set(streamed)  # the others' orders have the same documents: none of the hold-out

    orders = {
        "recipe's stream": streamed,
        "all documents permuted": np.random.default_rng(0).permutation(sorted(streamed)).tolist(),
        "datasets' shuffle, buffer 1,000": [i for i in buffer_shuffled(files, Path(folder)) if i in members],
        "source order": sorted(streamed),
    }
    found = {}
    for name, order in orders.items():
        tokens = np.concatenate([ids[i] for i in order])
        whole = len(tokens) // 256 * 256
        rows = stream_rows if order is streamed else nats[tokens[:whole]].reshape(-1, 256).mean(axis=1)
        losses = np.array(rows[: len(rows) // 8 * 8]).reshape(-1, 8).mean(axis=1)
        found[name] = {"travel": travel(order), "batches": len(losses), "std": float(losses.std())}
        found[name]["autocorrelation"] = [autocorrelation(losses, lag) for lag in lags]
    return found


def tokenize_all(texts: list[str], tokenizer) -> Iterator[list[int]]:
    for i in range(0, len(texts), 256):
        yield from tokenizer(texts[i : i + 256], add_special_tokens=False, verbose=False)["input_ids"]


def buffer_shuffled(files: list[str], folder: Path) -> list[int]:
    """Document indices as datasets' buffer shuffle gives them for files and row groups of these sizes."""
    copies, first = [], 0
    for number, file in enumerate(files):
        metadata = pq.read_metadata(file)
        copies.append(str(folder / f"indices-{number:05}.parquet"))
        with pq.ParquetWriter(copies[-1], pa.schema([("index", pa.int64())])) as writer:
            for group in range(metadata.num_row_groups):
                stop = first + metadata.row_group(group).num_rows
                writer.write_table(pa.table({"index": pa.array(range(first, stop), pa.int64())}))
                first = stop
    return [row["index"] for row in load_streaming(copies).shuffle(seed=42, buffer_size=1000)]


def travel(order: list[int]) -> dict:
    """Mean and quantiles of |place in the order - place in the source|, as a share of all documents."""
    places = np.argsort(np.argsort(order))
    distances = np.abs(places - np.arange(len(order))) / len(order)
    return {"mean": distances.mean().item()} | {f"{q:.0%}": np.quantile(distances, q).item() for q in (0.1, 0.5, 0.9)}


def autocorrelation(values: np.ndarray, lag: int) -> float:
    centred = values - values.mean()
    return float((centred[lag:] * centred[:-lag]).sum() / (centred**2).sum())


if __name__ == "__main__":
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # threads of pyarrow and datasets may abort the interpreter when it ends
