"""Which column or key holds the text, for the message where the one that was named does not exist."""

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence

from recipe.errors import UserError

SHOWN_NAMES = 12
LONGEST_NAME = 40  # characters of a column's name; chosen: a CSV without a header has text there


def no_column(what: str, column: str, names: Sequence[str], usable: Sequence[str]) -> UserError:
    """`usable`: the columns or keys that hold text, the likeliest first."""
    if any(len(name) > LONGEST_NAME for name in names):  # a CSV without a header
        return UserError(
            f"{what} {column!r}, but {_listed(names)[:40]!r} ...; if that is text, put a line with the names "
            f"of the columns before it; {column!r} is read"
        )
    near = likeliest(column, usable)
    hint = f"; did you mean --text_column {shlex.quote(near)}?" if near else ""
    return UserError(f"{what} {column!r}" + (f"; it has {_listed(names)}" if names else "") + hint)


def likeliest(column: str, usable: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(column, usable, n=1) or [name for name in usable if name == "content"] or usable
    return near[0] if near else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def _how_to_write(values: Mapping[str, object]) -> str:
    """For an object of JSON without text."""
    if "messages" in values or "conversations" in values:
        return "a chat is no text: write each as one, by the template of your choice, under the key 'text'"
    lists = [name for name, value in values.items() if isinstance(value, list)]
    if len(lists) == 1:
        return f"if its documents are in {lists[0]!r}, save that array alone as the .json file"
    return "a document is an object with its text under one key, one in a line or all in an array"


class NoKey(UserError):
    """A document of JSON has no text under the key; `values` is what it holds."""

    def __init__(self, here: str, column: str, values: object):
        self.column, self.values = column, values if isinstance(values, dict) else {}
        super().__init__(
            f"{here} has no key {column!r}" + (f"; it has {_listed([*self.values])}" if self.values else "")
        )

    def with_fix(self, others: Iterable[object]) -> UserError:
        """The same with what helps, in view of `others`: values of other documents of the file."""
        objects = [each for each in others if isinstance(each, dict)]
        if any(self.column in each for each in objects):
            return UserError(f"{self}, where others have it; --on_bad_data skip would do, without such documents")
        texts = {name: len(value) for name, value in self.values.items() if isinstance(value, str)}
        near = likeliest(self.column, sorted(texts, key=lambda name: -texts[name]))
        if near is None:
            return UserError(f"{self}; {_how_to_write(self.values)}")
        skip = " --on_bad_data skip" if any(near not in each for each in objects) else ""
        return UserError(f"{self}; did you mean --text_column {shlex.quote(near)}{skip}?")
