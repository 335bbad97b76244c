"""Own text on the first try: formats and sizes that people have, and fixes that errors propose, applied."""

import bz2
import gzip
import json
import lzma
import re
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from conftest import document
from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.data import pipeline
from recipe.data.fitting import HOLD_OUT_START, LANE_BLOCKS, Wish, fit, hold_out_of
from recipe.data.formats import Chunk, TokenIds
from recipe.data.hold_out import digest_of
from recipe.data.lanes import Split, deal_chunks, read_lane, start_of_lane
from recipe.data.source import Source, open_source
from recipe.data.stream import Part
from recipe.errors import UserError
from recipe.results import describe_hold_out

TEXTS = [f"{document(i)}\nä line" for i in range(400)]
AUTO = {"eval_skip": "auto", "eval_documents": "auto", "num_lanes": "auto"}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))  # short samples


def read_all(source):
    return [content for chunk in source.chunks for content in source.read_chunk(chunk)]


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines_of(texts, key="text") -> str:
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


# --- formats


LINES, ARRAY = lines_of(TEXTS), json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)])
CSV = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.jsonl", ARRAY),
        ("a.jsonl", json.dumps(json.loads(ARRAY), indent=2)),
        ("a.jsonl", "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS)),
        ("a.json", json.dumps(TEXTS)),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16-le")),
        ("a.jsonl", LINES.encode("utf-32")),
        ("a.jsonl", LINES.replace("\n", "\r")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl", gzip.compress(LINES[:999].encode(), mtime=0) + gzip.compress(LINES[999:].encode(), mtime=0)),
        ("a.json.bz2", bz2.compress(ARRAY.encode())),
        ("a.json.xz", lzma.compress(ARRAY.encode())),
        ("a.jsonl.zst", pa.Codec("zstd").compress(LINES.encode(), asbytes=True)),
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace("\r\nä", "\nä")),
        ("a.csv", CSV.replace(",", ";")),
        ("a.tsv.gz", gzip.compress(CSV.replace(",", "\t").encode(), mtime=0)),
    ],
)
def test_a_format_is_read_whatever_its_name(tmp_path, name, data):
    source = open_source(str(put(tmp_path / name, data)))
    assert read_all(source) == TEXTS
    assert open_source(str(tmp_path / name)) == source  # from the cache
    assert source.files[0].path == str(tmp_path / name)


@pytest.mark.parametrize(
    ("encoding", "newline"), [("utf-8", "\n"), ("utf-8", "\r"), ("utf-16", "\n"), ("utf-16-be", "\r\n")]
)
def test_text_in_other_encodings_and_line_ends(tmp_path, encoding, newline):
    text = "\n<|endoftext|>\n".join(TEXTS).replace("\n", newline)
    assert read_all(open_source(str(put(tmp_path / "a.txt", text.encode(encoding))))) == TEXTS


def test_a_conversion_follows_the_file_and_its_fingerprint_the_content(tmp_path):
    path = put(tmp_path / "a.json", json.dumps([{"text": "a"}, {"text": None}]))
    first = open_source(str(path))
    assert read_all(first) == ["a", ""]
    put(path, json.dumps([{"text": "b"}, {"text": ""}]))
    assert read_all(open_source(str(path))) == ["b", ""] and open_source(str(path)).fingerprint != first.fingerprint


def test_token_ids_in_a_json_array(tmp_path):
    path = put(tmp_path / "a.json", json.dumps([{"text": [1, 2]}, {"text": [3]}]))
    assert [content.ids.tolist() for content in read_all(open_source(str(path)))] == [[1, 2], [3]]


@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_folders_of_save_to_disk(tmp_path, splits):
    from datasets import Dataset, DatasetDict

    saved = {name: Dataset.from_dict({"text": TEXTS if name == "train" else ["test"]}) for name in splits}
    (DatasetDict(saved) if len(splits) > 1 else saved["train"]).save_to_disk(tmp_path / "saved")
    assert read_all(open_source(str(tmp_path / "saved"))) == TEXTS
    file = next((tmp_path / "saved").rglob("*.arrow" if len(splits) == 1 else "train/*.arrow"))
    source = open_source(str(file))
    assert read_all(source) == TEXTS and source.can_be_cut


def test_a_feather_file(tmp_path):
    pa.feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "a.arrow", chunksize=50, compression="uncompressed")
    source = open_source(str(tmp_path / "a.arrow"))
    assert read_all(source) == TEXTS and len(source.chunks) == 8


def test_a_cloned_hub_dataset_is_its_train_split_without_its_card(tmp_path, caplog):
    caplog.set_level("INFO")
    for name, texts in {"data/train-00000-of-00001": TEXTS, "data/test-00000-of-00001": ["no"]}.items():
        put(tmp_path / "hub" / f"{name}.parquet", b"")
        pq.write_table(pa.table({"text": texts}), tmp_path / "hub" / f"{name}.parquet")
    for name in ("README.md", "LICENSE.txt", ".cache/huggingface/download/data/x.jsonl", ".gitattributes"):
        put(tmp_path / "hub" / name, "no training text\n")
    assert read_all(open_source(str(tmp_path / "hub"))) == TEXTS
    assert "reading 1 of its files, not LICENSE.txt, README.md, data/test-00000-of-00001.parquet" in caplog.text


def test_a_folder_of_text_leaves_out_the_readme_and_a_named_one_is_read(tmp_path):
    for name in ("a.txt", "b.md", "README.md", "contest.txt"):
        put(tmp_path / "books" / name, name)
    assert read_all(open_source(str(tmp_path / "books"))) == ["a.txt", "b.md", "contest.txt"]
    assert read_all(open_source(str(tmp_path / "books/README.md"))) == ["README.md"]


# --- hold-out and lanes


def wish_for(block_size=16, train_skip=0, share=1.0, **changes) -> Wish:
    values = {**AUTO, **changes}
    return Wish(train_skip, share=share, block_size=block_size, count_tokens=len, **values)


def source_of(texts, size=1) -> Source:
    chunks = [Chunk("a", 0, 1, size * len(text), number) for number, text in enumerate(texts)]
    return Source("a", "text", tuple(chunks), (), "f", False, contents=tuple(texts))


@pytest.mark.parametrize(
    ("count", "changes", "expected"),
    [
        (300_000, {}, (100_000, 101_000)),
        (300_000, {"share": 0.25}, (100_000, 100_250)),
        (100_400, {}, (100_000, 100_400)),
        (100_000, {}, (99_000, 100_000)),
        (5_000, {}, (4_950, 5_000)),
        (150, {}, (148, 150)),  # 1 % is two documents
        (150, {"block_size": 60}, (144, 150)),  # one block is six
        (300_000, {"eval_skip": 5}, (5, 1005)),
        (1_000, {"eval_skip": 900}, (900, 1000)),
        (1_000, {"eval_documents": 30}, (970, 1000)),
        (300_000, {"eval_documents": 30}, (100_000, 100_030)),
    ],
)
def test_the_default_hold_out(count, changes, expected):
    chunk = Chunk("a", 0, count, 10 * count)

    class Counted(Source):
        def read_chunk(self, chunk):
            return ["ten chars."] * chunk.num_documents

    source = Counted("a", "text", (chunk,), (), "", False)
    assert hold_out_of(source, wish_for(**changes)) == expected


def test_the_demo_keeps_the_hold_out_of_its_reference(write_parquet):
    source = Source("docstrings", "text", (Chunk("a", 0, 12_000, 1),), (), "", True)
    assert hold_out_of(source, wish_for()) == (5000, 5100)
    assert HOLD_OUT_START == 100_000


NOVEL = " ".join(f"word{i}" for i in range(6000))
ODD = {
    "one document": [NOVEL],
    "one document without a space": ["x" * 20_000 + "y" * 20_000],
    "three documents": [NOVEL[:9000], NOVEL[9000:20_000], NOVEL[20_000:]],
    "a huge one among small ones": [*TEXTS[:10], NOVEL, *TEXTS[40:50]],
    "a huge one at the end": [*TEXTS[:20], NOVEL],
    "few small ones": TEXTS[:12],
    "empty ones among them": ["", NOVEL[:700], "", "", NOVEL[700:1500], ""],
    "copies": [*TEXTS[:9], TEXTS[8], TEXTS[8].upper()],
    "token ids": [TokenIds(np.arange(9000, dtype=np.int32))],
}


def joined(contents):
    if isinstance(contents[0], TokenIds):
        return np.concatenate([content.ids for content in contents]).tolist()
    return "".join(contents)


@pytest.mark.parametrize("kind", ODD)
def test_a_small_source_is_divided_by_position_and_nothing_is_lost(kind):
    texts = ODD[kind]
    fitted = fit(source_of(texts), wish_for())
    pieces, stop = read_all(fitted.source), fitted.eval_skip + fitted.eval_documents
    held, train = pieces[fitted.eval_skip : stop], pieces[: fitted.eval_skip]
    assert stop == len(pieces) == fitted.source.num_documents and fitted.source.num_divided == len(texts)
    size, total = sum(map(len, held)), sum(map(len, texts))
    assert size >= 16 and size <= max(0.021 * total, 65)
    if kind == "copies":
        assert not {text.casefold() for text in held} & {text.casefold() for text in train}
    else:
        assert joined(pieces) == joined(texts)
    assert fitted.num_lanes == 32 or total < 2 * fitted.num_lanes * LANE_BLOCKS * 16 + 2 * size
    lanes = [0] * fitted.num_lanes  # as balanced as a lane that takes the next longest piece whenever it is shortest
    for length in sorted(map(len, train), reverse=True):
        lanes[lanes.index(min(lanes))] += length
    assert min(lanes) > 0.4 * max(lanes)
    again = fit(source_of(texts), wish_for()).source
    assert list(map(digest_of, again.contents)) == list(map(digest_of, pieces))


def test_a_text_without_separators_is_divided_at_one_percent(tmp_path, caplog):
    paragraphs = [f"{document(i)}\n\n" for i in range(6000)]
    source = open_source(str(put(tmp_path / "a.txt", "".join(paragraphs))))
    assert 8 < source.num_documents < 20  # one for each 32 KiB
    fitted = fit(source, wish_for(64))
    held = sum(chunk.num_bytes for chunk in fitted.source.chunks[fitted.eval_skip :])
    assert held == pytest.approx(0.01 * source.num_bytes, rel=0.05)
    split = Split(0, hold_out=(fitted.eval_skip, fitted.source.num_documents))
    assert describe_hold_out(Part(fitted.source, split)) == "the last 1.0% of the text"


@pytest.mark.parametrize("empty", ["", None])
def test_no_lane_is_left_without_text(tmp_path, empty):
    texts = [text * 50 if i % 2 else empty for i, text in enumerate(TEXTS)]
    source = open_source(str(put(tmp_path / "a.jsonl", lines_of(texts))))
    fitted = fit(source, wish_for())
    assert fitted.num_lanes == 32
    stop = fitted.eval_skip + fitted.eval_documents
    split = Split(0, hold_out=(fitted.eval_skip, stop))
    for lane, chunks in enumerate(deal_chunks(fitted.source, split, 32)):
        documents = read_lane(fitted.source, chunks, split, lane, start_of_lane())  # ends after a pass without text
        assert next(document for document in documents if document.content)


def test_explicit_offsets_count_documents_and_move_with_the_division():
    texts = [TEXTS[0], NOVEL, *TEXTS[1:9]]
    fitted = fit(source_of(texts), wish_for(train_skip=1, eval_skip=4, eval_documents=2, num_lanes=8))
    pieces = read_all(fitted.source)
    assert fitted.num_lanes == 8 and fitted.train_skip == 1 and fitted.eval_skip > 10
    assert pieces[fitted.eval_skip : fitted.eval_skip + fitted.eval_documents] == texts[4:6]
    assert joined(pieces[1:]) == joined(texts[1:])


def build(write_config, source, *more, **changes):
    config = parse_config(write_config(source=str(source), **{**AUTO, **changes}), more)
    return pipeline.build_data(config)


def rows_of(data, count):
    return [row.input_ids.tolist() for batch in islice(data.loader.batches(), count) for row in batch]


def test_a_source_that_fits_keeps_the_order_it_always_had(write_config, write_parquet):
    path = write_parquet(300)
    fixed = build(write_config, path, num_lanes=32, eval_skip=297, eval_documents=3)
    data = build(write_config, path)
    assert rows_of(data, 40) == rows_of(fixed, 40)
    for each in (data, fixed):
        each.identity["source 0"].pop("files")  # written again, so of another date
    assert data.identity == fixed.identity and data.identity["num_lanes"] == 32
    assert not data.sources[0].contents


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_divided_source_resume_and_do_not_depend_on_workers(write_config, tmp_path, workers):
    path = put(tmp_path / "novel.txt", NOVEL)
    data = build(write_config, path)
    assert data.identity["num_lanes"] == 32 and data.identity["source 0"]["pieces"]
    expected = rows_of(data, 24)
    first = build(write_config, path, "--dataloader_num_workers", str(workers))
    before = rows_of(first, 9)
    again = build(write_config, path, "--dataloader_num_workers", str(workers))
    again.loader.position = first.loader.position
    assert before + rows_of(again, 15) == expected


def test_workers_adapt_to_the_lanes_and_the_run_says_how_many(write_config, tmp_path):
    path = put(tmp_path / "tiny.txt", NOVEL[:600])
    assert run(["train", write_config(source=str(path), **AUTO, max_steps=1), "--dataloader_num_workers", "2"]) == 0
    told = json.loads((tmp_path / "run/run.json").read_text())
    assert told["source"]["num_lanes"] == 1 and told["arguments"]["num_lanes"] == "auto"
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/stream_state.json")).read_text())
    assert state["identity"]["num_lanes"] == 1


def test_a_mixture_takes_the_fewest_lanes(write_config, write_parquet, tmp_path):
    tiny = put(tmp_path / "tiny.txt", NOVEL[:3000])
    sources = json.dumps([{"path": write_parquet(300)}, {"path": str(tiny)}])
    data = build(write_config, "x", "--source", sources)
    assert data.loader.dataset.num_lanes == fit(open_source(str(tiny)), wish_for(32)).num_lanes < 32
    rows_of(data, 10)


# --- the fixes that errors propose


def corpus(folder: Path, texts, **columns) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({**columns, "text": texts}), folder / "a.parquet")
    return folder / "a.parquet"


def archive(path: Path, kind: str) -> Path:
    text = put(path.parent / "in/a.txt", NOVEL)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.write(text, "a.txt")
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as file:
            file.add(text, "a.txt")
    return path


MIXED = [(text * 10, "text" if i % 2 else "body") for i, text in enumerate(TEXTS[:120])]
FAILS = {  # what is put into the folder, and the words that fail
    "column of parquet": lambda d: [corpus(d, TEXTS, id=range(400)), "--text_column", "body"],
    "column of csv": lambda d: [put(d / "a.csv", CSV.replace("id,text", "id,content"))],
    "tab-separated column": lambda d: [put(d / "a.csv", CSV.replace("id,text", "id,my words").replace(",", "\t"))],
    "key of jsonl": lambda d: [put(d / "a.jsonl", lines_of(TEXTS, "txt"))],
    "key of a json array": lambda d: [put(d / "a.json", json.dumps([{"in": "", "n": 1, "out": t} for t in TEXTS]))],
    "key of some lines": lambda d: [put(d / "a.jsonl", "".join(lines_of([text], key) for text, key in MIXED))],
    "key of some of an array": lambda d: [put(d / "a.json", json.dumps([{key: text} for text, key in MIXED]))],
    "key of the others": lambda d: [put(d / "a.jsonl", lines_of(TEXTS[:5], "body") + lines_of(TEXTS[5:], "txt"))],
    "a readme alone": lambda d: [put(d / "x/README.md", NOVEL).parent],
    "a chat beside text": lambda d: [put(d / "a.jsonl", lines_of([["no"]], "messages") + LINES)],
    "hold-out after the end": lambda d: [corpus(d, TEXTS), "--eval_skip", "5000"],
    "hold-out longer than the source": lambda d: [put(d / "a.txt", NOVEL), "--eval_documents", "100"],
    "hold-out of everything": lambda d: [corpus(d, TEXTS), "--eval_skip", "0", "--eval_documents", "400"],
    "train_skip after the end": lambda d: [corpus(d, TEXTS), "--train_skip", "400"],
    "train_skip after the end of a small one": lambda d: [put(d / "a.txt", NOVEL), "--train_skip", "4"],
    "hold-out under a block": lambda d: [corpus(d, ["a b"] * 50 + TEXTS), "--eval_skip", "0", "--eval_documents", "2"],
    "hold-out under a block, small": lambda d: [
        put(d / "a.jsonl", lines_of(["a", *TEXTS[:9]])), "--eval_skip", "0", "--eval_documents", "1",
    ],
    "too few tokens": lambda d: [put(d / "a.txt", NOVEL[:60])],
    "too few tokens, explicit hold-out": lambda d: [
        put(d / "a.jsonl", lines_of([f"{i} {i + 1}" for i in range(10)])), "--eval_skip", "0", "--eval_documents", "4",
    ],
    "too many lanes": lambda d: [put(d / "a.jsonl", lines_of(["ab", "cd", *TEXTS[:3]])), "--num_lanes", "1024"],
    "workers and lanes": lambda d: [corpus(d, TEXTS), "--num_lanes", "2", "--dataloader_num_workers", "3"],
    "two kinds of files": lambda d: [
        corpus(d / "x", TEXTS).parent, put(d / "x/b.txt", "b"), put(d / "x/c.txt", NOVEL),
    ],
    "two kinds in folders": lambda d: [
        corpus(d / "x", TEXTS).parent, put(d / "x/s/b.jsonl", LINES), put(d / "x/t/b.jsonl", lines_of(TEXTS[:9])),
    ],
    "a name that is nearly right": lambda d: [d / "my.tx", put(d / "my.txt", NOVEL)],
    "docstring": lambda d: ["docstring"],
    "the hub offline": lambda d: ["hf://owner/name"],
    "zip": lambda d: [archive(d / "my.zip", "zip")],
    "tar": lambda d: [archive(d / "my.tar", "tar")],
    "tgz": lambda d: [archive(d / "my data.tgz", "tgz")],
    "Windows-1252": lambda d: [put(d / "a.txt", f"café {NOVEL}".encode("latin-1"))],
    "a misspelt key": lambda d: [corpus(d, TEXTS), "--eval_document", "3"],
}  # fmt: skip


def proposals(message: str) -> list[tuple[str, list[str]]]:
    """The fixes in an error: a command of the shell if it has one, and words of the command line."""
    command = "".join(re.findall(r"(?:unpack it: |Windows-1252: )(.*?)(?:, then .*)?$", message, re.M))
    target = re.findall(r"> (\S+)$", command)
    if target:
        return [(command, ["--source", *shlex.split(target[0])])]
    key = re.findall(r"^  (--\w+): unknown key; did you mean (\w+)\?", message, re.M)
    if key:
        return [("", ["rename", key[0][0], f"--{key[0][1]}"])]
    numbers = re.findall(r"^  (--\w+): .*; ([\d, ]+) would do$", message, re.M)
    if numbers:
        return [("", [numbers[0][0], number]) for number in numbers[0][1].split(", ")]
    found = re.findall(
        r"--\w+ (?:'[^']*'|[^\s?;,]+)(?: --\w+ (?:'[^']*'|[^\s?;,]+))*", message[len(command) :] or message
    )
    return [(command, shlex.split(words)) for words in found]


def apply(words: list[str], fix: list[str]) -> list[str]:
    if fix[0] == "rename":
        return [fix[2] if word == fix[1] else word for word in words]
    given = dict(zip(words[::2], words[1::2], strict=True)) | dict(zip(fix[::2], fix[1::2], strict=True))
    return [word for pair in given.items() for word in pair]


@pytest.mark.parametrize("case", FAILS)
def test_a_proposed_fix_works(case, write_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipe.data.source.build_docstring_corpus", lambda: demo)
    monkeypatch.setattr("recipe.data.source.corpus_info", lambda path: {"content_hash": "x"})
    demo = corpus(tmp_path / "demo", [document(i) for i in range(5200)])
    (tmp_path / "own").mkdir()
    source, *words = [
        word for word in FAILS[case](tmp_path / "own") if isinstance(word, str) or FAILS[case] is not None
    ]
    words = ["--source", str(source), *(word for word in words if isinstance(word, str))]
    path = write_config(**AUTO, max_steps=1, save_strategy="no", eval_strategy="no", eval_steps=None)
    assert run(["train", path, *words]) in (2, 4)
    message = capsys.readouterr().err
    fixes = proposals(message)
    assert fixes and "Traceback" not in message, message
    for command, fix in fixes:
        if command:
            subprocess.run(command, shell=True, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
        fixed = apply(words, fix)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert run(["train", path, *fixed]) == 0, (message, fixed, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", "\n" * 500, "no text in 1 document"),
        ("a.jsonl", lines_of([NOVEL[:500]] * 400), "the same as a held-out one"),
        ("a.jsonl", lines_of([TEXTS[3]] * 400), "the same as a held-out one"),
        ("a.jsonl", lines_of(["a b c", "d e f"] * 30), "has 12 tokens of different text, .*; it needs more text"),
        ("a.txt", "ten tokens", "it needs more text"),
        (
            "a.json",
            json.dumps({"data": [{"text": "a"}]}),
            "has no key 'text'; it has data; if its documents are in 'data'",
        ),
        ("a.jsonl", lines_of([[{"role": "user", "content": "hi"}]], "messages"), "it has messages; a chat is no text"),
        ("a.csv", '"A long first line, that is text"\n' * 9, "the first line names no column 'text'; it has A long"),
        ("a.csv", f'1,"{NOVEL[:99]}"\n' * 9, "'1, word0 word1 .* if that is text, put a line with the names"),
        ("a.txt", b"%PDF-1.7 " + bytes(99), "is a PDF, not text"),
        ("a.txt", b"PK\x03\x04" + bytes(99), "is a zip archive or office document"),
    ],
)
def test_what_no_option_can_fix_is_refused_by_its_reason(write_config, tmp_path, capsys, name, data, reason):
    path = put(tmp_path / name, data)
    assert run(["train", write_config(source=str(path), **AUTO)]) == 2
    error = capsys.readouterr().err
    assert (
        re.search(reason, error)
        and error.count("error: ") == 1
        and "would do" not in error
        and "Traceback" not in error
    )


@pytest.mark.parametrize(
    ("files", "source", "reason"),
    [
        (
            ["README.md"],
            "x",
            r"only README.md, which is no training .* to read it, --source \S+x/README.md$",
        ),
        ([".cache/a.txt"], "x", "the folder has hidden files only: .cache/a.txt; a source is"),
        (["a.docx", "b.xml"], "x", "no data file, but .docx, .xml; plain text must be named .txt"),
        (["a.txt", "b.txt"], "x/nope*.txt", "no file matches; the folder has a.txt, b.txt$"),
        ([], "x/nope*.txt", "no such file; a source is"),
    ],
)
def test_why_there_is_no_file(tmp_path, files, source, reason):
    for name in files:
        put(tmp_path / "x" / name, "text")
    with pytest.raises(UserError, match=reason):
        open_source(str(tmp_path / source))


def test_the_first_command_of_the_readme_trains_on_a_text_file(tmp_path, caplog):
    """The shipped config with nothing but a source, as a user starts it."""
    path = put(tmp_path / "my.txt", NOVEL)
    words = ["--source", str(path), "--max_steps", "1", "--output_dir", str(tmp_path / "run"), "--eval_strategy", "no"]
    config = Path(__file__).parents[1] / "recipe/configs/cpu_demo.json"
    caplog.set_level("INFO")
    assert run(["train", str(config), *words, "--eval_steps", "null"]) == 0
    assert "1 document, divided into" in caplog.text and "cannot be" not in caplog.text


def test_no_copy_of_a_document_that_is_cut_for_the_hold_out_is_trained_on():
    texts = [NOVEL, NOVEL.upper(), "other words " * 300, NOVEL]
    fitted = fit(source_of(texts), wish_for())
    pieces = read_all(fitted.source)
    held, train = joined(pieces[fitted.eval_skip :]), joined(pieces[: fitted.eval_skip])
    assert NOVEL.endswith(held) and held.casefold() not in train.casefold() and NOVEL[: -len(held)] in train
