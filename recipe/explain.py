"""Documentation from the code: `recipe explain ID`, docs/findings.md, docs/guards.md and docs/keys.md.

`python -m recipe.explain docs` writes the generated parts of the three pages, which a test compares with the code.
"""

import difflib
import inspect
import re
import sys
import textwrap
from pathlib import Path

from recipe.errors import UserError
from recipe.guards import FINDING_IDS, GUARDS, MEANINGS, Guard
from recipe.keys import format_page

SECTIONS = ("When", "Measured", "Try", "Cannot see")
BEGIN = "<!-- generated from the code by `python -m recipe.explain docs` -->"
END = "<!-- end of the generated part -->"
WIDTH = 110


def guard_of(name: str) -> type[Guard]:
    """Raises `UserError` for an id that no guard has."""
    for guard in GUARDS:
        if name in guard.ids:
            return guard
    close = difflib.get_close_matches(name, FINDING_IDS, n=3)
    known = textwrap.fill(", ".join(FINDING_IDS), WIDTH)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are\n{known}"
    raise UserError(f"no finding is called {name!r}; {hint}")


def sections_of(guard: type[Guard], name: str) -> dict[str, str]:
    """The sections of the class's docstring, each as one line of text. `Try (ID):` is for one id alone."""
    sections: dict[str, str] = {}
    for part in re.split(r"\n(?=[A-Z][a-z ]+(?: \(\w+\))?: )", inspect.cleandoc(guard.__doc__ or ""))[1:]:
        title, text = part.split(": ", 1)
        title, of_id = re.fullmatch(r"([\w ]+?)(?: \((\w+)\))?", title).groups()
        if of_id in (None, name):
            sections[title] = " ".join([*filter(None, [sections.get(title)]), *text.split()])
    return sections


def explain(name: str) -> str:
    """One id's section, Markdown. Raises `UserError` for an unknown id."""
    guard = guard_of(name)
    sections = sections_of(guard, name)
    module = inspect.getsourcefile(guard).rsplit("recipe", 1)[-1].replace("\\", "/")
    paragraphs = [f"**Means** {MEANINGS[name]}", *(f"**{title}** {sections[title]}" for title in SECTIONS)]
    if guard.explained_by:
        paragraphs.append(f"**Can be caused by** {', '.join(f'`{cause}`' for cause in guard.explained_by)}")
    paragraphs.append(f"**Code** `{guard.__name__}` in `recipe{module}`")
    wrapped = [textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    return "\n\n".join([f"## {name}", *wrapped]) + "\n"


def overview() -> str:
    """All ids, a line each."""
    width = max(map(len, FINDING_IDS))
    return "\n".join(f"{name:<{width}}  {meaning}" for name, meaning in MEANINGS.items())


def table() -> str:
    """A row for each id: what it catches, what it cannot see, when it judges."""
    rows = ["| finding | catches | cannot see | judges |", "|---|---|---|---|"]
    for name in FINDING_IDS:
        sections = sections_of(guard_of(name), name)
        rows.append(f"| `{name}` | {MEANINGS[name]} | {sections['Cannot see']} | {sections['When']} |")
    return "\n".join(rows) + "\n"


def generated(page: str, part: str) -> str:
    """`page` with the text between its markers replaced."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{part}\n{END}{rest.split(END)[1]}"


def pages(folder: Path) -> dict[Path, str]:
    """The three pages as they should be."""
    parts = {"findings.md": "\n".join(map(explain, FINDING_IDS)), "guards.md": table(), "keys.md": format_page()}
    paths = {folder / name: part for name, part in parts.items()}
    return {path: generated(path.read_text(encoding="utf-8"), part) for path, part in paths.items()}


def main() -> None:
    for path, text in pages(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
