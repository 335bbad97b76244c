"""A source's token ids stand in for its text: the same rows, the same positions, the same checkpoints."""

import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import document
from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.data import token_cache
from recipe.data.pipeline import build_data
from recipe.data.source import open_source
from recipe.data.token_cache import write_token_cache
from recipe.errors import DataError, UserError
from recipe.guards.records import read_lines

TEXTS = [3 * f"{document(i)} " for i in range(240)]
TEXTS[7] = ""
SPLITS = {"eval_skip": 210, "eval_documents": 10}


@pytest.fixture(autouse=True)
def small_files(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "FILE_BYTES", 6000)  # so that a cache has several files
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))  # short samples


def write_source(folder, kind, texts=TEXTS):
    folder.mkdir()
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "txt":
        (folder / "a.txt").write_text("\n<|endoftext|>\n".join(texts))
    else:  # the row groups of a source are cut where there are fewer than four for each lane
        size = {"parquet": 10, "cut parquet": 50}[kind]
        for number, share in enumerate((texts[: len(texts) // 2], texts[len(texts) // 2 :])):
            pq.write_table(pa.table({"text": share}), folder / f"{number}.parquet", row_group_size=size)
    return str(folder)


def write_cache(config: str, folder, capsys) -> str | list:
    assert run(["tokenize", config, str(folder)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["source"]


def rows_into_the_second_pass(config: str):
    """Every row until each lane of each source is in its second pass, and the identity of the stream."""
    data = build_data(parse_config(config))
    rows = []
    for (row,) in itertools.islice(data.loader.batches(), 20_000):
        rows.append(row)
        if all(lane["pass"] for lanes in data.loader.position["lanes"] for lane in lanes):
            break
    assert rows[-1].state["pass"] == 1
    return rows, data.identity


def assert_same_rows(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids) and (a.pieces, a.state) == (b.pieces, b.state), a.number


def make_config(write_config, source, **changes):
    return write_config(source=source, per_device_train_batch_size=1, **{**SPLITS, **changes})


@pytest.mark.parametrize("kind", ["parquet", "cut parquet", "jsonl", "txt"])
def test_rows_of_a_cache_are_those_of_its_text(write_config, tmp_path, capsys, kind):
    text = make_config(write_config, write_source(tmp_path / "text", kind))
    expected, identity = rows_into_the_second_pass(text)
    cache = write_cache(text, tmp_path / "tokens", capsys)
    assert cache == str(tmp_path / "tokens") and len(list((tmp_path / "tokens").glob("*.parquet"))) > 1
    found, cache_identity = rows_into_the_second_pass(make_config(write_config, cache))
    assert_same_rows(found, expected)
    assert cache_identity == identity


def test_rows_of_several_caches_are_those_of_their_texts(write_config, tmp_path, capsys):
    a, b = (write_source(tmp_path / kind, kind) for kind in ("parquet", "jsonl"))
    source = [{"path": a, "weight": 0.7}, {"path": b, "weight": 0.3, "eval_skip": 5}]
    text = make_config(write_config, source)
    expected, identity = rows_into_the_second_pass(text)
    cache = write_cache(text, tmp_path / "tokens", capsys)
    paths = [str(tmp_path / "tokens/source-0"), str(tmp_path / "tokens/source-1")]
    assert cache == [{**entry, "path": path} for entry, path in zip(source, paths, strict=True)]
    found, cache_identity = rows_into_the_second_pass(make_config(write_config, cache))
    assert_same_rows(found, expected)
    assert cache_identity == identity


def test_copies_of_held_out_documents_are_left_out_of_both(write_config, tmp_path, capsys):
    """A copy in other case is a copy by its text, and another document by its token ids."""
    texts = [*TEXTS]
    texts[30] = texts[215].upper()
    text = make_config(write_config, write_source(tmp_path / "text", "parquet", texts))
    expected, _ = rows_into_the_second_pass(text)
    found, _ = rows_into_the_second_pass(make_config(write_config, write_cache(text, tmp_path / "tokens", capsys)))
    assert 30 not in {index for row in expected for index in row.documents}
    assert_same_rows(found, expected)


def test_documents_keep_their_index_and_come_without_eos(tmp_path, tokenizer):
    source = open_source(write_source(tmp_path / "text", "parquet", ["ab", "", "c"] * 20))
    for _ in ("written", "found complete"):
        assert write_token_cache(source, tokenizer, tmp_path / "tokens") == 60
    cache = open_source(str(tmp_path / "tokens"))
    found = [content.ids.tolist() for chunk in cache.chunks for content in cache.read_chunk(chunk)]
    assert found == [tokenizer(text)["input_ids"] for text in ["ab", "", "c"] * 20]
    assert cache.fingerprint == source.fingerprint and cache.files == source.files


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_checkpoint_of_the_text_resumes_on_the_cache(write_config, tmp_path, capsys, kind):
    changes = {**SPLITS, "source": write_source(tmp_path / "text", kind), "eval_strategy": "no", "eval_steps": None}
    text = write_config(**changes)
    assert run(["train", text]) == 0
    cache = write_cache(text, tmp_path / "tokens", capsys)
    whole = read_lines(tmp_path / "run/steps.jsonl")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    config = write_config(**{**changes, "source": cache})
    assert run(["train", config, "--resume_from_checkpoint", "latest"]) == 0
    resumed = read_lines(tmp_path / "run/steps.jsonl")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole] and len(whole) == 6


# --- what is refused


def other_tokenizer(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    vocab = stored["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return str(folder)


def test_another_tokenizer_is_refused(write_config, tmp_path, tokenizer, capsys):
    config = make_config(write_config, write_source(tmp_path / "text", "parquet"))
    cache = write_cache(config, tmp_path / "tokens", capsys)
    other = other_tokenizer(tokenizer, tmp_path / "other")
    assert run(["train", make_config(write_config, cache, tokenizer=other)]) == 2
    assert "holds token ids of another tokenizer than" in capsys.readouterr().err
    assert run(["tokenize", config, str(tmp_path / "tokens"), "--tokenizer", other]) == 2
    assert "made of another source or with another tokenizer" in capsys.readouterr().err


@pytest.fixture
def cache(tmp_path, tokenizer):
    """`write()` writes the cache of a parquet source, or goes on with it; it returns the folder."""

    def write(kind="parquet"):
        text = tmp_path / "text"
        source = open_source(str(text) if text.exists() else write_source(text, kind))
        write_token_cache(source, tokenizer, tmp_path / "tokens")
        return tmp_path / "tokens"

    return write


@pytest.mark.parametrize("number", [0, 1, -1])
def test_an_incomplete_cache_is_refused(cache, number):
    folder = cache()
    sorted(folder.iterdir())[number].unlink()
    with pytest.raises(UserError, match=r"\d+ files of a token cache that has \d+; name its"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["0-text.parquet", "z-text.parquet"])
def test_a_cache_with_a_text_file_in_it_is_refused(cache, name):
    folder = cache()
    pq.write_table(pa.table({"text": ["a"]}), folder / name)
    with pytest.raises(UserError, match="token cache"):
        open_source(str(folder))


def test_a_folder_with_other_files_is_left_alone(cache, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes\.md\); name an empty folder"):
        cache()
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["notes.md"]


def test_a_file_in_the_place_of_the_folder_is_refused(cache, tmp_path):
    (tmp_path / "tokens").write_text("mine")
    with pytest.raises(UserError, match="tokens: cannot be made"):
        cache()


def test_an_interrupted_write_goes_on_and_leaves_complete_files_alone(cache):
    folder = cache()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "tokens-00001.parquet").unlink()
    (folder / "tokens-00001.partial").write_bytes(b"half")
    cache()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in after if after[name] != times[name]} == {"tokens-00001.parquet"}


def test_a_cache_of_another_text_is_not_gone_on_with(cache, tmp_path):
    folder = cache()
    pq.write_table(pa.table({"text": ["another"] * 50}), tmp_path / "text/1.parquet")
    (folder / "tokens-00001.parquet").unlink()
    with pytest.raises(UserError, match="made of another source|holds other files"):
        cache()


def test_a_folder_that_cannot_be_made_and_a_file_that_is_no_parquet_are_one_message(tmp_path, tokenizer):
    source = open_source(write_source(tmp_path / "text", "parquet", ["ab"] * 40))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        write_token_cache(source, tokenizer, tmp_path / "file/sub")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk/tokens-00000.parquet").write_text("garbage")
    with pytest.raises(DataError, match=r"tokens-00000\.parquet: cannot be read .*; remove it"):
        write_token_cache(source, tokenizer, tmp_path / "junk")
