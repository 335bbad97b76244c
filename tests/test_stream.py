"""The canonical order: endless, disjoint, the same for any ranks and workers, resumable."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from conftest import document
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.lanes import Split, deal_chunks, read_lane, shuffled, start_of_lane, train_and_eval_splits
from recipe.data.loader import BatchLoader, merge_positions
from recipe.data.packing import Document, Row, pack, tokenize
from recipe.data.source import open_source
from recipe.data.stream import HeldOutRows, Part, RowStream
from recipe.errors import UserError

EOS = 256
SPLITS = dict(train_skip=0, train_seed=42, eval_skip=80, eval_seed=1041, eval_documents=10)


def make_stream(path, tokenizer, num_lanes=8, rank=0, world_size=1, block_size=16, **changes):
    source = open_source(path)
    train, _ = train_and_eval_splits(source, **{**SPLITS, **changes})
    return RowStream([Part(source, train)], tokenizer, block_size, num_lanes, rank, world_size)


def take(stream, count):
    return list(itertools.islice(stream, count))


def ids_of(rows):
    return np.stack([row.input_ids for row in rows])


def test_shuffled_is_a_permutation_that_depends_on_its_key_alone():
    items = list(range(50))
    assert sorted(shuffled(items, 42, 0)) == items
    assert shuffled(items, 42, 0) == shuffled(items, 42, 0) != shuffled(items, 42, 1)
    assert shuffled(list(range(6)), 42, "deal") == [0, 2, 3, 5, 1, 4], (
        "the order is part of the format: runs resume by it"
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_rows_are_the_same_for_any_ranks_and_workers(write_parquet, tokenizer, world_size, num_workers):
    path = write_parquet(100)
    expected = take(make_stream(path, tokenizer), 64)
    per_rank = 64 // world_size
    shares = []
    for rank in range(world_size):
        stream = make_stream(path, tokenizer, rank=rank, world_size=world_size)
        loader = DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=lambda row: row)
        shares.append(list(itertools.islice(loader, per_rank)))
    merged = [row for rows in zip(*shares, strict=True) for row in rows]
    assert [row.number for row in merged] == list(range(64))
    assert np.array_equal(ids_of(merged), ids_of(expected))


@pytest.mark.parametrize(
    ("world_size", "num_workers", "fits"),
    [
        (1, 3, "--dataloader_num_workers 8 would do"),
        (2, 8, "--dataloader_num_workers 4 or --num_lanes 16 would do"),
        (3, 0, "start a power of two of processes"),
    ],
)
def test_workers_that_do_not_divide_the_lanes_are_refused_with_numbers_that_would_do(
    write_parquet, tokenizer, world_size, num_workers, fits
):
    stream = make_stream(write_parquet(100), tokenizer, world_size=world_size)
    with pytest.raises(UserError, match=f"cannot share 8 lanes evenly; {fits}"):
        BatchLoader(stream, DataCollatorForPackedRows(EOS), 4, num_workers)


@pytest.mark.parametrize("consumed", [1, 7, 40, 200])  # 200 rows are over a pass of this source
def test_resume_gives_the_next_rows_bit_for_bit(write_parquet, tokenizer, consumed):
    path = write_parquet(100, num_files=3)
    collator = DataCollatorForPackedRows(EOS)
    whole = itertools.islice(BatchLoader(make_stream(path, tokenizer), collator, 1), consumed + 30)
    expected = [batch["input_ids"] for batch in whole][consumed:]

    first = BatchLoader(make_stream(path, tokenizer), collator, 1)
    list(itertools.islice(first, consumed))
    second = BatchLoader(make_stream(path, tokenizer), collator, 1, num_workers=2)  # another number of workers
    second.position = first.position
    found = [batch["input_ids"] for batch in itertools.islice(second, 30)]
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))


def test_resume_on_another_number_of_ranks(write_parquet, tokenizer):
    path = write_parquet(100)
    collator = DataCollatorForPackedRows(EOS)
    loaders = [BatchLoader(make_stream(path, tokenizer, rank=rank, world_size=2), collator, 2) for rank in (0, 1)]
    for loader in loaders:
        list(itertools.islice(loader, 3))  # 2 ranks x 3 batches x 2 rows = 12 rows of the run
    resumed = BatchLoader(make_stream(path, tokenizer), collator, 1)
    resumed.position = merge_positions([loader.position for loader in loaders], 2)
    expected = ids_of(take(make_stream(path, tokenizer), 32))[12:]
    found = [batch["input_ids"][0].numpy() for batch in itertools.islice(resumed, 20)]
    assert np.array_equal(np.stack(found), expected)


def test_iterating_again_goes_on_and_never_starts_over(write_parquet, tokenizer):
    loader = BatchLoader(make_stream(write_parquet(100), tokenizer), DataCollatorForPackedRows(EOS), 4)
    first, second = ([batch["input_ids"] for batch in itertools.islice(loader, 3)] for _ in range(2))
    expected = ids_of(take(make_stream(loader.dataset.parts[0].source.chunks[0].path, tokenizer), 24))
    assert np.array_equal(np.concatenate([batch.numpy() for batch in first + second]), expected)


def test_train_never_reads_the_hold_out_and_reads_all_else_once_a_pass(write_parquet, tokenizer):
    stream = make_stream(write_parquet(100), tokenizer)
    seen = []
    for lane in range(8):
        documents = (read.index for read in _lane(stream, lane))
        seen += list(documents)
    assert sorted(seen) == [i for i in range(100) if not 80 <= i < 90]


def _lane(stream, lane):
    documents = read_lane(stream.parts[0].source, stream.lanes[0][lane], stream.parts[0].split, lane, start_of_lane())
    return itertools.takewhile(lambda read: read.state["pass"] == 0, documents)


def test_the_second_pass_has_the_same_documents_in_another_order(write_parquet, tokenizer):
    stream = make_stream(write_parquet(100), tokenizer, num_lanes=1)
    documents = [
        read
        for read in itertools.islice(
            read_lane(stream.parts[0].source, stream.lanes[0][0], stream.parts[0].split, 0, start_of_lane()), 180
        )
    ]
    first, second = ([read.index for read in documents if read.state["pass"] == number] for number in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_train_skip_is_the_first_document_that_training_may_read(write_parquet, tokenizer):
    rows = take(make_stream(write_parquet(100), tokenizer, train_skip=33), 60)
    assert min(index for row in rows for index in row.documents) >= 33


def test_lanes_hold_nearly_equal_bytes(write_parquet, tokenizer):
    stream = make_stream(write_parquet(400, rows_per_group=5), tokenizer, eval_skip=390)
    sizes = [sum(chunk.num_bytes for chunk in lane) for lane in stream.lanes[0]]
    assert min(sizes) > 0.9 * max(sizes)


def test_a_source_with_one_row_group_is_cut_for_the_lanes(write_parquet, tokenizer):
    stream = make_stream(write_parquet(100, rows_per_group=1000), tokenizer)
    seen = sorted(read.index for lane in range(8) for read in _lane(stream, lane))
    assert seen == [i for i in range(100) if not 80 <= i < 90]


def test_too_few_documents_for_the_lanes_is_refused_with_a_number_that_would_do(write_parquet, tokenizer):
    with pytest.raises(UserError, match="--num_lanes auto would do"):
        make_stream(write_parquet(15), tokenizer, num_lanes=32, eval_skip=8, eval_documents=1)


def test_a_source_shorter_than_eval_skip_is_refused_with_its_length_and_an_offset(write_parquet):
    source = open_source(write_parquet(60))
    with pytest.raises(UserError, match=r"has 60 documents; --eval_skip auto --eval_documents auto would do"):
        train_and_eval_splits(source, **SPLITS)


def test_a_hold_out_over_everything_is_refused(write_parquet):
    with pytest.raises(UserError, match="leave no document to train on"):
        train_and_eval_splits(open_source(write_parquet(60)), **{**SPLITS, "eval_skip": 0, "eval_documents": 60})


def test_eval_rows_are_the_hold_out_alone_and_the_same_each_time(write_parquet, tokenizer):
    source = open_source(write_parquet(100))
    _, split = train_and_eval_splits(source, **SPLITS)
    rows = HeldOutRows([Part(source, split)], tokenizer, 16)
    again = HeldOutRows([Part(source, split)], tokenizer, 16)
    assert np.array_equal(ids_of(rows.rows), ids_of(again.rows))
    assert {index for row in rows.rows for index in row.documents} <= set(range(80, 90))
    tokens = sum(len(document(i)) + 1 for i in range(80, 90))
    assert len(rows) == tokens // 16


# --- packing


def documents_of(texts):
    return [Document(i, text, {"pass": 0, "chunk": 0, "document": i, "token": 0}) for i, text in enumerate(texts)]


def test_pack_as_its_docstring_says():
    state = {"pass": 0, "chunk": 0, "token": 0}
    documents = [
        (Document(i, "", {**state, "document": i}), np.array(ids)) for i, ids in enumerate([[5, 6, 2], [7, 8, 9, 2]])
    ]
    rows = list(pack(documents, block_size=4))
    assert [row.input_ids.tolist() for row in rows] == [[5, 6, 2, 7]]
    assert rows[0].state == {"pass": 0, "chunk": 0, "document": 1, "token": 1}
    assert rows[0].pieces == ((0, 0, 0, 3), (1, 0, 0, 1))


@settings(max_examples=60)
@example(texts=["</s>", "a</s>"], block_size=1)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=20), block_size=st.integers(1, 9))
def test_no_token_is_lost_or_doubled(tokenizer, texts, block_size):
    ids = [tokenizer(text)["input_ids"] for text in texts if text]
    # a text may be "</s>" itself: a document that ends with EOS gets no second one
    expected = [token for each in ids for token in (each if each[-1] == EOS else [*each, EOS])]
    rows = list(pack(tokenize(documents_of(texts), tokenizer), block_size))
    found = [token for row in rows for token in row.input_ids.tolist()]
    assert found == expected[: len(expected) // block_size * block_size]


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=12),
    block_size=st.integers(1, 9),
    cut=st.integers(0, 8),
)
def test_every_row_says_where_the_next_one_begins(tokenizer, texts, block_size, cut):
    documents = documents_of(texts)
    rows = list(pack(tokenize(documents, tokenizer), block_size))
    if cut >= len(rows):
        return
    state = rows[cut].state
    resumed = pack(tokenize(documents[state["document"] :], tokenizer), block_size, skip_tokens=state["token"])
    assert [row.input_ids.tolist() for row in resumed] == [row.input_ids.tolist() for row in rows[cut + 1 :]]


def test_empty_documents_give_nothing_not_even_eos(tokenizer):
    assert [document.index for document, _ in tokenize(documents_of(["a", "", "b"]), tokenizer)] == [0, 2]


def test_the_text_of_eos_in_a_document_is_not_what_ends_it(write_parquet, tokenizer):
    source = open_source(write_parquet(0, texts=["x" * 20] * 40))
    rows = take(RowStream([Part(source, Split(42))], tokenizer, 21, 1), 5)
    assert all((row.input_ids == EOS).sum() == 1 and row.input_ids[-1] == EOS for row in rows)


# --- collator


def test_collator_as_its_docstring_says():
    state = start_of_lane()
    rows = [Row(np.array(ids, np.int32), (), state) for ids in ([5, 6, 2, 7], [8, 9, 2, 5])]
    batch = DataCollatorForPackedRows(eos_token_id=2, document_masking=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 7], [8, 9, 2, 5]]
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert set(DataCollatorForPackedRows(eos_token_id=2)(rows)) == {"input_ids", "labels"}
    flash = DataCollatorForPackedRows(eos_token_id=2, document_masking=True, flash_attention=True)(rows)
    assert flash["cu_seq_lens_q"].tolist() == flash["cu_seq_lens_k"].tolist() == [0, 3, 4, 7, 8]
    assert flash["max_length_q"] == flash["max_length_k"] == 4


def test_deal_chunks_gives_every_chunk_to_one_lane(write_parquet):
    source = open_source(write_parquet(200))
    dealt = deal_chunks(source, Split(42), 4)
    indices = [index for lane in dealt for chunk in lane for index in range(chunk.first_document, chunk.stop_document)]
    assert sorted(indices) == list(range(200))


def test_a_source_of_empty_documents_is_an_error_and_not_an_endless_loop(write_parquet, tokenizer):
    source = open_source(write_parquet(0, texts=[""] * 20))
    with pytest.raises(UserError, match="none of its 20 documents has text"):
        next(iter(RowStream([Part(source, Split(42))], tokenizer, 8, 1)))


def test_no_document_comes_twice_in_100_batches(write_parquet, tokenizer):
    """The original project's expectation: 0 % duplicates over 100+ batches, here of 4 rows, read by two workers."""
    words = random.Random(0)
    texts = ["".join(words.choices("abcdefghij ", k=words.randint(20, 120))) for _ in range(1200)]
    path = write_parquet(0, texts=texts)
    stream = make_stream(path, tokenizer, block_size=48, eval_skip=1100, eval_documents=50)
    rows = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda row: row)
    starts, blocks = [], set()
    previous: dict[int, int] = {}
    for row in itertools.islice(rows, 400):
        # a document that goes on from the lane's last row is the same reading of it
        starts += [index for index in row.documents if index != previous.get(row.lane)]
        previous[row.lane] = row.documents[-1]
        blocks.add(row.input_ids.tobytes())
        assert row.state["pass"] == 0
    assert len(starts) == len(set(starts)) and len(blocks) == 400
    assert not set(starts) & set(range(1100, 1150))
