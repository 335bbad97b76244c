"""Options of the commands: what they take, with the error that says so."""

import argparse
import math
from collections.abc import Callable


def add(parser: argparse.ArgumentParser, name: str, kind: Callable, default, text: str) -> None:
    shown = "" if default is None else " (default: %(default)s)"
    parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text + shown)


def positive(word: str) -> int:
    if not word.isdigit() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {word}")
    return int(word)


def port(word: str) -> int:
    if not word.isdigit() or not 1024 <= int(word) < 1 << 16:
        raise argparse.ArgumentTypeError(f"must be a port from 1024 on, got {word}; RUN_DIR comes first")
    return int(word)


def number(low: float, high: float, kind: Callable = float) -> Callable[[str], float]:
    def read(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} from {low:g} to {high:g}, got {word}")
        return value

    return read
