"""What a file holds, from its first bytes; its name may be wrong."""

import codecs

from recipe.errors import UserError

HEAD_BYTES = 1 << 16
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xfd7zXZ\x00": "xz",
}
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
UTF_8 = "utf-8-sig"
BINARY = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive or office document",
    b"PAR1": "parquet, rename it to .parquet",
}


CONTROLS = bytes({*range(32)} - {*b"\t\n\r\f\x1b"})


class NotPlain(Exception):
    """The file cannot be read in parts; `convert.py` can read it as a whole."""


def compression_of(head: bytes) -> str | None:
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def encoding_of(head: bytes) -> str:
    """A text file's encoding. UTF-16 without a mark is recognised by the NUL bytes of its ASCII characters."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    half = max(1, len(head) // 2)
    even, odd = head[::2].count(0) / half, head[1::2].count(0) / half
    if even < 0.05 and odd > 0.4:
        return "utf-16-le"
    return "utf-16-be" if odd < 0.05 and even > 0.4 else UTF_8


def is_plain(head: bytes, kind: str) -> bool:
    """Whether the file is UTF-8 that can be cut at its line ends, for jsonl with one object a line."""
    if compression_of(head) or encoding_of(head) != UTF_8 or (b"\r" in head and b"\n" not in head):
        return False
    return kind != "jsonl" or holds_json_lines(head)


def holds_json_lines(head: bytes | str) -> bool:
    """False for an array, and for objects that are spread over several lines."""
    text = head.decode(errors="replace") if isinstance(head, bytes) else head
    line, newline, _ = text.removeprefix("\ufeff").lstrip().partition("\n")
    return not line.startswith("[") and not (newline and line.startswith("{") and not line.rstrip().endswith("}"))


def _is_utf_8(head: bytes) -> bool:
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(head) is not None  # the last character may be cut
    except UnicodeDecodeError:
        return False


def refuse_binary(head: bytes, path: str) -> None:
    """Raise `UserError` for a file that is no text in any encoding."""
    name = next((name for magic, name in BINARY.items() if head.startswith(magic)), None)
    controls = len(head) - len(head.translate(None, CONTROLS))
    if name is None and encoding_of(head) == UTF_8 and controls > 0.01 * len(head) and not _is_utf_8(head):
        name = "binary"
    if name:
        raise UserError(f"{path}: is {name}, not text; leave it out, or write its text to a .txt file")
