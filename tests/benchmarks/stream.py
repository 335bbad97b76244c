"""Benchmarks of the data stream. Each is a function from `Options` to a `Result`; `measure.py` does the measuring."""

import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.benchmarks import measure
from tests.benchmarks.measure import run_fresh
from tests.benchmarks.results import Result
from tests.range_server import RangeServer

NUM_FILES, ROWS_PER_GROUP = 10, 1000
SHORT_KEYS = {"tokenizer": "tokenizer/llama-4k", "per_device_train_batch_size": 1}
LAGS = [1, 2, 4, 8, 32]


@dataclass(frozen=True)
class Options:
    """`folder` is for scratch files; `source` and `files` are the corpus as the recipe and as pyarrow are told of it,
    `corpus` its description. The sizes are the full measurement's."""

    folder: Path
    source: str
    files: list[str]
    corpus: str
    minutes: float
    rows: int = 10_200_000
    repeats: int = 5
    rounds: int = 3
    index_megabytes: int = 200


def write_short_rows(options: Options) -> tuple[Path, str]:
    """A folder of parquet files with many short rows, and its description."""
    folder = options.folder / "short"
    folder.mkdir()
    for indices in np.array_split(np.arange(options.rows), NUM_FILES):
        numbers = [pc.cast(pa.array(values), pa.string()) for values in (indices, indices * 2654435761 % 2**32)]
        texts = pc.binary_join_element_wise("document", *numbers, "of a few short words", " ")
        pq.write_table(pa.table({"text": texts}), folder / f"{indices[0]:09}.parquet", row_group_size=ROWS_PER_GROUP)
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return folder, (
        f"{options.rows:,} rows of about 50 characters in {NUM_FILES} parquet files, row groups of "
        f"{ROWS_PER_GROUP:,} rows, {megabytes:,.0f} MB"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def skip(options: Options) -> Result:
    """Seconds to the first row behind a skip."""
    folder, description = write_short_rows(options)
    files = sorted(map(str, folder.iterdir()))
    near, far = 10_000, options.rows // 51 * 50
    stream = {"source": f"{folder}/*.parquet", **SHORT_KEYS}
    calls = {("recipe", n): (measure.first_row, {**stream, "train_skip": n}) for n in (near, far)}
    for n in (near, 100_000, far):
        calls["datasets", n] = (measure.datasets_first_row, {"files": files, "skip": n})
    found = {key: [] for key in calls}
    for _ in range(options.repeats):
        for key, (function, arguments) in calls.items():
            found[key].append(run_fresh(function, **arguments))
    rows = []
    for (who, n), runs in found.items():
        row = {"stream": who, "skip": n} | {
            f"{part}, s": spread([run[part] for run in runs]) for part in ("open", "row")
        }
        both, nearest = (statistics.median(run["open"] + run["row"] for run in r) for r in (runs, found[who, near]))
        rows.append(
            row | {"both, s": both, "ratio to nearest": both / nearest, "row groups read": runs[0].get("row groups")}
        )
    measured = (
        f"{description}. Seconds in a fresh process with no cache of the recipe's, files in the page cache; median "
        f"(smallest to largest) of {options.repeats} alternating repeats. The recipe: `open` includes the tokenizer, "
        "the index, dealing to lanes and a hold-out of the first 20 documents; `row` is the first one, 256 tokens. "
        "`datasets`: `load_dataset(..., streaming=True).skip(N)`, then one document; nothing is tokenized."
    )
    return Result("seconds to the first row", measured, rows)


def http(options: Options) -> Result:
    """Requests and bytes to the first row behind a skip, over HTTP."""
    folder, description = write_short_rows(options)
    rows = []
    with RangeServer(folder) as server:
        urls = [f"{server.url}/{path.name}" for path in sorted(folder.iterdir())]
        stream = {"source": f"{server.url}/*.parquet", **SHORT_KEYS}
        skips = sorted({10_000, min(1_000_000, options.rows // 2), options.rows // 51 * 50})
        calls = [("recipe", n, measure.first_row, {**stream, "train_skip": n}) for n in skips]
        calls += [("datasets", n, measure.datasets_first_row, {"files": urls, "skip": n}) for n in (10_000, 100_000)]
        for who, n, function, arguments in calls:
            server.reset()
            seconds = run_fresh(function, **arguments)
            row = {"stream": who, "skip": n, **traffic(server)}
            rows.append(row | {"seconds": seconds["open"] + seconds["row"]})
    measured = (
        f"{description}, served on 127.0.0.1 with range requests; fresh processes, no cache. What the server sent "
        "until the process with the first row ended (of an answer broken off: what the sockets took): `metadata` are "
        "the bytes of parquet footers and of the listing, `data` all others. The recipe reads its hold-out too."
    )
    return Result("requests and bytes to the first row", measured, rows)


def traffic(server: RangeServer) -> dict:
    """Requests and megabytes, those of the footers apart."""
    metadata, data = 0, 0
    for request in server.requests():
        footer = footer_start(server.folder / request.path.lstrip("/"))
        before = min(request.bytes_sent, max(0, footer - request.start))
        data, metadata = data + before, metadata + request.bytes_sent - before
    return {"requests": len(server.requests()), "metadata, MB": metadata / 1e6, "data, MB": data / 1e6}


def footer_start(path: Path) -> int:
    """Where the metadata of a parquet file begins; 0 for a listing."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(-8, 2)
        return file.tell() - int.from_bytes(file.read(4), "little")


def index(options: Options) -> Result:
    """Seconds to open jsonl and text for the first and for the second time."""
    texts = measure.read_texts(options.files)
    pieces = {
        "jsonl": [json.dumps({"text": text}).encode() + b"\n" for text in texts],
        "txt": [text.encode() + b"\n<|endoftext|>\n" for text in texts],
    }
    rows = []
    for suffix in pieces:
        path = options.folder / f"index.{suffix}"
        documents = write_repeated(pieces[suffix], path, options.index_megabytes * 10**6)
        opens = {"first": [], "second": []}
        for number in range(options.rounds):
            cache = options.folder / f"cache-{suffix}-{number}"
            for seconds in opens.values():
                seconds.append(run_fresh(measure.first_row, cache, source=str(path), **SHORT_KEYS)["open"])
        row = {"format": suffix, "MB": path.stat().st_size // 10**6, "documents": documents}
        rows.append(row | {f"{which} open, s": spread(seconds) for which, seconds in opens.items()})
    measured = (
        f"{options.corpus}, its documents over and over in one file. Seconds from configuration to an open stream, "
        "with tokenizer and 20 hold-out documents, in two fresh processes that share a new cache folder; files in the "
        f"page cache; median (smallest to largest) of {options.rounds}."
    )
    return Result("opening jsonl and text", measured, rows)


def write_repeated(pieces: list[bytes], path: Path, at_least: int) -> int:
    """Writes the pieces again and again; returns how many were written."""
    count = 0
    with path.open("wb") as file:
        while file.tell() < at_least:
            file.write(pieces[count % len(pieces)])
            count += 1
    return count


def shuffle(options: Options) -> Result:
    """How well documents are mixed."""
    found = run_fresh(measure.shuffle_quality, source=options.source, files=options.files, lags=LAGS)
    rows = []
    for order, quality in found.items():
        row = {f"travel, {name}": value for name, value in quality["travel"].items()} | {"std, nats": quality["std"]}
        row |= {f"lag {lag}": r for lag, r in zip(LAGS, quality["autocorrelation"], strict=True)}
        row |= {"1/sqrt(n)": quality["batches"] ** -0.5}
        rows.append({"order": order, "batches": quality["batches"]} | {name: f"{x:.3f}" for name, x in row.items()})
    measured = (
        f"{options.corpus}; tokenizer/llama-32k. `travel`: |place of a document in the order - its place in the "
        "source| / documents, mean and quantiles. Batches of 8 rows of 256 tokens, packed in that order, are scored "
        "by one fixed unigram model of the whole corpus (add-one), mean nats a token: standard deviation and "
        "autocorrelation of the batch losses (the recipe's until its first lane wraps). Of independent batches, "
        "autocorrelations are 0 with standard error 1/sqrt(n). datasets' shuffle: seed 42, the order of files that "
        "this gives."
    )
    return Result("how far documents travel, how alike neighbouring batches are", measured, rows)


def speed(options: Options) -> Result:
    """Tokens a second from parquet to packed tensors."""
    stream, files = {"source": options.source}, {"files": options.files}
    two_threads = {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    calls = {
        "recipe, 0 workers": (measure.stream_speed, stream),
        "recipe, 1 worker": (measure.stream_speed, {**stream, "dataloader_num_workers": 1}),
        "recipe, 2 workers": (measure.stream_speed, {**stream, "dataloader_num_workers": 2}),
        "tokenizers alone, 2 threads": (measure.tokenizer_speed, {**files, "environment": two_threads}),
        "run_clm's way, 0 workers": (measure.stock_speed, {**files, "workers": 0}),
        "run_clm's way, 2 workers": (measure.stock_speed, {**files, "workers": 2}),
    }
    found = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, (function, arguments) in calls.items():
            found[name].append(run_fresh(function, **arguments)["rate"])
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    stock = max(medians[name] for name in medians if name.startswith("run_clm"))
    rows = [
        {"way": name, "tokens/s": medians[name], "smallest": min(rates), "largest": max(rates)}
        | {"ratio to run_clm's best": medians[name] / stock}
        for name, rates in found.items()
    ]
    measured = (
        f"{options.corpus}; tokenizer/llama-32k, blocks of 1,024, batches of 8; median of {options.rounds} "
        "interleaved rounds, each way in a process of its own. One whole pass: the recipe's second (its buffers are "
        "empty when the first begins), run_clm's only one (it ends with each pass). run_clm's way: `datasets` "
        "streaming, map(tokenize), map(group_texts), DataLoader; no more workers than files. tokenizers alone: "
        "`encode_batch_fast` of texts in memory."
    )
    return Result("tokens a second from parquet to packed tensors", measured, rows)


def copies(options: Options) -> Result:
    """What it costs to keep copies of held-out documents out of training."""
    runs = [run_fresh(measure.copies_cost, files=options.files, held_out=1000) for _ in range(options.rounds)]
    count, rows = runs[0]["documents"] - 1000, []
    for name, key in [("first words, then hash", "ask"), ("hash every text", "hash all"), ("tokenize", "tokenize")]:
        seconds = [run[key] for run in runs]
        share = statistics.median(run[key] / run["tokenize"] for run in runs)
        rows.append({"per document": name, "microseconds": spread([1e6 * s / count for s in seconds])})
        rows[-1]["of the time to tokenize"] = f"{share:.2%}"
    measured = (
        f"{options.corpus}; 1,000 documents held out, {runs[0]['copies']} copies of them among the others; median "
        f"(smallest to largest) of {options.rounds}. The stream does the first; tokenizers alone is beside it "
        "(`encode_batch_fast`, tokenizer/llama-32k, all threads)."
    )
    return Result("keeping copies of held-out documents out", measured, rows)


def memory(options: Options) -> Result:
    """Memory of a loader with two workers that reads on for minutes."""
    arguments = {"folder": str(options.folder), "minutes": options.minutes, "source": options.source}
    command = measure.fresh_command(measure.read_batches, **arguments)
    environment = measure.fresh_environment(options.folder)
    reader = subprocess.Popen(command, cwd=measure.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "reading\n", "the loader gave no batch"
    samples, started, main = [], time.monotonic(), psutil.Process(reader.pid)
    while (minute := (time.monotonic() - started) / 60) < options.minutes:
        workers = sum(worker.memory_info().rss for worker in main.children(recursive=True))
        samples.append((minute, main.memory_info().rss / 2**20, workers / 2**20))
        time.sleep(min(5.0, 2 * options.minutes))  # 30 samples at least
    tokens = json.loads(reader.stdout.read())["tokens"]
    reader.wait()
    minutes, mains, workers = np.array(samples).T
    rows = []
    for minute in [m for m in (1, 2, 5, 10, 30, 60) if m <= options.minutes] or [options.minutes]:
        i = np.abs(minutes - minute).argmin()
        rows.append({"minute": minute, "main, MiB": mains[i].item(), "workers, MiB": workers[i].item()})
    settled = minutes >= min(1, options.minutes / 2)
    slope, error = fit_slope(minutes[settled], (mains + workers)[settled])
    measured = (
        f"{options.corpus}, read again and again: {tokens:,} tokens in {options.minutes:g} minutes. Resident memory "
        "of the main process and of its two workers together (a page that they share counts in each), every 5 s."
    )
    note = f"Slope of the sum from minute {minutes[settled][0]:.1f} on: {slope:.2f} MiB a minute, "
    return Result("resident memory while reading", measured, rows, f"{note}standard error {error:.2f}.")


def fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error, as if the residuals were independent."""
    centred = x - x.mean()
    slope = (centred * y).sum() / (centred**2).sum()
    residuals = y - y.mean() - slope * centred
    return float(slope), float(np.sqrt((residuals**2).sum() / (len(x) - 2) / (centred**2).sum()))


BENCHMARKS = {function.__name__: function for function in (skip, http, index, shuffle, speed, copies, memory)}
