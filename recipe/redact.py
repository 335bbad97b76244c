"""Removes credentials from all that leaves the process: log lines, messages, and every file with text in it.

The boundary is in three places: `console.LineFormatter`, `plain_json.dumps` and `message_of` (errors.py). URLs are
masked wherever one is recognized. What is known to be secret is masked wherever it appears, in any of its spellings:
the credentials in the URLs of the configuration, the hub token, and those in the environment.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
# A URL in a text: a quote ends it only where something follows that can stand behind a quoted word.
CHAR = r"""(?:[^\s<>"'\\]|["'\\]+(?![\s,:;)\]}>"'\\]|$))"""
URL = re.compile(rf"([A-Za-z][\w+.-]{{0,29}}://)({CHAR}+)")
ENCODED_URL = re.compile(
    r"(?i)([a-z][\w+.-]{0,29}%(?:25)*3A%(?:25)*2F%(?:25)*2F)[^\s<>&\"']*%(?:25)*(?:40|3F)[^\s<>&\"']*"
)
# Before "@": up to the path, or with "/", "?" or "#" in it where a name and a colon begin it, but no port follows.
USER = re.compile(r"[^/?#]*@|[^/?#:@\[]+:(?!\d*(?:[/?#]|$)).*?@")
# Where the scheme is missing, as in some libraries' messages: the values of names that mean a credential.
CREDENTIAL = r"(?i:[\w.-]{0,40}(?:sig|token|secret|passw|key|credential|auth|policy)[\w.-]{0,40})"
NAMED = re.compile(rf"([?&;#]{CREDENTIAL}=)(?!\*{{3}}(?:[\s.,:;)\]}}&#\"']|$))(?:(?![&;#]){CHAR})+")
TOKEN = re.compile(r"\b(hf_)[A-Za-z0-9]{16,}|(?i:(authorization\W{1,4}(?:bearer|basic) ))[\w.~+/-]+=*")
ENVIRONMENT = re.compile(r"TOKEN$|SECRET|PASSWORD|PASSWD|ACCESS_KEY$|API_KEY$")
# The folders of a path on this machine: "/data/web/" of "/data/web/*.parquet". URLs and relative names have none.
FOLDERS = re.compile(r"(?:^|(?<=[\s\"'`(\[=,]))(?:file://)?[~.]{0,2}/(?:[^\s/\"']+/)*(?=[^\s/])")
# Of a known credential: shorter values, and short words and numbers, would mask ordinary text.
MIN_LENGTH, MIN_LENGTH_OF_WORDS = 5, 8
WORD = re.compile(r"[A-Za-z]+|[\d.:-]+")
PUNCTUATION = ".,:;)]}"  # of the sentence that a URL ends
SECRET_LENGTH = 16  # a value in a query that is as long is one, unless it is a word or a number

_known: list[str] = []  # in all spellings, the longest first


def remember(*credentials: str | None) -> None:
    """Values to be masked wherever they appear, whatever stands around them."""
    found = {*_known}
    for value in filter(None, credentials):
        if len(value) >= (MIN_LENGTH_OF_WORDS if WORD.fullmatch(value) else MIN_LENGTH):
            found.update(_spellings(value))
    _known[:] = sorted(found, key=lambda each: (-len(each), each))


def remember_urls(value) -> None:
    """The credentials in all URLs of a JSON-able value."""
    remember(*(secret for text in _strings(value) if "://" in text for secret in _secrets_of(text)))


def known() -> tuple[str, ...]:
    """What is remembered, for another process of the run."""
    return tuple(_known)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _secrets_of(url: str) -> Iterator[str]:
    rest = url.partition("://")[2]
    if match := USER.match(rest):
        name, _, password = match[0][:-1].partition(":")
        yield password or name
        yield match[0][:-1] if password else ""  # "user:password", also where the scheme is missing
        rest = rest[match.end() :]
    for part in re.split("[?&#]", rest)[1:]:
        name, equals, value = part.partition("=") if "=" in part else ("", "", part)
        is_opaque = not WORD.fullmatch(value) and (len(value) >= SECRET_LENGTH or not equals)
        if is_opaque or re.fullmatch(CREDENTIAL, name):
            yield value


def _spellings(value: str) -> set[str]:
    """`value` as it is, percent-decoded and encoded, and as JSON, Python and a shell would quote it."""
    plain = {value, unquote(value), unquote_plus(value)}
    coded = {
        code(each, safe=safe) for each in plain for code in (quote, quote_plus) for safe in ("", "/", "/:+!$'()*,;=@")
    }
    coded |= {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), each) for each in coded}
    spelled = plain | coded
    for each in plain:
        spelled |= {json.dumps(each)[1:-1], json.dumps(each, ensure_ascii=False)[1:-1], repr(each)[1:-1]}
        spelled.add(shlex.quote(f" {each}")[2:-1])
    return spelled


def redact(text: str) -> str:
    """`text` without `user:password@`, the values in the query of a URL, hub tokens, and remembered values."""
    if "://" in text:
        text = URL.sub(lambda match: match[1] + _without_credentials(match[2]), text)
    for value in _known:
        if value in text:
            text = text.replace(value, MASK)
    if "%" in text:
        text = ENCODED_URL.sub(rf"\1{MASK}", text)
    if "=" in text:
        text = NAMED.sub(rf"\1{MASK}", text)
    return TOKEN.sub(lambda match: (match[1] or match[2]) + MASK, text)


def _without_credentials(rest: str) -> str:
    """What follows `scheme://`, without user, values of the query, and values of the fragment."""
    rest, end = rest.rstrip(PUNCTUATION), rest[len(rest.rstrip(PUNCTUATION)) :]
    rest = USER.sub(f"{MASK}@", rest, count=1) if USER.match(rest) else rest
    for mark in "?#":
        address, found, values = rest.partition(mark)
        if found and (mark == "?" or "=" in values):  # other fragments are places in a page
            return f"{address}{mark}{_without_values(re.split('([&;#])', values))}{end}"
    return rest + end


def _without_values(parts: Iterable[str]) -> str:
    return "".join(
        part if part in ("", "&", ";", "#") else f"{part.partition('=')[0]}={MASK}" if "=" in part else MASK
        for part in parts
    )


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
