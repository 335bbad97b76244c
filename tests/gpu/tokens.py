"""The token ids that the suite trains on: a file of the repo, so that it needs no network and no corpus.

    python -m tests.gpu.tokens

writes token_ids.npy (uint16, EOS = 2 after each document) and token_ids.json. The text is the recipe's docstring
corpus, of those packages alone that are under the Apache License 2.0 as this repo is, encoded with
tokenizer/llama-32k. With the same package versions the same bytes come out.
"""

import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from recipe.data.docstrings import ROW_GROUP_DOCUMENTS, build_docstring_corpus

ROOT = Path(__file__).resolve().parents[2]
IDS, ABOUT = Path(__file__).with_name("token_ids.npy"), Path(__file__).with_name("token_ids.json")
APACHE = ("accelerate", "datasets", "evaluate", "huggingface_hub", "pyarrow", "transformers")
EOS = 2


def load_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "tokenizer" / "llama-32k" / "tokenizer.json"))


def write_token_ids() -> dict:
    """Write both files; returns what is in token_ids.json."""
    table = pq.read_table(build_docstring_corpus())
    sources, texts = table["source"].to_pylist(), table["text"].to_pylist()
    kept = [text for source, text in zip(sources, texts, strict=True) if is_kept(source)]
    encodings = load_tokenizer().encode_batch_fast(kept, add_special_tokens=False)
    ids = [[*(i for i in encoding.ids if i != EOS), EOS] for encoding in encodings]  # some texts spell "</s>"
    array = np.concatenate(ids).astype(np.uint16)
    np.save(IDS, array)
    about = {
        "licence": "Apache-2.0",
        "text": "docstrings of " + ", ".join(f"{name} {version(name)}" for name in APACHE),
        "tokenizer": "tokenizer/llama-32k",
        "documents": len(kept),
        "tokens": len(array),
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
    }
    ABOUT.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def is_kept(source: str) -> bool:
    """`source`: dotted module names, with commas between several; all of packages in `APACHE`."""
    return all(name.strip().split(".")[0] in APACHE for name in source.split(","))


def load_ids() -> np.ndarray:
    """uint16 `[tokens]`."""
    return np.load(IDS)


def documents() -> list[np.ndarray]:
    """The ids of each document, without its EOS."""
    ids = load_ids()
    return [piece[:-1] for piece in np.split(ids, np.flatnonzero(ids == EOS) + 1) if len(piece) > 1]


@functools.cache
def texts() -> list[str]:
    return load_tokenizer().decode_batch([piece.tolist() for piece in documents()])


def write_source(folder: Path) -> Path:
    """A parquet file of token ids, as the recipe's `source`."""
    path = folder / "token_ids.parquet"
    column = pa.array([piece.astype(np.int32) for piece in documents()], pa.list_(pa.int32()))
    pq.write_table(pa.table({"text": column}), path, row_group_size=ROW_GROUP_DOCUMENTS)
    return path


if __name__ == "__main__":
    print(json.dumps(write_token_ids(), indent=1))
