"""`verify-data`: read the stream through the real loader and report what training would see."""

import bisect
import hashlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from recipe.arguments import Config
from recipe.data.hold_out import HoldOutFilter, digest_of
from recipe.data.loader import count_bad
from recipe.data.packing import Row
from recipe.data.pipeline import Data, build_data
from recipe.errors import UserError
from recipe.guards import Finding
from recipe.guards.repetition import OVERLAP, REPEATED

SHOWN, FILES_SHOWN, SAMPLE_CHARS = 5, 20, 300


@dataclass
class Reading:
    """What was read, counted row by row; a test can add its own rows.

    `readings[source, pass_number, document]` counts how often a document was begun in a pass; `tokens[source,
    document]` its tokens; `duplicates` are pairs of rows of one pass with the same ids, each row by its pieces, which
    are (source, document, first token, tokens).
    """

    rows: int = 0
    readings: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    duplicates: list[tuple] = field(default_factory=list)
    _blocks: dict = field(
        default_factory=dict
    )  # (first and last pass, hash of the ids) -> pieces of the first such row
    _next: dict = field(default_factory=dict)  # (source, lane) -> where the current piece continues

    def add(self, row: Row) -> None:
        self.rows += 1
        for piece in row.pieces:
            place = (piece.pass_number, piece.document, piece.first_token)
            if self._next.get((row.source, row.lane)) != place or piece.first_token == 0:
                self.readings[row.source, piece.pass_number, piece.document] += 1
            self.tokens[row.source, piece.document] += piece.num_tokens
            self._next[row.source, row.lane] = (*place[:2], piece.first_token + piece.num_tokens)
        passes = row.pieces[0].pass_number, row.pieces[-1].pass_number
        block = passes, hashlib.blake2b(row.input_ids.tobytes(), digest_size=16).digest()
        pieces = tuple((row.source, piece.document, piece.first_token, piece.num_tokens) for piece in row.pieces)
        first = self._blocks.setdefault(block, pieces)
        if first is not pieces:
            self.duplicates.append((first, pieces))

    @property
    def documents_read_twice(self) -> list[tuple[int, int]]:
        return sorted({(source, document) for (source, _, document), count in self.readings.items() if count > 1})

    @property
    def passes(self) -> int:
        return 1 + max(pass_number for _, pass_number, _ in self.readings)


def verify_data(config: Config, num_batches: int) -> dict:
    """Read `num_batches` micro-batches with the config's workers; returns the JSON-able result, with its findings."""
    if config.training.world_size > 1:
        raise UserError("verify-data reads in one process what all ranks would read; use --workers for more readers")
    start = time.perf_counter()
    data = build_data(config)
    reading, first_rows, first_time = Reading(), None, start
    for rows in itertools.islice(data.loader.batches(), num_batches):
        if first_rows is None:
            first_rows, first_time = rows, time.perf_counter()
        for row in rows:
            reading.add(row)
    seconds = time.perf_counter() - first_time
    texts = compare_texts(data, reading)
    later_tokens = (reading.rows - len(first_rows)) * config.data.block_size
    findings = find_problems(reading, texts["duplicate_blocks"], texts["hold_out_examples"])
    return {
        "batches": num_batches,
        "blocks": reading.rows,
        "tokens": reading.rows * config.data.block_size,
        "documents": len(reading.tokens),
        "passes": reading.passes,
        "documents_read_twice": len(reading.documents_read_twice),
        "hold_out_hits": len(texts["hold_out_examples"]),
        "bad_documents_skipped": count_bad(data.loader.position),
        **texts,
        "seconds_to_first_batch": round(first_time - start, 3),
        "tokens_per_second": round(later_tokens / seconds) if later_tokens else None,
        "sample": data.tokenizer.decode(first_rows[0].input_ids)[:SAMPLE_CHARS],
        "findings": [asdict(finding) for finding in findings],
    }


def compare_texts(data: Data, reading: Reading) -> dict:
    """What only the texts show: tokens by file, equal texts at different places, held-out texts among those read.

    Reads the chunks of the documents again. `copies_kept_out`: documents in those chunks that equal a held-out
    one, so that the stream skipped them.
    """
    eos = data.tokenizer.eos_token_id
    hold_out_filter = HoldOutFilter(data.eval_rows.contents, eos)
    tokens_by_file: Counter = Counter()
    digests, places, hits, copies = {}, defaultdict(list), [], 0
    for number, part in enumerate(data.loader.dataset.parts):
        read = sorted(document for source, document in reading.tokens if source == number)
        for chunk in part.source.chunks:
            inside = read[
                bisect.bisect_left(read, chunk.first_document) : bisect.bisect_left(read, chunk.stop_document)
            ]
            if not inside:
                continue
            contents = part.source.read_chunk(chunk)
            tokens_by_file[chunk.path] += sum(reading.tokens[number, document] for document in inside)
            allowed = set(part.split.documents_of(chunk))
            copies += sum(hold_out_filter.holds(contents[document - chunk.first_document]) for document in allowed)
            for document in inside:
                content = contents[document - chunk.first_document]
                digests[number, document] = digest_of(content, eos)
                places[digests[number, document]].append(f"{part.source.name}[{document}]")
                if document not in allowed or hold_out_filter.holds(content):
                    hits.append(f"{part.source.name}[{document}]")
    equal = [where for where in places.values() if len(where) > 1]
    explained = sum(_is_of_equal_texts(*pair, digests) for pair in reading.duplicates)
    return {
        "duplicate_blocks": len(reading.duplicates) - explained,
        "duplicate_blocks_of_equal_texts": explained,
        "hold_out_examples": hits,
        "copies_kept_out": copies,
        "equal_texts": sum(len(where) - 1 for where in equal),
        "equal_text_examples": equal[:SHOWN],
        "tokens_by_file": dict(tokens_by_file),
    }


def _is_of_equal_texts(first: tuple, second: tuple, digests: dict) -> bool:
    """Whether two rows are the same because the source holds their documents twice, at different places."""

    def by_text(pieces):
        return [(digests[source, document], *rest) for source, document, *rest in pieces]

    return first != second and by_text(first) == by_text(second)


def find_problems(reading: Reading, duplicate_blocks: int, hits: Sequence[str]) -> list[Finding]:
    """The findings: repetition inside a pass, and held-out documents among those read. `hits` names the latter."""
    findings, twice = [], reading.documents_read_twice
    if twice or duplicate_blocks:
        findings.append(
            Finding(
                REPEATED,
                "error",
                0,
                0,
                found=f"{len(twice)} documents read twice in a pass, {duplicate_blocks} duplicate blocks of "
                f"{reading.rows}",
                expected="0 and 0",
                likely_causes=("the source holds the same text many times in one document", "a bug in the stream"),
                action="look at the examples in the result; remove the repeated text from the source",
                evidence={"documents": twice[:SHOWN], "duplicate_blocks": duplicate_blocks},
            )
        )
    if hits:
        findings.append(
            Finding(
                OVERLAP,
                "error",
                0,
                0,
                found=f"{len(hits)} held-out documents among those that training reads: {', '.join(hits[:SHOWN])}",
                expected="0",
                likely_causes=("a bug in the stream",),
                action="do not trust the eval loss; report this",
                evidence={"documents": hits[:SHOWN]},
            )
        )
    return findings


def format_result(result: dict) -> str:
    """The result for people, one fact a line; findings come last."""
    tokens = result["tokens"]
    rate = f"{result['tokens_per_second']:,} tokens/s" if result["tokens_per_second"] else "tokens/s not measured"
    by_file = Counter(result["tokens_by_file"]).most_common()
    shares = [f"  {count / tokens:7.2%}  {path}" for path, count in by_file[:FILES_SHOWN]]
    more = [f"  and {len(by_file) - FILES_SHOWN} more files"] if len(by_file) > FILES_SHOWN else []
    of_equal_texts = result["duplicate_blocks_of_equal_texts"]
    equal = [f"  equal: {' = '.join(places[:SHOWN])}" for places in result["equal_text_examples"]]
    lines = [
        f"read                       {result['batches']:,} batches, {result['blocks']:,} blocks, {tokens:,} tokens of "
        f"{result['documents']:,} documents",
        f"passes                     {result['passes']}",
        f"duplicate blocks           {result['duplicate_blocks']:,}, and {of_equal_texts:,} of equal texts",
        f"documents read twice       {result['documents_read_twice']:,}, in one pass",
        f"hold-out hits              {result['hold_out_hits']:,}",
        f"copies of held-out texts   {result['copies_kept_out']:,} kept out of training, in the chunks read",
        f"bad documents skipped      {result['bad_documents_skipped']:,} that cannot be decoded (on_bad_data: skip)",
        f"equal texts                {result['equal_texts']:,} documents whose text occurs elsewhere in what was read",
        *equal,
        f"speed                      {rate}; first batch after {result['seconds_to_first_batch']:.2f} s",
        "tokens by file",
        *shares,
        *more,
        f"first block begins         {result['sample']!r}",
        *(f"ERROR {Finding(**finding).log_line()}" for finding in result["findings"]),
    ]
    return "\n".join(lines)
