"""A tiny run to break, and what was lost when it was broken: shared by fault_network.py and fault_disk.py."""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import TokenizersBackend

from recipe import trainer
from recipe.__main__ import run
from recipe.data import packing
from recipe.data.loader import BatchLoader
from recipe.redact import configure_logging
from recipe.trainer import SampleCallback
from tests.benchmarks.results import RESULTS, Result, format_section, write_section

STEPS, SAVE_STEPS, BLOCK = 12, 4, 32
MODEL = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "eos_token_id": 256, "bos_token_id": None,
}  # fmt: skip


@dataclass
class Ran:
    """How a run ended, what it printed as error and warning lines, and the rows of each step that it read."""

    code: int
    errors: list[str]
    warnings: list[str]
    steps: list[list[str]] = field(default_factory=list)


def prepare(folder: Path) -> list[str]:
    """Data, tokenizer and model of the run in `folder`; the words of its command line without source and output."""
    texts = [f"<{i}> " + " ".join(f"w{(i * 7 + n * n) % 97}" for n in range(20 + i % 23)) for i in range(300)]
    (folder / "data").mkdir()
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts}), folder / "data/a.parquet", row_group_size=2, **plain)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    TokenizersBackend(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "tokenizer")
    (folder / "model.json").write_text(json.dumps(MODEL))
    values = {
        "model_config": str(folder / "model.json"), "tokenizer": str(folder / "tokenizer"), "block_size": BLOCK,
        "source": str(folder / "data/a.parquet"), "max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_skip": 280,
        "eval_documents": 10, "num_lanes": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 0.003, "use_cpu": True, "save_total_limit": 5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    return ["train", str(folder / "config.json")]


def train(words: list[str]) -> Ran:
    """Runs the command in this process."""
    ran, stderr, caught = Ran(-1, [], []), io.StringIO(), Collector()
    log = logging.getLogger("recipe")
    before = log.level, log.propagate
    log.addHandler(caught)
    log.level, log.propagate = logging.WARNING, False
    try:
        with contextlib.redirect_stderr(stderr), rows_logged(ran.steps):
            ran.code = run(words)
    except Exception as error:
        ran.code, ran.errors = 1, [f"traceback: {error!r}"]
    finally:
        log.removeHandler(caught)
        log.level, log.propagate = before
    ran.errors += [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    ran.warnings = caught.lines
    return ran


class Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record):
        if record.name != "recipe.guards":  # whose findings are no faults
            self.lines.append(record.getMessage())


@contextlib.contextmanager
def rows_logged(steps: list[list[str]]) -> Iterator[None]:
    """Adds the hashes of the rows of each step that is read."""
    read = BatchLoader._read_step

    def logged(loader, batches):
        found = read(loader, batches)
        rows = [row for batch in found for row in batch["input_ids"].numpy()]
        steps.append([hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows])
        return found

    BatchLoader._read_step = logged
    try:
        yield
    finally:
        BatchLoader._read_step = read


@contextlib.contextmanager
def quiet_and_short(folder: Path) -> Iterator[None]:
    """Short samples, no chatter, caches in `folder`."""
    configure_logging(logging.ERROR)
    before = SampleCallback.__init__.__defaults__, trainer.words_of_sources
    limits = packing.FIRST_TOKENIZE_BYTES, packing.TOKENIZE_BYTES
    packing.FIRST_TOKENIZE_BYTES = packing.TOKENIZE_BYTES = 1  # no reading ahead: faults begin at all steps
    cache = os.environ.get("RECIPE_CACHE")
    SampleCallback.__init__.__defaults__ = (4,)
    trainer.words_of_sources = lambda *_: set()  # it would read the whole source
    os.environ["RECIPE_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        SampleCallback.__init__.__defaults__, trainer.words_of_sources = before
        packing.FIRST_TOKENIZE_BYTES, packing.TOKENIZE_BYTES = limits
        os.environ.pop("RECIPE_CACHE")
        if cache is not None:
            os.environ["RECIPE_CACHE"] = cache


def judge(name: str, whole: Ran, whole_dir: Path, ran: list[Ran], run_dir: Path, expected: int) -> dict:
    """What a broken run lost against the unbroken one. `ran`: its parts, the last of them resumed; `expected`: the
    exit code of the first part."""
    wanted = Counter(row for step in whole.steps for row in step)
    found = Counter(row for part in ran for step in part.steps for row in step)
    lost, repeated = (wanted - found).total(), (found - wanted).total()
    steps = [json.loads(line)["step"] for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    lines = max(len(part.errors) for part in ran)
    is_equal = weights_equal(run_dir / "final", whole_dir / "final")
    survived = ran[0].code == expected and ran[-1].code == 0 and lines <= 3
    survived &= not any("traceback" in line for part in ran for line in part.errors)
    return {
        "name": name, "survived": survived, "steps_lost": STEPS - len(set(steps)), "rows_lost": lost,
        "rows_repeated": repeated, "bit_equal": is_equal, "exit_code": ran[0].code,
        "lines": lines, "warnings": sum(len(part.warnings) for part in ran),
    }  # fmt: skip


def weights_equal(first: Path, second: Path) -> bool:
    files = [folder / "model.safetensors" for folder in (first, second)]
    if not all(file.is_file() for file in files):
        return False
    one, other = map(load_file, files)
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def publish(name: str, title: str, measured: str, results: list[dict]) -> None:
    """Writes the section of RESULTS.md, and prints it."""
    words = {True: "yes", False: "no"}
    rows = [
        {key: words.get(value, value) if type(value) is bool else value for key, value in r.items()} for r in results
    ]
    section = format_section(name, Result(title, measured, rows), f"python -m tests.benchmarks.{name}")
    write_section(name, section, RESULTS)
    print(section)
