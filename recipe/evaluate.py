"""`evaluate`: how well a trained model predicts other text, with confidence intervals.

    SOURCE -> documents -> blocks, by the training's own stream -> nats of each token -> sums of each document

Without a SOURCE it scores the hold-out of the model's own run, in the rows of the run's evaluations.
"""

import logging
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice, takewhile

import numpy as np
import torch
from tqdm.auto import tqdm

from recipe.arguments import DataArguments
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.formats import TokenIds
from recipe.data.lanes import Split, deal_chunks, read_lane, start_of_lane
from recipe.data.packing import Document, Row, hash_of_tokenizer, pack, tokenize
from recipe.data.pipeline import build_parts
from recipe.data.source import Source, open_source
from recipe.data.stream import HeldOutRows
from recipe.errors import DataError, UserError, message_of
from recipe.harness import find_tasks, run_tasks
from recipe.metrics import NextTokenMetrics, token_byte_lengths
from recipe.model import check_fit
from recipe.redact import remember_urls
from recipe.trained import Trained, load_model, longest_input

logger = logging.getLogger(__name__)
HOLD_OUT = "hold-out"
DEFAULT_BLOCK_SIZE = 1024  # of a model that no run of the recipe has trained
SEED = 1041  # of the order in which a source is read
FILLER = -1  # index of the document that fills the last block; not scored
# Documents are independent, the tokens of one are not: so intervals are over documents, or over blocks where there are
# fewer than this. Under the second number there is none: the normal approximation needs some units. Both chosen.
ENOUGH_DOCUMENTS, ENOUGH_BLOCKS = 30, 10
Z_95 = 1.959964  # standard deviations of a normal distribution to each side that hold 95 % of it


@dataclass(frozen=True)
class Estimate:
    """A ratio of two sums, and the ends of its 95 % interval; None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


class Tally:
    """Sums over the scored tokens of each document and of each block: nats, tokens, UTF-8 bytes, right predictions."""

    def __init__(self, byte_lengths: np.ndarray | None):
        self.byte_lengths = byte_lengths
        self.blocks: list[np.ndarray] = []  # float64 [4]
        self.documents: dict[tuple[int, int], np.ndarray] = {}  # (source, index) -> float64 [4]

    def add(self, row: Row, nll: np.ndarray, predicted: np.ndarray) -> None:
        """`nll`, `predicted` `[block_size - 1]`: of each token but the first."""
        targets = row.input_ids[1:]
        num_bytes = np.zeros(len(targets)) if self.byte_lengths is None else self.byte_lengths[targets]
        values = np.stack([nll, np.ones(len(targets)), num_bytes, predicted == targets]).astype(np.float64)
        block, start = np.zeros(4), -1  # the first piece has one token that is not scored
        for piece in row.pieces:
            sums, start = values[:, max(start, 0) : start + piece.num_tokens].sum(axis=1), start + piece.num_tokens
            if piece.document != FILLER:
                block += sums
                self.documents[row.source, piece.document] = sums + self.documents.get((row.source, piece.document), 0)
        self.blocks.append(block)

    def result(self) -> dict:
        """The four measures with their intervals, and what those are over. JSON-able."""
        documents, blocks = (_scored(list(sums)) for sums in (self.documents.values(), self.blocks))
        units, unit = (documents, "document") if len(documents) >= ENOUGH_DOCUMENTS else (blocks, "block")
        nats, tokens, num_bytes, right = units.T
        loss = estimate_ratio(nats, tokens)
        has_bytes = self.byte_lengths is not None and num_bytes.sum() > 0
        bits = estimate_ratio(nats / math.log(2), num_bytes) if has_bytes else Estimate(math.nan)
        measures = {
            "loss": loss,
            "perplexity": Estimate(
                *(None if each is None else math.exp(min(each, 700)) for each in vars(loss).values())
            ),
            "bits_per_byte": bits,
            "next_token_accuracy": estimate_ratio(right, tokens),
        }
        return {
            "tokens": int(tokens.sum()),
            "documents": len(documents),
            "blocks": len(blocks),
            **{name: vars(estimate) for name, estimate in measures.items()},
            "interval": {"level": 0.95, "method": "normal", "over": f"{unit}s", "units": len(units)},
        }


def _scored(sums: list[np.ndarray]) -> np.ndarray:
    """Those with scored tokens: float64 [units, 4]."""
    return np.array([each for each in sums if each[1]]).reshape(-1, 4)


def estimate_ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """sum / sum over independent units, with the normal interval of the linearized ratio (Cochran, Sampling
    Techniques, chapter 6): its variance is that of the residuals `n - ratio x d`. No interval for under
    ENOUGH_BLOCKS units."""
    count, total = len(numerators), float(denominators.sum())
    ratio = float(numerators.sum()) / total
    if count < ENOUGH_BLOCKS:
        return Estimate(ratio)
    residuals = numerators - ratio * denominators
    half = Z_95 * math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total
    return Estimate(ratio, ratio - half, ratio + half)


# --- rows


def rows_of_source(source: Source, tokenizer, block_size: int) -> Iterator[Row]:
    """Every token of the source in one block each, in a fixed order, by the stages that training reads through. The
    last block is filled with a document FILLER."""
    split = Split(SEED)
    (chunks,) = deal_chunks(source, split, num_lanes=1)
    lane = read_lane(source, chunks, split, 0, start_of_lane())
    documents = takewhile(lambda document: document.state["pass"] == 0, lane)
    end = np.full(block_size, tokenizer.eos_token_id, dtype=np.int32)
    filler = Document(FILLER, TokenIds(end), start_of_lane()), end
    rows = pack(chain(tokenize(documents, tokenizer, source.name), [filler]), block_size)
    return (row for row in rows if row.pieces[0].document != FILLER)


def open_checked(path: str, text_column: str, tokenizer) -> Source:
    source = open_source(path, text_column)
    if source.tokenizer not in (None, hash_of_tokenizer(tokenizer)):
        raise UserError(f"source {path!r} holds token ids of another tokenizer than the model's; name its text")
    return source


def hold_out_of(trained: Trained, tokenizer, block_size: int) -> HeldOutRows:
    """The rows of the run's own evaluations. Raises `UserError` where the model belongs to no run of the recipe."""
    known = {f.name: trained.arguments[f.name] for f in fields(DataArguments) if f.name in trained.arguments}
    if "source" not in known:
        raise UserError(f"{trained.folder}: no run of the recipe made this model, so name a SOURCE to evaluate it on")
    try:
        _, eval_parts, _ = build_parts(DataArguments(**known), tokenizer, str(trained.folder))
    except UserError as error:
        raise UserError(f"{error}; or start where the run was started, or name a SOURCE") from error
    if [part.source.fingerprint for part in eval_parts] != fingerprints_of(trained):
        logger.warning("the source has changed since the run: some of these documents may have been trained on")
    return HeldOutRows(eval_parts, tokenizer, block_size)


def fingerprints_of(trained: Trained) -> list[str]:
    return [part.get("content_hash") for part in (trained.info.get("source") or {}).get("parts") or []]


# --- scoring


@dataclass(frozen=True)
class EvaluationSettings:
    """None: as the run had it, or the usual value where the model belongs to no run."""

    text_column: str | None = None
    block_size: int | None = None
    batch_size: int = 8
    max_tokens: int = 1_000_000


def evaluate_sources(
    trained: Trained, model, tokenizer, sources: list[str], settings: EvaluationSettings
) -> list[dict]:
    """The result of each source (`Tally.result`), in their order; of the run's hold-out where none is named. A source
    that cannot be scored has its `error` instead. Raises the first error where none can be."""
    text_column = settings.text_column or trained.arguments.get("text_column") or "text"
    block_size = choose_block_size(trained, model.config, settings.block_size)
    check_fit(model.config, tokenizer, block_size, str(trained.folder))
    collator = DataCollatorForPackedRows(tokenizer.eos_token_id, bool(trained.arguments.get("document_masking")))
    lengths, results = byte_lengths_of(tokenizer), []
    if not sources:
        rows = hold_out_of(trained, tokenizer, block_size).rows
        result = score(model, collator, rows, Tally(lengths), settings.batch_size, HOLD_OUT)
        is_same = trained.folder.name == "final" and block_size == trained.arguments.get("block_size")
        recorded = (trained.info.get("result") or {}).get("eval_loss") if is_same else None
        results.append({"source": HOLD_OUT, **result, "recorded_loss": recorded})
    errors = []
    for path in sources:
        try:
            source = open_checked(path, text_column, tokenizer)
            rows = rows_of_source(source, tokenizer, block_size)
            some = islice(rows, -(-settings.max_tokens // block_size))
            result = score(model, collator, some, Tally(lengths), settings.batch_size, path)
            is_training_data = source.fingerprint in fingerprints_of(trained)
            is_cut = next(rows, None) is not None
            results.append({"source": path, **result, "is_cut": is_cut, "is_training_data": is_training_data})
        except (UserError, DataError) as error:
            errors.append(error)
            results.append({"source": path, "error": message_of(error), "exit_code": error.exit_code})
    if errors and len(errors) == len(results):
        raise errors[0]
    return results


def choose_block_size(trained: Trained, config, wanted: int | None) -> int:
    known = trained.arguments.get("block_size")
    return wanted or known or min(DEFAULT_BLOCK_SIZE, longest_input(trained, config) or DEFAULT_BLOCK_SIZE)


def byte_lengths_of(tokenizer) -> np.ndarray | None:
    try:
        return token_byte_lengths(tokenizer)
    except UserError as error:
        logger.warning("%s", error)
        return None


def score(
    model, collator: DataCollatorForPackedRows, rows: Iterable[Row], tally: Tally, batch_size: int, name: str
) -> dict:
    """The result of all rows; a bar on a terminal. Raises `UserError` where there is nothing, or too little memory."""
    rows = iter(tqdm(rows, desc=name, unit="block", disable=None, leave=False))
    while batch := list(islice(rows, batch_size)):
        inputs = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in collator(batch).items()
        }
        labels = inputs.pop("labels")
        try:
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits
                nll, predicted = NextTokenMetrics.preprocess_logits(logits, labels)
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory with {batch_size} blocks at once; use a smaller --batch_size") from error
        for row, *scores in zip(batch, nll.cpu().numpy(), predicted.cpu().numpy(), strict=True):
            tally.add(row, *scores)
    if not any(block[1] for block in tally.blocks):
        raise UserError(f"{name}: nothing to score, since it has fewer than two tokens")
    return tally.result()


# --- the command


def run_evaluation(trained: Trained, options: Namespace) -> dict:
    """`options`: of the command line. Returns the model, the result of each source, and of each task; JSON-able.

    With `tasks` and no sources, only the tasks are run.
    """
    task_manager = find_tasks(options.tasks, options.include_path) if options.tasks else None
    model, tokenizer = load_model(trained)
    settings = EvaluationSettings(options.text_column, options.block_size, options.batch_size, options.max_tokens)
    remember_urls(options.sources)
    is_wanted = options.sources or not options.tasks
    results = evaluate_sources(trained, model, tokenizer, options.sources, settings) if is_wanted else []
    # A model of the recipe has seen EOS before each document, and never BOS.
    prefix, limit = tokenizer.eos_token_id if trained.is_new else None, longest_input(trained, model.config)
    tasks = run_tasks(model, tokenizer, task_manager, options, limit, prefix) if task_manager else []
    return {
        "model": str(trained.folder),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "block_size": choose_block_size(trained, model.config, options.block_size),
        "sources": results,
        "tasks": tasks,
    }


def format_evaluation(result: dict) -> str:
    about = f"{result['parameters'] / 1e6:.3g}M parameters, {result['dtype']} on {result['device']}"
    lines = [f"{result['model']}: {about}, blocks of {result['block_size']:,} tokens"]
    lines += [format_results(result["sources"])] if result["sources"] else []
    return "\n".join([*lines, *map(format_task, result["tasks"])])


def format_task(task: dict) -> str:
    error = "" if task["standard_error"] is None else f" ± {Z_95 * task['standard_error']:.4f} (95 %)"
    return f"{task['task']}: {task['metric']} {task['value']:.4f}{error}, {task['examples']:,} examples"


# --- the table


def format_results(results: list[dict]) -> str:
    """A row for each source; `±` half of the 95 % interval. Below it, what a reader must know about a row."""
    lines = [["source", "documents", "tokens", "loss", "perplexity", "bits/byte", "accuracy %", "95 % interval over"]]
    notes = []
    for result in (each for each in results if "error" not in each):
        name, interval = result["source"], result["interval"]
        measures = (("loss", 4, 1), ("perplexity", 2, 1), ("bits_per_byte", 4, 1), ("next_token_accuracy", 2, 100))
        cells = [_cell(result[measure], digits, factor) for measure, digits, factor in measures]
        is_known = result["loss"]["low"] is not None
        over = f"{interval['units']:,} {interval['over']}" if is_known else f"{interval['over']}: too few"
        lines.append([name, f"{result['documents']:,}", f"{result['tokens']:,}", *cells, over])
        if result.get("recorded_loss") is not None:
            notes.append(f"{name}: the run recorded a loss of {result['recorded_loss']:.4f} for this model")
        if result.get("is_cut"):
            notes.append(f"{name}: up to --max_tokens only, in an order that is shuffled by a fixed seed")
        if result.get("is_training_data"):
            notes.append(f"{name}: training data of this model; its loss says nothing about new text")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*aligned, *notes, *(f"error: {each['error']}" for each in results if "error" in each)])


def _cell(estimate: dict, digits: int, factor: float) -> str:
    if math.isnan(estimate["value"]):
        return "–"
    half = "" if estimate["low"] is None else f" ± {factor * (estimate['high'] - estimate['low']) / 2:.{digits}f}"
    return f"{factor * estimate['value']:.{digits}f}{half}"
