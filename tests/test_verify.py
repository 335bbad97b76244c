"""`verify-data`: silent on sound data, and each seeded fault is found."""

import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.data import lanes, pipeline, stream
from recipe.data.packing import LaneState, Piece, Row
from recipe.errors import UserError
from recipe.verify import Reading, find_problems, format_result, verify_data


def verify(capsys, *words) -> tuple[int, dict]:
    code = run(["verify-data", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def made_up(count: int) -> list[str]:
    """Texts of 80 letters without a common passage."""
    letters = random.Random(0)
    return ["".join(letters.choices("abcdefghij ", k=80)) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_sound_data_passes_and_is_described(write_config, capsys, tmp_path, workers):
    code, result = verify(capsys, write_config(), "--num_batches", 40, "--workers", workers)
    assert code == 0 and result["findings"] == []
    assert (result["blocks"], result["tokens"], result["passes"]) == (160, 160 * 32, 1)
    assert result["duplicate_blocks"] == result["documents_read_twice"] == result["hold_out_hits"] == 0
    assert result["tokens_by_file"] == {str(tmp_path / "part-00.parquet"): 160 * 32}
    assert result["tokens_per_second"] > 0 and result["sample"].startswith("<")


def test_it_reads_on_into_further_passes_without_crying_wolf(write_config, write_parquet, capsys):
    path = write_config()
    write_parquet(0, texts=made_up(300))
    code, result = verify(capsys, path, "--num_batches", 900)
    assert code == 0 and result["passes"] > 2
    assert result["documents"] == 290  # all but the hold-out


def test_documents_that_are_skipped_are_counted_for_any_workers(write_config, capsys, tmp_path):
    lines = [json.dumps({"text": text}).encode() for text in made_up(300)]
    lines[3:250:13] = [b"{"] * len(lines[3:250:13])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    words = [write_config(source=str(tmp_path / "a.jsonl")), "--num_batches", "60"]
    assert run(["verify-data", *words]) == 4  # the default is to stop
    (_, alone), (code, result) = (verify(capsys, *words, "--on_bad_data", "skip", "--workers", n) for n in (0, 2))
    assert code == 0 and result["bad_documents_skipped"] == alone["bad_documents_skipped"] >= 3
    assert f"bad documents skipped      {result['bad_documents_skipped']} that" in format_result(result)


def test_people_get_a_table(write_config, capsys):
    assert run(["verify-data", write_config(), "--num_batches", "3"]) == 0
    out = capsys.readouterr().out
    assert "documents read twice       0" in out and "100.00%" in out and "tokens/s" in out


def test_equal_texts_are_reported_and_not_punished(write_config, write_parquet, capsys):
    path = write_config()
    write_parquet(0, texts=made_up(150) * 2)
    code, result = verify(capsys, path, "--num_batches", 150)
    assert code == 0 and result["equal_texts"] > 20 and result["duplicate_blocks_of_equal_texts"] > 0
    first = result["equal_text_examples"][0]
    assert len(first) == 2 and all(place.endswith("]") for place in first)


def test_copies_of_held_out_documents_are_kept_out_whatever_their_case_and_spaces(write_config, write_parquet, capsys):
    path = write_config()
    texts = made_up(300)
    texts[5], texts[77] = texts[285], f"  {texts[286].upper()}\n\n"  # the hold-out is 280 to 289
    write_parquet(0, texts=texts)
    code, result = verify(capsys, path, "--num_batches", 600)
    assert (code, result["copies_kept_out"], result["hold_out_hits"]) == (0, 2, 0)
    assert result["documents"] == 288


def test_a_stream_that_reads_the_hold_out_is_found(write_config, write_parquet, capsys, monkeypatch):
    path = write_config()
    write_parquet(0, texts=made_up(300))
    splits = pipeline.train_and_eval_splits

    def overlapping(source, **offsets):
        train, held_out = splits(source, **offsets)
        return replace(train, hold_out=(0, 0)), held_out

    monkeypatch.setattr(pipeline, "train_and_eval_splits", overlapping)
    monkeypatch.setattr(stream, "read_lane", lambda *arguments: lanes.read_lane(*arguments[:5]))  # nor copies kept out
    code, result = verify(capsys, path, "--num_batches", 500)
    assert code == 3 and result["hold_out_hits"] == 10
    assert [finding["id"] for finding in result["findings"]] == ["train_eval_overlap"]
    assert "[280]" in result["findings"][0]["found"]
    assert run(["verify-data", path, "--num_batches", "500"]) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("ERROR train_eval_overlap | step 0 | found 10 held-out")


def test_the_original_bug_is_found_documents_that_come_round_again(write_config, capsys, monkeypatch):
    read_chunks = lanes.shuffled
    monkeypatch.setattr(lanes, "shuffled", lambda items, *key: read_chunks(items[:4], *key) * 3)
    code, result = verify(capsys, write_config(), "--num_batches", 150)
    assert code == 3 and result["documents_read_twice"] > 0
    assert [finding["id"] for finding in result["findings"]] == ["repeated_data"]


def row(*pieces, lane=0, ids=b"") -> Row:
    return Row(
        np.frombuffer(ids, np.uint8), tuple(Piece(*piece) for piece in pieces), LaneState({"pass": 0}), lane=lane
    )


def test_a_document_over_several_rows_is_read_once():
    reading = Reading()
    for number, pieces in enumerate([[(7, 0, 0, 4)], [(7, 0, 4, 4)], [(7, 0, 8, 1), (8, 0, 0, 3)]]):
        reading.add(row(*pieces, ids=bytes([number])))
    assert reading.documents_read_twice == [] and reading.tokens == {(0, 7): 9, (0, 8): 3}
    assert find_problems(reading, 0, []) == []


@pytest.mark.parametrize(
    "second",
    [
        row((7, 0, 0, 4), ids=b"2"),  # begun again in its lane
        row((7, 0, 4, 4), lane=1, ids=b"2"),  # goes on in another lane
        row((7, 0, 2, 4), ids=b"2"),  # steps back
    ],
)
def test_a_document_read_twice(second):
    reading = Reading()
    reading.add(row((7, 0, 0, 4), ids=b"1"))
    reading.add(second)
    assert reading.documents_read_twice == [(0, 7)]
    (finding,) = find_problems(reading, 0, [])
    assert finding.id == "repeated_data" and "1 documents read twice" in finding.found


def test_a_document_that_comes_again_in_the_next_pass_is_no_duplicate():
    reading = Reading()
    reading.add(
        replace(row((7, 0, 4, 2), (1, 1, 0, 2), ids=b"tail"), state={"pass": 1})
    )  # ends a pass, begins the next
    reading.add(replace(row((7, 1, 4, 2), (3, 1, 0, 2), ids=b"tail"), state={"pass": 1}))
    assert reading.duplicates == []


def test_a_duplicate_block():
    reading = Reading()
    reading.add(row((1, 0, 0, 4), ids=b"same"))
    reading.add(row((2, 0, 0, 4), ids=b"same"))
    assert reading.duplicates == [(((0, 1, 0, 4),), ((0, 2, 0, 4),))]
    assert find_problems(reading, 1, [])[0].id == "repeated_data"


def test_copies_in_a_column_of_ids_are_kept_out_with_and_without_eos(write_config, tmp_path, capsys):
    path, letters = write_config(), random.Random(0)
    ids = [letters.choices(range(200), k=40) for _ in range(300)]
    ids[5], ids[77] = ids[285], [*ids[286], 256]  # the hold-out is 280 to 289; 256 is EOS
    pq.write_table(pa.table({"text": ids}), tmp_path / "part-00.parquet", row_group_size=10)
    code, result = verify(capsys, path, "--num_batches", 600)
    assert (code, result["copies_kept_out"], result["hold_out_hits"], result["documents"]) == (0, 2, 0, 288)


def test_several_ranks_are_refused(write_config, capsys, monkeypatch):
    config = parse_config(write_config(), ["--use_cpu", "true", "--bf16", "false"])
    monkeypatch.setattr(type(config.training), "world_size", 2)
    with pytest.raises(UserError, match="verify-data reads in one process"):
        verify_data(config, 3)


@pytest.mark.parametrize("words", [["--num_batches", "0"], ["--num_batches", "many"], ["--workers", "3"]])
def test_bad_options_are_refused(write_config, capsys, words):
    assert run(["verify-data", write_config(), *words]) == 2
    assert "Traceback" not in capsys.readouterr().err
