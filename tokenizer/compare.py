"""Bytes per token of tokenizers on texts: more is better. Prints a Markdown table.

    python tokenizer/compare.py --tokenizers tokenizer/llama-32k other.model --texts 'novels=data/0001[45]*.parquet'

A tokenizer is a folder that `AutoTokenizer` loads, a SentencePiece model file, or a folder with GPT-2's encoder.json
and vocab.bpe. A text is NAME=SOURCE: what the recipe takes as `source`, or a glob of other UTF-8 files, one document
each.
"""

import argparse
import glob
import sys
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from train_tokenizer import read_documents  # puts the project root on the path
from transformers import AutoTokenizer

from recipe.data.files import FORMATS
from recipe.data.source import open_source
from recipe.errors import DataError, UserError

# Article 1 of the Universal Declaration of Human Rights, United Nations, 1948.
NON_ENGLISH = (
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны "
    "поступать в отношении друг друга в духе братства.",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられており、"
    "互いに同胞の精神をもって行動しなければならない。",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق، وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم بعضا بروح الإخاء.",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--texts", nargs="+", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--last", type=int, metavar="N", help="only the last N documents of each text")
    arguments = parser.parse_args(argv)
    try:
        texts = {
            name: load_text(source, arguments.last)
            for name, _, source in (text.partition("=") for text in arguments.texts)
        }
        print_table([Path(path) for path in arguments.tokenizers], {**texts, "7 languages": list(NON_ENGLISH)})
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 4
    return 0


def load_text(source: str, last: int | None) -> list[str]:
    """Documents of `source`, the last `last` of them."""
    if source == "docstrings" or source.endswith(tuple(FORMATS)):
        documents = list(read_documents(open_source(source)))
    else:
        documents = [Path(path).read_text(encoding="utf-8") for path in sorted(glob.glob(source, recursive=True))]
    if not documents:
        raise UserError(f"text {source!r}: no such file; a text is NAME=SOURCE")
    return documents[-last:] if last else documents


def load_encoder(path: Path) -> Callable[[str], list[int]]:
    if path.is_file():
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode
    if (path / "vocab.bpe").is_file():
        gpt2 = ByteLevelBPETokenizer.from_file(str(path / "encoder.json"), str(path / "vocab.bpe"))
        return lambda text: gpt2.encode(text).ids
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"{path}: no tokenizer there; name a folder with tokenizer.json or vocab.bpe, or a SentencePiece model"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def print_table(paths: list[Path], texts: dict[str, list[str]]) -> None:
    sizes = {name: sum(len(document.encode()) for document in documents) for name, documents in texts.items()}
    print("| tokenizer | " + " | ".join(f"{name} ({size:,} B)" for name, size in sizes.items()) + " |")
    print("|---|" + "---|" * len(texts))
    for path in paths:
        encode = load_encoder(path)
        cells = [f"{sizes[name] / sum(len(encode(document)) for document in texts[name]):.2f}" for name in texts]
        print(f"| {'/'.join(path.parts[-2:])} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
