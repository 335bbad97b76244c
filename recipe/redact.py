"""Removes credentials from all that leaves the process: log lines, messages, and every file with text in it.

The boundary is in three places: `console.LineFormatter`, `plain_json.dumps` and `message_of` (errors.py).
"""

import os
import re

MASK = "***"
# Of URLs: what is before "@", and each value of the query, whatever its name.
USER = re.compile(r"([A-Za-z][\w+.-]*://)[^\s/?#\"'<>\\]+@")
URL_QUERY = re.compile(r"([A-Za-z][\w+.-]*://[^\s?#\"'<>\\]*\?)([^\s#\"'<>\\]+)")
VALUE = re.compile(r"=[^&;]*")
# Where the scheme is missing, as in some libraries' messages: the values of names that mean a credential.
NAMED = re.compile(r"(?i)([?&;][\w.-]*(?:sig|token|secret|passw|key|credential|auth|policy)[\w.-]*=)[^\s&;#\"'<>\\]+")
TOKEN = re.compile(r"\b(hf_)[A-Za-z0-9]{16,}|(?i:(authorization\W{1,4}(?:bearer|basic) ))[\w.~+/-]+=*")
ENVIRONMENT = re.compile(r"TOKEN$|SECRET|PASSWORD|PASSWD|ACCESS_KEY$|API_KEY$")
# The folders of a path on this machine: "/data/web/" of "/data/web/*.parquet". URLs and relative names have none.
FOLDERS = re.compile(r"(?:^|(?<=[\s\"'`(\[=,]))(?:file://)?[~.]{0,2}/(?:[^\s/\"']+/)*(?=[^\s/])")
MIN_LENGTH = 8  # of a known credential: shorter values would mask ordinary words

_known: set[str] = set()


def remember(*credentials: str | None) -> None:
    """Values to be masked wherever they appear, whatever stands around them."""
    _known.update(value for value in credentials if value and len(value) >= MIN_LENGTH)


def redact(text: str) -> str:
    """`text` without `user:password@`, the values in the query of a URL, hub tokens, and remembered values."""
    for value in _known:
        text = text.replace(value, MASK)
    if "://" in text:
        text = USER.sub(rf"\1{MASK}@", text)
        text = URL_QUERY.sub(lambda match: match[1] + _mask_query(match[2]), text)
    if "=" in text:
        text = NAMED.sub(rf"\1{MASK}", text)
    return TOKEN.sub(lambda match: (match[1] or match[2]) + MASK, text)


def _mask_query(query: str) -> str:
    return VALUE.sub(f"={MASK}", query) if "=" in query else MASK


def redact_all(value):
    """A copy of a JSON-able value with every string redacted, keys too."""
    if isinstance(value, dict):
        return {redact_all(key): redact_all(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def without_folders(value):
    """A copy of a JSON-able value in which paths of this machine are names."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


def remember_environment() -> None:
    """What the environment's variables hold under names that mean a credential."""
    remember(*(value for name, value in os.environ.items() if ENVIRONMENT.search(name)))
