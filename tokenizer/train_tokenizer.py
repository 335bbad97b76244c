"""Train a Llama-compatible tokenizer: SentencePiece BPE with byte fallback, saved for `AutoTokenizer.from_pretrained`.

    python tokenizer/train_tokenizer.py OUT_DIR --vocab_size 32000 --input 'data/*.parquet' docstrings --hold_out 400

OUT_DIR receives `tokenizer.model` (SentencePiece's own, the reference), `tokenizer.json` and `tokenizer_config.json`.
Nothing is left there unless `transformers` gives SentencePiece's ids on the checked texts, and the texts come back
exactly. The same inputs give the same files: every line is read, in order, by one thread; nothing is sampled.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python sees only this folder

from recipe.data.source import open_source
from recipe.errors import DataError, UserError

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}  # ids 0, 1, 2
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
NUM_CHECKED_DOCUMENTS = 200
SPACE_MARK = "\u2581"  # SentencePiece writes spaces with this character, so it alone does not survive a round trip

# SentencePiece silently drops sentences over 4,192 bytes; 1,000 characters are at most 4,000 bytes. Longer lines are
# cut before a space where there is one. Runs of newlines are cut likewise.
LINE = re.compile(r"[^\n]{1,1000}(?!\S)\n{0,100}|[^\n]{1,1000}|\n{1,100}")

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_prefix_space": False,
    "add_bos_token": False,
    "add_eos_token": False,
    # Otherwise "</s>" written in a document would become the end-of-document id.
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    # Documents are encoded whole and packed afterwards; the model's own limit is in its config.
    "model_max_length": 1_000_000,
    **SPECIAL_TOKENS,
}

HARD_TEXTS = (
    "",
    " ",
    "   leading, trailing and  double   spaces   ",
    "\n",
    "a\n\nb\n\n\nc\n\n\n\n\n",
    "\tdef f(x):\n\t\treturn x\n",
    "if x:\n    for y in x:\n        print(y)  # 123,456.789\n",
    "one\r\ntwo\r\n",
    "</s><s><unk></s>",
    "</s> <s> <unk> a</s>b class</s>",
    "<0x41><0x0A> <0xFF>",
    "naïve café — “quotes” … ½ €",
    "你好，世界。こんにちは 안녕하세요",
    "مرحبا بالعالم שלום Привет नमस्ते",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 \u200b \ufeff",
    "\x01\x07\x1b[31m\x7f\x85\u2028",
)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for the user's mistakes, 4 for data that cannot be read."""
    arguments = _parse_arguments(argv)
    try:
        print(json.dumps(train_tokenizer(**vars(arguments)), indent=1))
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 4
    return 0


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "--vocab_size", type=int, required=True, metavar="N", help="pieces, specials and bytes included"
    )
    known = "files or globs of .parquet, .jsonl or .txt, or the word docstrings"
    parser.add_argument("--input", nargs="+", required=True, dest="inputs", metavar="SOURCE", help=known)
    parser.add_argument("--text_column", default="text", help="of parquet and jsonl files")
    parser.add_argument("--hold_out", type=int, default=0, metavar="N", help="leave out the last N documents")
    return parser.parse_args(argv)


def train_tokenizer(
    out_dir: Path, vocab_size: int, inputs: list[str], text_column: str = "text", hold_out: int = 0
) -> dict:
    """Train, convert and check a tokenizer; move it to `out_dir`. Returns what was read, in numbers.

    The last `hold_out` documents, over all inputs in order, are not trained on. Raises `UserError` for inputs or sizes
    that cannot be used, `DataError` for files that cannot be read.
    """
    _check_out_dir(out_dir)
    sources = [open_source(name, text_column) for name in inputs]
    num_documents = sum(source.num_documents for source in sources) - hold_out
    if hold_out < 0 or num_documents <= 0:
        raise UserError(
            f"--hold_out {hold_out}: the inputs hold {num_documents + hold_out} documents; leave some to train on"
        )
    documents = [text for source in sources for text in read_documents(source)][:num_documents]
    model = train_sentencepiece(documents, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(model, Path(folder))
        check_tokenizer(Path(folder), (*HARD_TEXTS, *documents[:: -(-num_documents // NUM_CHECKED_DOCUMENTS)]))
        _install(Path(folder), out_dir)
    return {
        "vocab_size": vocab_size,
        "documents": num_documents,
        "bytes": sum(len(text.encode()) for text in documents),
        "inputs": {source.name: source.fingerprint for source in sources},
    }


def read_documents(source) -> Iterator[str]:
    """The documents of a `recipe.data.source.Source`, in order."""
    for chunk in source.chunks:
        yield from source.read_chunk(chunk)


def read_lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters with the newlines that end them, then one space.

    The ends stay on, so that pieces such as ".\\n\\n" and "):\\n" are learned; no piece joins two lines. The trainer
    strips newlines at the end of what it is given and cuts words before spaces: the space shields them, in no piece.
    """
    for text in documents:
        for line in LINE.findall(text):
            yield line + " "


def train_sentencepiece(documents: Iterable[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece BPE model of exactly `vocab_size` pieces."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=read_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            # No piece joins letters and marks. Were "</" and "s>" pieces, the converted merges would turn the text
            # "</s>" into id 2.
            split_by_unicode_script=True,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"--vocab_size {vocab_size}: {_mend(str(error))}") from error
    return model.getvalue()


def _mend(message: str) -> str:
    """SentencePiece's error in the user's words; it names the bound that was crossed."""
    if most := re.search(r"value <= (\d+)", message):
        return f"the inputs fill only {most[1]} pieces; ask for at most that many, or give more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"the 256 bytes, 3 specials and the alphabet of the inputs need {least[1]} pieces; ask for more than that"
        )
    if "sentences_.empty()" in message:
        return "the inputs hold no text to train on"
    return f"SentencePiece cannot train ({message.strip()}); ask for a size between 1,000 and 100,000"


def save_tokenizer(model: bytes, folder: Path) -> None:
    """Write the three files. (`transformers` reads tokenizer.model by way of protobuf.)"""
    (folder / "tokenizer.model").write_bytes(model)
    _write_json(folder / "tokenizer_config.json", CONFIG)
    AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    # What save_pretrained adds tells of this machine (is_local, local_files_only) or repeats tokenizer.json.
    _write_json(folder / "tokenizer_config.json", CONFIG)
    # Indented, as saved, it is more than twice as long.
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(
        json.dumps(backend, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


def check_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Raise `RuntimeError` unless `AutoTokenizer` gives SentencePiece's ids for every text and the text comes back."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) != reference.vocab_size():
        raise RuntimeError(f"tokenizer has {len(tokenizer)} pieces, SentencePiece {reference.vocab_size()}")
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if ids != reference.encode(text):
            raise RuntimeError(
                f"ids differ from SentencePiece's on {text[:80]!r}: {ids[:20]} and {reference.encode(text)[:20]}"
            )
        if tokenizer.decode(ids) != text.replace(SPACE_MARK, " "):
            raise RuntimeError(f"text does not come back: {text[:80]!r}")


def _check_out_dir(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file; name a folder for the tokenizer")
    foreign = sorted(entry.name for entry in out_dir.iterdir() if entry.name not in FILES) if out_dir.is_dir() else []
    if foreign:
        raise UserError(
            f"{out_dir} holds other files ({', '.join(foreign[:3])}); name a new folder or one with a tokenizer alone"
        )


def _install(folder: Path, out_dir: Path) -> None:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            # Copied beside its place first: a reader never meets half a file.
            shutil.copyfile(folder / name, out_dir / f"{name}.new")
        for name in FILES:
            os.replace(out_dir / f"{name}.new", out_dir / name)
    except OSError as error:
        raise UserError(
            f"{out_dir}: cannot write the tokenizer there ({error.strerror}); name another folder"
        ) from error


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
