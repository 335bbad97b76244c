"""Log lines as a person sees them: without credentials, in colour on a terminal, and beside progress bars."""

import logging
import os
import sys
from typing import TextIO

from tqdm import tqdm

from recipe.redact import redact, remember_environment

FORM = "%(levelname)s %(name)s | %(message)s"
COLOURS = {"good": "32", "warning": "33", "error": "31", "info": "36"}
LEVELS = {"WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}


def wants_colour(stream: TextIO) -> bool:
    """Only on a terminal, and not where `NO_COLOR` is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class LineFormatter(logging.Formatter):
    """`LEVEL logger | message` without credentials. In colour, the level says how bad it is, and a record's `colour`
    (a key of `COLOURS`) paints its message."""

    def __init__(self, is_coloured: bool):
        super().__init__(FORM)
        self.is_coloured = is_coloured

    def format(self, record: logging.LogRecord) -> str:
        line = redact(super().format(record))
        if not self.is_coloured:
            return line
        head, separator, message = line.partition(" | ")
        level, _, name = head.partition(" ")
        level = _paint(level, COLOURS.get(LEVELS.get(record.levelname, ""), "2"))
        message = _paint(message, COLOURS.get(getattr(record, "colour", ""), ""))
        return f"{level} {_paint(f'{name}{separator}', '2')}{message}"


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


def make_handler(stream: TextIO) -> logging.StreamHandler:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(wants_colour(stream)))
    return handler


def configure_logging(level: int = logging.INFO) -> None:
    """Log to stderr, without credentials; also what Python warns of."""
    remember_environment()
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(make_handler(sys.stderr))
    root.setLevel(level)
    logging.captureWarnings(True)


def configure_transformers_logging() -> None:
    """What transformers logs goes the same way, where `configure_logging` was called. Imports it: a second."""
    if not any(isinstance(handler.formatter, LineFormatter) for handler in logging.getLogger().handlers):
        return
    from transformers.utils import logging as of_transformers

    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()


class BesideBars(logging.Handler):
    """While attached to `logger`, its lines do not land in a progress bar of tqdm, and are printed to stderr in a
    script that has not configured logging. The user's own handlers stay as they are; a logger that has one is left
    alone."""

    def __init__(self, logger: logging.Logger):
        super().__init__()
        self.logger = logger

    def attach(self) -> None:
        for left in [each for each in self.logger.handlers if isinstance(each, BesideBars)]:
            left.detach()  # of a training that ended with an exception
        if self.logger.handlers:
            return
        self.own, self.before = make_handler(sys.stderr), (self.logger.propagate, self.logger.level)
        if self.logger.level == logging.NOTSET and not self.logger.hasHandlers():
            self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        self.logger.propagate = False

    def detach(self) -> None:
        if self in self.logger.handlers:
            self.logger.removeHandler(self)
            self.logger.propagate, self.logger.level = self.before

    def emit(self, record: logging.LogRecord) -> None:
        above = self.logger.parent
        with tqdm.external_write_mode(file=sys.stderr):
            if above.hasHandlers():
                above.callHandlers(record)
            else:
                self.own.handle(record)
