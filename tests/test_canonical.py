"""Row g is the same for every number of ranks and workers and every split of the batch, through the real Trainer with
real processes; and no process fetches what another needs."""

import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from canonical_run import STEPS
from conftest import document
from recipe.arguments import parse_config
from recipe.data.pipeline import build_data
from recipe.guards.records import read_lines
from tests.forked_ranks import run_jobs

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 16
# workers x rows of a micro-batch x accumulation; the first two differ in the split of the batch alone
COMBINATIONS = {
    1: ["0x16x1", "0x4x4", "2x2x8"],
    4: ["0x4x1", "1x2x2"],
}
MORE_COMBINATIONS = {
    1: ["4x16x1", "1x8x2", "8x4x4"],
    2: ["0x8x1", "0x2x4", "1x4x2", "2x1x8", "4x8x1", "8x2x4"],
    4: ["0x1x4", "8x2x2", "2x1x4", "4x4x1"],
}


@pytest.mark.parametrize(
    ("world_size", "combinations"),
    [
        *COMBINATIONS.items(),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_COMBINATIONS.items()),
    ],
)
def test_every_row_and_every_read(write_config, write_parquet, tmp_path, world_size, combinations):
    # 32 lanes serve up to 4 x 8 readers; over 4 row groups for each lane, so that none is cut and read in parts. The
    # files are larger than the 64 KiB that pyarrow reads at the end of each for its footer.
    path = write_config(
        source=str(tmp_path / "part-*.parquet"),
        num_lanes=32,
        eval_skip=1390,
        eval_documents=10,
        eval_strategy="no",
        eval_steps=None,
    )
    texts = [document(i) * 5 for i in range(1400)]
    write_parquet(0, rows_per_group=4, num_files=2, texts=texts)  # over the config's own small source
    out = tmp_path / "out"
    out.mkdir()
    launch(world_size, path, out, combinations)
    expected = canonical_rows(path)
    sizes = {name: row_group_bytes(name) for name in (tmp_path / "part-00.parquet", tmp_path / "part-01.parquet")}
    for combination in combinations:
        assert rows_of_run(out, combination, world_size) == expected, combination
        check_reads(out, combination, world_size, sizes)


def launch(world_size: int, config: str, out: Path, combinations: list[str]) -> None:
    if world_size > 1:
        words = [config, str(out), *combinations]
        job = {"module": "tests.canonical_run", "words": words, "ranks": world_size, "log": str(out / "log")}
        assert run_jobs([job]) == [[0] * world_size], (out / "log").read_text()[-3000:]
        return
    command = [sys.executable, str(ROOT / "tests/canonical_run.py"), config, str(out), *combinations]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def canonical_rows(path: str) -> list[list[int]]:
    """The first rows of the run as one process without workers reads them."""
    stream = build_data(parse_config(path, ["--use_cpu", "true", "--bf16", "false"])).loader.dataset
    return [row.input_ids.tolist() for row in itertools.islice(stream, STEPS * GLOBAL_BATCH)]


def rows_of_run(out: Path, combination: str, world_size: int) -> list[list[int]]:
    """What was trained on, in the order that DESIGN gives it: row i of micro-batch m on rank r of W is row W(mB + i) +
    r."""
    ranks = [json.loads((out / f"rows-{combination}-{rank}.json").read_text()) for rank in range(world_size)]
    shares = [[row for micro_batch in rank for row in micro_batch] for rank in ranks]
    return [row for together in zip(*shares, strict=True) for row in together]


def row_group_bytes(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).column(0).total_compressed_size for i in range(metadata.num_row_groups)]


def check_reads(out: Path, combination: str, world_size: int, sizes: dict[Path, list[int]]) -> None:
    logs = {log: read_lines(log) for log in out.glob(f"reads-{combination}-*.jsonl")}
    assert len(logs) == world_size * max(1, int(combination.split("x")[0])), "every reader has read, and nobody else"
    readers = defaultdict(set)
    for log, records in logs.items():
        for record in records:
            readers[record["path"], record["row_group"]].add(log)
        needed = sum(sizes[Path(record["path"])][record["row_group"]] for record in records)
        footers = sum(
            (1 << 16) + path.stat().st_size - sum(groups) for path, groups in sizes.items()
        )  # read at opening
        assert sum(record["bytes"] for record in records) <= needed + footers
    assert all(len(who) == 1 for who in readers.values()), "a row group was fetched by two processes"
