"""The guards' files on a disk that fails, and with many lines."""

import errno
import io
import json
import logging
import os

import pytest

from recipe.guards import records
from recipe.guards.records import append_line, keep_until, read_columns, read_lines, read_steps


@pytest.fixture
def full_disk(monkeypatch):
    """Files take so many more bytes; None: no limit."""
    room = {"bytes": None}

    class File(io.FileIO):
        def write(self, data):
            if room["bytes"] is None:
                return super().write(data)
            if room["bytes"] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(data[: room["bytes"]])
            room["bytes"] -= written
            return written

    opened = records.Path.open
    monkeypatch.setattr(
        records.Path,
        "open",
        lambda path, mode="r", **more: File(path, "a") if mode == "ab" else opened(path, mode, **more),
    )
    return room


def test_lines_wait_for_a_disk_that_is_full_and_none_is_lost_or_half_written(tmp_path, full_disk, caplog):
    path, written = tmp_path / "steps.jsonl", []
    with caplog.at_level(logging.WARNING):
        for step in range(1, 40):
            full_disk["bytes"] = None if step < 10 or step >= 30 else 5
            append_line(path, {"step": step})
            written.append(len(read_lines(path)))
            assert path.read_text().endswith("\n")
    assert [record["step"] for record in read_lines(path)] == list(range(1, 40))
    assert written[8:29] == [9] * 21 and written[29:] == list(range(30, 40))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "cannot be written" in lines[0] and "21 lines that had waited" in lines[1]


def test_a_deleted_folder_is_made_again(tmp_path):
    append_line(tmp_path / "run/steps.jsonl", {"step": 1})
    (tmp_path / "run/steps.jsonl").unlink()
    (tmp_path / "run").rmdir()
    append_line(tmp_path / "run/steps.jsonl", {"step": 2})
    assert read_lines(tmp_path / "run/steps.jsonl") == [{"step": 2}]


def test_a_file_is_cut_before_the_first_later_record(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ['{"step": 1}', "broken", '{"step": 2}', '{"step": 3}', '{"step": 2}', '{"st']
    path.write_text("\n".join(lines))
    keep_until(path, 2)
    assert path.read_text().split("\n") == [*lines[:3], ""]
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    keep_until(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_columns_and_steps_of_a_long_file_are_read_in_little_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "steps.jsonl"
    values = {"loss": 3.5, "grad_norm": 1.25, "learning_rate": 0.001, "tokens_per_second": 1000.5}
    line = json.dumps({"step": 12345, "tokens_seen": 678900, **values})
    with path.open("w") as file:
        for step in range(1, 20_001):
            file.write(line.replace("12345", str(step)) + "\n")
        file.write('{"step": "x"}\n{"step": 20001, "tokens_seen": 1, "loss": null}\n{"st')
    tracemalloc.start()
    columns, num_records, num_lines = read_columns(path, ("step", "loss"))
    steps = read_steps(path, 20_000, limit=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (num_records, num_lines, len(columns["loss"])) == (20_002, 20_003, 20_001)
    assert columns["step"][-1] == 20_001 and columns["loss"][-1] != columns["loss"][-1]
    assert [step["step"] for step in steps] == list(range(19_001, 20_001))
    assert peak < 4e6  # 20,000 records as objects take 9 MB
