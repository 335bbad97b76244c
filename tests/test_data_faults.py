"""Data that fails while it is read: the network, files that change, documents that cannot be decoded, huge ones."""

import gzip
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import threading
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import document
from recipe.__main__ import run
from recipe.data import files, formats, loader
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.formats import BadDocument, TokenIds
from recipe.data.hold_out import digest_of
from recipe.data.lanes import Split
from recipe.data.loader import BatchLoader, count_bad
from recipe.data.packing import encode, load_tokenizer
from recipe.data.source import open_source
from recipe.data.stream import Part, RowStream
from recipe.errors import ENDING, DataError, UserError
from tests.benchmarks.fault_run import write_setting
from tests.forked_ranks import run_jobs
from tests.range_server import RangeServer

MARK = "MARK_OF_A_TEST"  # in the environment of a run's processes
FAULTS = ["404", "401", "403", "429", "500", "503", "close", "reset", "short", "stall", "no range", "page"]


REFUSED = "put a URL that is valid now into `source`, or log in"
SAYS = {  # in each line of the log and in the error; how to fix it
    "401": ("the server refuses it (401)", REFUSED),
    "403": ("the server refuses it (403)", REFUSED),
    "404": ("not found (404)", "replace the file, or leave it out of `source`"),
    "503": ("503", "try again when the server answers"),
    "stall": ("no answer within 0.2 s", "try again when the server answers"),
}


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.001,) * 5)
    monkeypatch.setattr(files, "STALL_SECONDS", 0.2)
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))  # short samples
    monkeypatch.setattr("recipe.trainer.words_of_sources", lambda *_: set())
    monkeypatch.setattr("recipe.data.source._num_bad", itertools.count(1))
    monkeypatch.setattr("recipe.data.source._logged", set())
    formats.close_parquet()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    texts = [document(i) for i in range(300)]
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "a.parquet", row_group_size=10, compression="none", use_dictionary=False)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in texts[:60]))
    with RangeServer(folder) as server:
        yield server


def read_all(source):
    return [content for chunk in source.chunks for content in source.read_chunk(chunk)]


# --- the network, in mid-run


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_that_passes_costs_a_line_and_no_document(server, name, how, caplog):
    source = open_source(f"{server.url}/{name}")
    expected = [source.read_chunk(chunk) for chunk in source.chunks[:3]]
    formats.close_parquet()
    server.fail_next(1 if how == "stall" else 3, how)
    with caplog.at_level(logging.WARNING):
        assert [source.read_chunk(chunk) for chunk in source.chunks[:3]] == expected
    lines = [record.getMessage() for record in caplog.records]
    assert all(f"/{name}: " in line and "trying again in 0.001 s" in line for line in lines)
    assert lines or how in ("close", "reset")  # aiohttp itself asks once more where nothing was sent yet


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_that_stays_is_one_data_error(server, name, how, caplog):
    source = open_source(f"{server.url}/{name}")
    server.fail_next(1000, how)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DataError, match=rf"{name}: cannot read documents \d+ to \d+ ") as raised,
    ):
        source.read_chunk(source.chunks[1])  # not the first: a server that ignores ranges can begin a file
    assert len(caplog.records) == len(files.RETRY_SECONDS)
    words, fix = SAYS.get(how, ("", ""))
    assert all(words in text for text in (*caplog.messages, str(raised.value))) and fix in str(raised.value)


@pytest.mark.parametrize("name", ["a.parquet", "*.parquet"])
@pytest.mark.parametrize("how", ["401", "403", "404"])
def test_what_a_server_refuses_at_the_start_is_said(server, name, how):
    server.fail_next(1000, how)
    if how == "404":
        with pytest.raises(UserError, match="no such file"):
            open_source(f"{server.url}/{name}")
    else:
        with pytest.raises(DataError, match=rf"the server refuses it \({how}\).*; put a URL that is valid now"):
            open_source(f"{server.url}/{name}")
    assert len(server.requests()) <= 4  # it is not tried again


@pytest.fixture
def no_reading_ahead(monkeypatch):
    """Documents are tokenized one by one, so that each chunk is read when its first row is due."""
    monkeypatch.setattr("recipe.data.packing.FIRST_TOKENIZE_BYTES", 1)
    monkeypatch.setattr("recipe.data.packing.TOKENIZE_BYTES", 1)


def test_a_run_whose_server_fails_saves_its_position_and_goes_on_as_if_nothing_had_happened(
    write_config, server, tmp_path, capsys, no_reading_ahead
):
    """The losses are those of a run without a failure."""
    words = ["--save_steps", "100", "--max_steps", "50"]
    path = write_config(source=f"{server.url}/a.parquet", eval_strategy="no", eval_steps=None)
    assert run(["train", path, *words, "--output_dir", str(tmp_path / "whole")]) == 0
    count = len(server.requests())
    server.reset()
    formats.close_parquet()
    server.fail_after(2 * count // 3, "503", 10**6)
    assert run(["train", path, *words]) == 4
    error = capsys.readouterr().err
    assert "Traceback (" not in error and error.count("error: ") == 1
    server.reset()
    step = json.loads((tmp_path / "run/steps.jsonl").read_text().splitlines()[-1])["step"]
    assert 0 < step < 50 and [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == [
        f"checkpoint-{step}"
    ]
    assert f"continues from checkpoint-{step}" in error
    assert run(["train", path, *words, "--resume_from_checkpoint", "latest"]) == 0
    losses = [losses_of(tmp_path / name) for name in ("run", "whole")]
    assert losses[0] == losses[1]


def losses_of(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "steps.jsonl").read_text().splitlines()]


# --- files that change


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("is_served", [False, True])
def test_a_file_that_is_rewritten_while_it_is_read_is_noticed(tmp_path, name, is_served):
    def write(text):
        texts = [f"{text} {number} " + "x" * 500 for number in range(40)]
        if name == "a.parquet":
            pq.write_table(pa.table({"text": texts}), tmp_path / name, row_group_size=10)
        else:
            lines = texts if name == "a.txt" else [json.dumps({"text": text}) for text in texts]
            (tmp_path / name).write_text(("\n<|endoftext|>\n" if name == "a.txt" else "\n").join(lines))

    write("before")
    with RangeServer(tmp_path) as server:
        source = open_source(f"{server.url}/{name}" if is_served else str(tmp_path / name))
        source.read_chunk(source.chunks[0])
        write("after!")  # of the same size
        os.utime(tmp_path / name, (1, 1))
        with pytest.raises(DataError, match=rf"{name}: the file changed while it was read .*; restore it"):
            read_all(source)


def test_a_file_that_was_touched_is_read_on_with_one_line(write_parquet, tmp_path, caplog):
    source = open_source(write_parquet(60))
    os.utime(tmp_path / "part-00.parquet", (1, 1))
    with caplog.at_level(logging.WARNING):
        assert len(read_all(source)) == 60
    (line,) = [record.getMessage() for record in caplog.records]
    assert "another date" in line


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_a_file_that_another_of_the_same_size_and_date_replaces_is_noticed(tmp_path, name, caplog):
    """While it is read, and by the caches of a later start."""

    def write(text, to):
        texts = [f"{text} {number} " + "x" * 500 for number in range(40)]
        if name == "a.parquet":
            pq.write_table(pa.table({"text": texts}), to, row_group_size=10)
        else:
            items = [json.dumps({"text": text}) for text in texts]
            to.write_text(f"[{', '.join(items)}]" if name == "a.json" else "\n".join(items))
        os.utime(to, (1, 1))

    path = tmp_path / name
    write("before", path)
    source = open_source(str(path))
    source.read_chunk(source.chunks[0])
    path.chmod(0o600)
    write("before", tmp_path / "same")
    (tmp_path / "same").replace(path)
    with caplog.at_level(logging.WARNING):
        assert read_all(source)[0].startswith("before") and not caplog.messages
    write("after!", tmp_path / "other")
    (tmp_path / "other").replace(path)
    assert read_all(open_source(str(path)))[0].startswith("after!")
    if name != "a.json":  # of which a copy is read
        with pytest.raises(DataError, match="changed while it was read"):
            read_all(source)


def test_a_token_cache_is_watched_too(write_parquet, tmp_path, tokenizer):
    from recipe.data.token_cache import write_token_cache

    write_token_cache(open_source(write_parquet(60)), tokenizer, tmp_path / "cache-of-tokens")
    source = open_source(str(tmp_path / "cache-of-tokens"))
    assert len(read_all(source)) == 60
    (tmp_path / "cache-of-tokens/tokens-00000.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="changed while it was read"):
        read_all(source)


# --- workers


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Path:
    """The folder of three runs: `threads` has workers and a tokenizer that uses threads; in `bad` one of two ranks
    reads a document that cannot be decoded; `killed` has workers, and its main process is killed."""
    folder = tmp_path_factory.mktemp("forked")
    plain = {"eval_strategy": "no", "eval_steps": None, "save_steps": 10_000}
    config, bad = write_setting(folder, max_steps=2, **plain), folder / "bad.jsonl"
    write_with_bad(bad, bad=(100, 101, 102, 103), repeat=15)
    jobs = [
        {"words": ["--dataloader_num_workers", "2"], "ranks": 1, "environment": {"TOKENIZERS_PARALLELISM": "true"}}
    ]
    words = ["--source", str(bad), "--max_steps", "4000", "--per_device_train_batch_size", "2"]
    jobs.append({"words": words, "ranks": 2, "environment": {"RECIPE_EXIT_FILE": str(folder / "exit.json")}})
    words, fault = ["--dataloader_num_workers", "2"], {"phase": "backward", "step": 1}
    jobs.append({"words": words, "ranks": 1, "environment": {MARK: str(folder)}, "fault": fault})
    for name, job in zip(("threads", "bad", "killed"), jobs, strict=True):
        job["words"] = [str(config), "--output_dir", str(folder / name), *job["words"]]
        job["log"] = str(folder / f"{name}.log")
    codes = run_jobs(jobs)
    assert codes == [[0], [4, 4], [-9]], "\n".join(Path(job["log"]).read_text()[-3000:] for job in jobs)
    return folder


def test_workers_do_not_hang_where_the_tokenizer_has_used_threads(forked):
    """Forked from a process whose tokenizer has a thread pool they would wait for it for ever."""
    assert (forked / "threads/final").is_dir()


def test_workers_end_with_a_main_process_that_is_killed(forked):
    """Their server cannot tell: each of them holds the pipe whose end would."""
    left = [process for process in psutil.process_iter() if mark_of(process) == str(forked)]
    assert psutil.wait_procs(left, timeout=60)[1] == []


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:  # it ended, or is another user's
        return None


def test_a_failure_on_one_of_two_ranks_stops_both_with_one_checkpoint(forked):
    """Only one of them reads the bad document. The other would wait for its gradients."""
    assert json.loads((forked / "exit.json").read_text())["code"] == 4
    assert len(list((forked / "bad").glob("checkpoint-*"))) == 1
    assert "Traceback" not in (forked / "bad.log").read_text()


def test_a_signal_to_all_processes_ends_no_worker(write_parquet, tokenizer):
    """As torchrun sends it to a rank's session, and Slurm to all of a job: to finish the step, rows are needed."""
    part = Part(open_source(write_parquet(300)), Split(42))
    expected = list(itertools.islice(RowStream([part], tokenizer, 32, 4), 400))
    loader = BatchLoader(RowStream([part], tokenizer, 32, 4), DataCollatorForPackedRows(256), 1, num_workers=2)
    batches = loader.batches()
    rows = next(batches)
    server = psutil.Process(forkserver._forkserver._forkserver_pid)
    workers = server.children()
    assert len(workers) == 2
    for number in ENDING:  # not from this process, which is the main process
        subprocess.run(["kill", "-s", number.name[3:], *(str(each.pid) for each in (server, *workers))], check=True)
    rows += [row for batch in itertools.islice(batches, 399) for row in batch]
    assert [row.input_ids.tolist() for row in rows] == [row.input_ids.tolist() for row in expected]
    assert server.is_running() and all(worker.is_running() for worker in workers)
    os.kill(workers[0].pid, signal.SIGTERM)  # of the main process, as DataLoader does it
    batches.close()
    assert psutil.wait_procs(workers, timeout=60)[1] == []


# --- documents that cannot be read


BAD = range(5, 270, 7)


def write_with_bad(path, bad=BAD, repeat=1):
    lines = [json.dumps({"text": document(i) * repeat}).encode() for i in range(300)]
    for i in bad:
        lines[i] = b'{"text": "\xff\xfe"}' if i % 2 else b'{"text": '
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_documents_are_the_same_and_counted_for_any_ranks_and_workers(
    tmp_path, tokenizer, world_size, num_workers, caplog
):
    path = write_with_bad(tmp_path / "a.jsonl")
    expected = list(itertools.islice(RowStream([part_of(path)], tokenizer, 32, 4), 120))
    found, states = [None] * 120, []
    for rank in range(world_size):
        stream = RowStream([part_of(path)], tokenizer, 32, 4, rank=rank, world_size=world_size)
        loader = BatchLoader(stream, DataCollatorForPackedRows(256), 1, num_workers)
        for rows in itertools.islice(loader.batches(), 120 // world_size):
            found[rows[0].number] = rows[0]
        states.append(count_bad(loader.position))
    assert [row.input_ids.tolist() for row in found] == [row.input_ids.tolist() for row in expected]
    assert not {*BAD} & {index for row in found for index in row.documents}
    lines = [line for line in caplog.messages if "skipped, as on_bad_data says" in line]
    assert len(lines) == sum(states)  # of the rows that were trained on, though more was read ahead
    last = {row.lane: row.state.get("bad", 0) for row in expected}
    assert sum(states) == sum(last.values()) >= 3


def part_of(path):
    return Part(open_source(path, on_bad_data="skip"), Split(42))


def test_the_count_survives_a_resume(tmp_path, tokenizer):
    path = write_with_bad(tmp_path / "a.jsonl")
    whole = BatchLoader(RowStream([part_of(path)], tokenizer, 32, 4), DataCollatorForPackedRows(256), 1)
    list(itertools.islice(whole, 160))
    halves = BatchLoader(RowStream([part_of(path)], tokenizer, 32, 4), DataCollatorForPackedRows(256), 1)
    list(itertools.islice(halves, 90))
    second = BatchLoader(RowStream([part_of(path)], tokenizer, 32, 4), DataCollatorForPackedRows(256), 1)
    second.position = json.loads(json.dumps(halves.position))
    list(itertools.islice(second, 70))
    assert second.position == whole.position and count_bad(whole.position) >= 3


def document_of_a_late_chunk(source, tokenizer):
    """Of the first chunk that the run of `write_config` reads after its 10th step."""
    seen = set()
    for row in RowStream([Part(source, Split(42, hold_out=(280, 290)))], tokenizer, 32, 4):
        for index in row.documents:
            chunk = next(chunk for chunk in source.chunks if index < chunk.stop_document)
            if row.number > 40 and chunk not in seen:
                return index
            seen.add(chunk)


def test_a_run_stops_at_a_bad_document_with_a_checkpoint_and_its_index(
    write_config, tmp_path, capsys, no_reading_ahead, tokenizer
):
    file = write_with_bad(tmp_path / "a.jsonl", bad=(), repeat=6)
    bad = document_of_a_late_chunk(open_source(file), tokenizer)
    lines = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
    lines[bad] = lines[bad][:15] + b"\xff" + lines[bad][16:]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    path = write_config(source=file, max_steps=100, save_steps=1000)
    assert run(["train", path, "--eval_strategy", "no", "--eval_steps", "null"]) == 4
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback (" not in error
    assert f"a.jsonl: document {bad} is not UTF-8" in error
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"continues from {checkpoint.name}" in error
    again = ["--max_steps", "20", "--on_bad_data", "skip", "--resume_from_checkpoint", "latest"]
    step = int(checkpoint.name.split("-")[1])
    again[1] = str(step + 4)
    assert run(["train", path, "--eval_strategy", "no", "--eval_steps", "null", *again]) == 0
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result["bad_documents_skipped"] >= 1
    assert "Bad documents skipped" in (tmp_path / "run/report.html").read_text()


def test_a_row_group_that_cannot_be_read_is_skipped_whole_and_a_failing_server_is_not(tmp_path, server):
    path = tmp_path / "zstd.parquet"
    table = pa.table({"text": [document(i) for i in range(60)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    data, column = bytearray(path.read_bytes()), pq.read_metadata(path).row_group(2).column(0)
    stop = column.data_page_offset + column.total_compressed_size
    data[stop - 40 : stop] = bytes(40)
    path.write_bytes(data)
    contents = read_all(open_source(str(path), on_bad_data="skip"))
    assert [i for i, content in enumerate(contents) if isinstance(content, BadDocument)] == list(range(20, 30))
    source = open_source(f"{server.url}/a.parquet", on_bad_data="skip")
    for how in ("503", "404", "page"):
        server.fail_next(1000, how)
        with pytest.raises(DataError):
            source.read_chunk(source.chunks[3])
        server.reset()


def test_token_ids_with_a_null_are_skipped_by_document(tmp_path):
    values = pa.array([[1], [2, None], [3]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    contents = read_all(open_source(str(tmp_path / "a.parquet"), on_bad_data="skip"))
    assert [isinstance(content, TokenIds) for content in contents] == [True, False, True]
    assert isinstance(contents[1], BadDocument) and contents[1] == ""


# --- huge documents


@pytest.fixture(scope="module")
def bundled():
    return load_tokenizer("tokenizer/llama-4k")


@pytest.mark.parametrize("unit", ["plain words, and é\n", "你好，世界。", "<div>x=1;</div>"])
def test_a_text_in_parts_has_the_tokens_of_the_whole(bundled, unit, monkeypatch):
    monkeypatch.setattr("recipe.data.packing.PART_CHARS", 1 << 12)
    text = (unit * 10_000)[: (1 << 14) + 999]
    whole = bundled.backend_tokenizer.encode(text, add_special_tokens=False).ids
    (parts,) = encode([text], bundled)
    assert isinstance(parts, np.ndarray)
    assert bundled.decode(parts.tolist()) == bundled.decode(whole)
    if unit.startswith("plain"):  # a place between two words was found
        assert parts.tolist() == whole


def test_a_hash_does_not_depend_on_how_many_words_are_hashed_at_once(monkeypatch):
    text = " ".join(f"Word{i}\t\x1c" for i in range(100))
    whole = digest_of(text)
    monkeypatch.setattr("recipe.data.hold_out.WORDS_AT_ONCE", 7)
    assert digest_of(text) == whole == digest_of(" ".join(text.split()).upper())


# --- files that are copied, mapped or held in memory


def lines_with_bad(bad=BAD):
    lines = [json.dumps({"text": document(i)}).encode() for i in range(300)]
    for i in bad:
        lines[i] = [b'{"text": "\xff\xfe"}', b'{"text": ', b'{"other": "x"}', b'{"text": "\\ud800"}'][i % 4]
    return b"\n".join(lines)


def array_with_bad():
    items = [{"text": document(i)} if i not in BAD else {"text": i} for i in range(300)]
    return json.dumps(items).encode()


def csv_with_bad():
    rows = [f"{i},".encode() + (b"\xff" if i in BAD else document(i).encode()) for i in range(300)]
    return b"\n".join([b"id,text", *rows])


COPIED = {
    "a.jsonl.gz": lambda: gzip.compress(lines_with_bad()),
    "a.json": array_with_bad,
    "a.csv": csv_with_bad,
}


@pytest.mark.parametrize("name", COPIED)
def test_a_bad_document_of_a_copied_file_is_skipped_counted_and_logged_or_stops(tmp_path, tokenizer, name, caplog):
    path = tmp_path / name
    path.write_bytes(COPIED[name]())
    with pytest.raises((DataError, UserError), match=rf"{name}: document 5\D"):
        open_source(str(path))
    with caplog.at_level(logging.WARNING):
        contents = read_all(open_source(str(path), on_bad_data="skip"))
    assert [i for i, content in enumerate(contents) if isinstance(content, BadDocument)] == [*BAD]
    assert all(contents[i] == document(i) for i in range(300) if i not in BAD)
    assert re.search(rf"{name}: document 5\D", contents[5].reason) and not caplog.messages
    with pytest.raises(DataError, match=rf"{name}: document 5\D"):  # the copy is there, and it stops nevertheless
        read_all(open_source(str(path)))
    loader = BatchLoader(RowStream([part_of(str(path))], tokenizer, 32, 4), DataCollatorForPackedRows(256), 1)
    list(itertools.islice(loader, 160))
    skipped = [line for line in caplog.messages if line.startswith("skipped, as on_bad_data says: ")]
    assert count_bad(loader.position) == len(skipped) >= 3


def test_a_full_disk_of_the_cache_is_named(tmp_path, server, monkeypatch, caplog):
    """It is neither the file's fault nor the network's."""
    (tmp_path / "served/b.json").write_bytes(array_with_bad())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipe.data.convert.pq.ParquetWriter", full)
    with pytest.raises(DataError, match=rf"cannot be written into {tmp_path}/cache/.*No space left.*RECIPE_CACHE"):
        open_source(f"{server.url}/b.json", on_bad_data="skip")
    assert not caplog.messages


def test_a_copied_file_in_which_all_documents_are_bad(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": 1}] * 3))
    assert read_all(open_source(str(tmp_path / "a.json"), on_bad_data="skip")) == ["", "", ""]


def test_a_copy_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(array_with_bad())
    source = open_source(str(path), on_bad_data="skip")
    read_all(source)
    pq.write_table(pa.table({"text": ["x"] * 300}), source.chunks[0].path)
    with pytest.raises(DataError, match="changed while it was read"):
        read_all(source)


def test_a_copy_is_not_named_after_the_credentials_of_its_url(tmp_path, server):
    (tmp_path / "served/b.json").write_bytes(array_with_bad())
    address = server.url.replace("://", "://user:plant'öd@")
    source = open_source(f"{address}/b.json?X-Amz-Signature=planted'é#sig=planted", on_bad_data="skip")
    assert len(read_all(source)) == 300
    (copy,) = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    reasons = pq.read_table(copy).column(formats.BAD).to_pylist()
    assert any(reasons) and not any("plant" in text for text in [copy.name, *filter(None, reasons)])


def test_a_token_cache_does_not_hold_the_credentials_of_its_source(tmp_path, server, tokenizer):
    from recipe.data.token_cache import write_token_cache

    address = server.url.replace("://", "://user:plant'öd@")
    text = open_source(f"{address}/a.parquet?sig=plant'ed")
    write_token_cache(text, tokenizer, tmp_path / "tokens")
    metadata = pq.read_metadata(tmp_path / "tokens/tokens-00000.parquet").metadata
    assert b"a.parquet" in metadata[formats.TOKEN_CACHE.encode()] and not any(
        b"plant" in each for each in metadata.values()
    )
    assert open_source(str(tmp_path / "tokens")).fingerprint == text.fingerprint


def write_arrow(path, texts):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
        for start in range(0, len(texts), 10):
            values = pa.array(texts[start : start + 10], pa.binary())
            column = pa.StringArray.from_buffers(len(values), *values.buffers()[1:], values.buffers()[0])
            writer.write_batch(pa.record_batch([column], ["text"]))


def test_a_bad_document_of_an_arrow_file_is_skipped_or_stops(tmp_path):
    texts = [document(i).encode() if i not in BAD else b"\xff" for i in range(300)]
    write_arrow(tmp_path / "a.arrow", texts)
    contents = read_all(open_source(str(tmp_path / "a.arrow"), on_bad_data="skip"))
    assert [i for i, content in enumerate(contents) if isinstance(content, BadDocument)] == [*BAD]
    with pytest.raises(DataError, match=r"a.arrow: document 5 is not UTF-8"):
        read_all(open_source(str(tmp_path / "a.arrow")))


@pytest.mark.parametrize("size", [0, None])
def test_an_arrow_file_that_is_cut_or_rewritten_in_place_is_an_error(tmp_path, size):
    """It is mapped into memory: reading where nothing is left would end the process by a signal."""
    path = tmp_path / "a.arrow"
    write_arrow(path, [document(i).encode() for i in range(300)])
    source = open_source(str(path))
    source.read_chunk(source.chunks[0])
    with path.open("r+b") as file:
        file.truncate(size) if size is not None else file.write(bytes(path.stat().st_size))
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"a.arrow: (the file changed while it was read|cannot read documents)"):
        source.read_chunk(source.chunks[20])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_documents_of_a_small_source_are_counted_too(write_config, tmp_path, name):
    """Such a source is divided by position and held in memory."""
    data = lines_with_bad(bad=range(1, 12, 3)).split(b"\n")[:12]
    (tmp_path / name).write_bytes(gzip.compress(b"\n".join(data)) if name.endswith("gz") else b"\n".join(data))
    automatic = {"eval_skip": "auto", "eval_documents": "auto", "num_lanes": "auto"}
    path = write_config(source=str(tmp_path / name), max_steps=20, eval_strategy="no", eval_steps=None, **automatic)
    assert run(["train", path, "--on_bad_data", "skip", "--save_strategy", "no"]) == 0
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result["bad_documents_skipped"] >= 1


def _begin_late(main_process: int, is_sent) -> None:
    is_sent.wait()
    loader._begin_worker((main_process, logging.WARNING, 1.0, 1.0, ()), 0)
    threading.Event().wait()


def test_a_worker_that_is_ended_while_it_starts_ends():
    """SIGTERM is pending then, since the server blocks it for all of its children."""
    context = loader.start_server()
    is_sent = context.Event()
    worker = context.Process(target=_begin_late, args=(os.getpid(), is_sent), daemon=True)
    worker.start()
    worker.terminate()
    is_sent.set()
    worker.join(60)
    assert worker.exitcode == 0
