"""Properties of the stream that hold for every small source: canonical, disjoint, resumable, nothing lost."""

import copy
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.formats import Chunk
from recipe.data.hold_out import HoldOutFilter
from recipe.data.lanes import deal_chunks, read_lane, start_of_lane, train_and_eval_splits
from recipe.data.loader import BatchLoader, merge_positions
from recipe.data.source import Source
from recipe.data.stream import HeldOutRows, Part, RowStream, source_of_row
from recipe.errors import UserError

EOS, NUM_ROWS = 256, 64
words = st.text(alphabet="ab \n", min_size=0, max_size=30)
property_test = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def mixtures(draw, max_sources=3, texts=words):
    """A few sources of made-up texts with their splits, and a stream's settings."""
    num_lanes = draw(st.sampled_from([1, 2, 4]))
    sources = []
    for _ in range(draw(st.integers(1, max_sources))):
        contents = draw(st.lists(texts, min_size=3 * num_lanes + 3, max_size=40))
        held_out = draw(st.integers(1, 3))
        sources.append(
            {
                "texts": contents,
                "rows_per_group": draw(st.integers(1, 7)),
                "eval_skip": draw(st.integers(0, len(contents) - held_out)),
                "eval_documents": held_out,
                "train_skip": draw(st.integers(0, 2)),
                "weight": draw(st.sampled_from([0.2, 1.0, 3.0])),
            }
        )
    return {"sources": sources, "num_lanes": num_lanes, "block_size": draw(st.integers(1, 12))}


@dataclass(frozen=True)
class MemorySource(Source):
    """A source without files: hundreds of examples would otherwise write and read thousands of them."""

    texts: tuple[str, ...] = ()

    def read_chunk(self, chunk: Chunk) -> list[str]:
        return list(self.texts[chunk.first_document : chunk.stop_document])


def memory_source(texts: list[str], rows_per_group: int) -> MemorySource:
    chunks = []
    for first in range(0, len(texts), rows_per_group):
        inside = texts[first : first + rows_per_group]
        chunks.append(Chunk("", len(chunks), len(inside), sum(map(len, inside)), first_document=first))
    return MemorySource("memory", "text", tuple(chunks), (), "", can_be_cut=True, texts=tuple(texts))


class Mixture:
    """What `mixtures` drew."""

    def __init__(self, drawn: dict, tokenizer):
        self.drawn, self.tokenizer = drawn, tokenizer
        self.train_parts, self.eval_parts, held_out = [], [], []
        for number, one in enumerate(drawn["sources"]):
            source = memory_source(one["texts"], one["rows_per_group"])
            offsets = {name: one[name] for name in ("train_skip", "eval_skip", "eval_documents")}
            train, held = train_and_eval_splits(source, train_seed=42 + number, eval_seed=1041, **offsets)
            self.train_parts.append(Part(source, train, one["weight"]))
            self.eval_parts.append(Part(source, held))
            held_out += one["texts"][held.start : held.stop]
        self.hold_out_filter = HoldOutFilter(held_out)

    def stream(self, rank=0, world_size=1) -> RowStream:
        sizes = self.drawn["block_size"], self.drawn["num_lanes"]
        return RowStream(self.train_parts, self.tokenizer, *sizes, rank, world_size, self.hold_out_filter)

    def loader(self, batch_size, rank=0, world_size=1) -> BatchLoader:
        return BatchLoader(self.stream(rank, world_size), DataCollatorForPackedRows(EOS), batch_size)


def with_mixture(check):
    """Runs `check(mixture, its first rows, more...)`; a source without anything to train on is no example."""

    def run(drawn, tokenizer, *more):
        try:
            mixture = Mixture(drawn, tokenizer)
            rows = list(itertools.islice(mixture.stream(), NUM_ROWS))
        except UserError:  # other tests are about these
            assume(False)
        check(mixture, rows, *more)

    return run


def ids_of(rows) -> np.ndarray:
    return np.stack([row.input_ids for row in rows])


@property_test
@given(drawn=mixtures(), world_size=st.sampled_from([1, 2, 4]), num_workers=st.sampled_from([1, 2, 4]))
def test_canonical_for_every_number_of_ranks_and_workers(tokenizer, drawn, world_size, num_workers):
    assume(drawn["num_lanes"] % (world_size * num_workers) == 0)
    with_mixture(_canonical)(drawn, tokenizer, world_size, num_workers)


def _canonical(mixture, rows, world_size, num_workers):
    found = {}
    for rank in range(world_size):
        stream = mixture.stream(rank, world_size)
        for worker in range(num_workers):
            count = NUM_ROWS // (world_size * num_workers)
            found |= {row.number: row for row in itertools.islice(stream.share_of_worker(worker, num_workers), count)}
    assert sorted(found) == list(range(NUM_ROWS))
    assert np.array_equal(ids_of([found[number] for number in range(NUM_ROWS)]), ids_of(rows))
    assert [found[number].pieces for number in range(NUM_ROWS)] == [row.pieces for row in rows]


@property_test
@given(drawn=mixtures())
def test_disjoint_and_once_a_pass(tokenizer, drawn):
    with_mixture(_disjoint)(drawn, tokenizer)


def _disjoint(mixture, rows):
    begun = Counter()
    for row in rows:
        split = mixture.train_parts[row.source].split
        texts = mixture.drawn["sources"][row.source]["texts"]
        for piece in row.pieces:
            assert not split.hold_out[0] <= piece.document < split.hold_out[1] and piece.document >= split.start
            assert not mixture.hold_out_filter.holds(texts[piece.document])
            begun[row.source, piece.pass_number, piece.document] += piece.first_token == 0
    assert max(begun.values()) == 1


@property_test
@given(drawn=mixtures(), cuts=st.lists(st.integers(1, 20), min_size=1, max_size=3), batch_size=st.integers(1, 4))
def test_resumed_again_and_again(tokenizer, drawn, cuts, batch_size):
    with_mixture(_resumed)(drawn, tokenizer, cuts, batch_size)


def _resumed(mixture, rows, cuts, batch_size):
    found, position = [], None
    for count in [*cuts, 3]:
        loader = mixture.loader(batch_size)
        loader.position = copy.deepcopy(position) or loader.position
        found += [row for batch in itertools.islice(loader.batches(), count) for row in batch]
        position = loader.position
    expected = list(itertools.islice(mixture.stream(), len(found)))
    assert np.array_equal(ids_of(found), ids_of(expected))
    assert [(row.number, row.state, row.pieces) for row in found] == [
        (row.number, row.state, row.pieces) for row in expected
    ]
    assert sum(position["rows_by_source"]) == position["rows"] == len(found)


@property_test
@given(
    drawn=mixtures(),
    steps=st.integers(1, 4),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4),
    batch_size=st.integers(1, 3),
)
def test_resumed_on_other_world_sizes(tokenizer, drawn, steps, worlds, batch_size):
    """Also where the rows given out so far are no multiple of the next world size."""
    worlds = [world_size for world_size in worlds if drawn["num_lanes"] % world_size == 0]
    assume(worlds)
    with_mixture(_resumed_on_ranks)(drawn, tokenizer, steps, worlds, batch_size)


def _resumed_on_ranks(mixture, rows, steps, worlds, batch_size):
    found, position = {}, mixture.stream().start()
    for world_size in worlds:
        positions = []
        for rank in range(world_size):
            loader = mixture.loader(batch_size, rank, world_size)
            loader.position = copy.deepcopy(position)
            found |= {row.number: row for batch in itertools.islice(loader.batches(), steps) for row in batch}
            positions.append(loader.position)
        position = merge_positions(positions, world_size)
    assert sorted(found) == list(range(batch_size * steps * sum(worlds))) and position["rows"] == len(found)
    expected = list(itertools.islice(mixture.stream(), len(found)))
    assert np.array_equal(ids_of([found[number] for number in sorted(found)]), ids_of(expected))


@property_test
@given(drawn=mixtures(max_sources=1))
def test_the_tokens_of_the_documents_are_the_tokens_of_the_blocks(tokenizer, drawn):
    with_mixture(_nothing_lost)(drawn, tokenizer)


def _nothing_lost(mixture, rows):
    part, num_lanes = mixture.train_parts[0], mixture.drawn["num_lanes"]
    for lane, chunks in enumerate(deal_chunks(part.source, part.split, num_lanes)):
        documents = read_lane(part.source, chunks, part.split, lane, start_of_lane(), mixture.hold_out_filter)
        tokens = [row.input_ids.tolist() for row in rows if row.lane == lane]
        expected = []
        while len(expected) < sum(map(len, tokens)):
            document = next(documents)
            expected += [*mixture.tokenizer(document.content)["input_ids"], EOS] if document.content else []
        assert list(itertools.chain(*tokens)) == expected[: sum(map(len, tokens))]


@property_test
@given(drawn=mixtures())
def test_eval_rows_are_the_hold_outs_documents(tokenizer, drawn):
    with_mixture(_eval_rows)(drawn, tokenizer)


def _eval_rows(mixture, rows):
    try:
        held_out = HeldOutRows(mixture.eval_parts, mixture.tokenizer, mixture.drawn["block_size"])
    except UserError:
        assume(False)
    again = HeldOutRows(mixture.eval_parts, mixture.tokenizer, mixture.drawn["block_size"])
    assert np.array_equal(ids_of(held_out.rows), ids_of(again.rows))
    for row in held_out.rows:
        split = mixture.eval_parts[row.source].split
        assert all(split.start <= piece.document < split.stop for piece in row.pieces)


@given(weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5), first=st.integers(0, 10**12))
@settings(max_examples=100)
def test_every_run_of_rows_has_each_sources_share(weights, first):
    counts = Counter(source_of_row(number, weights) for number in range(first, first + 1000))
    for source, weight in enumerate(weights):
        # The golden ratio's discrepancy over n points is under (2 + log2 n) / n for any interval [0, x); a source's
        # interval is the difference of two.
        assert abs(counts[source] - 1000 * weight / sum(weights)) < 2 * (2 + np.log2(1000))
