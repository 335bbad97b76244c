"""Scripts of a network that fails in mid-run: ten faults, each once for two requests and once for good.

A fault that passes costs nothing. One that stays ends the run with exit code 4 and a checkpoint of its last step; the
run is then resumed on a network that works.
"""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

from recipe.data import files, formats
from tests.benchmarks.fault_scripts import Whole, judge, prepare, quiet_and_short, train
from tests.range_server import RangeServer

FAULTS = ("404", "401", "429", "503", "close", "reset", "short", "stall", "no range", "page")
NETWORK_SCRIPTS = [(how, stays) for how in FAULTS for stays in (False, True)]
RETRY_SECONDS, STALL_SECONDS = (0.01, 0.01, 0.01), 0.3


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    before = files.RETRY_SECONDS, files.STALL_SECONDS
    files.RETRY_SECONDS, files.STALL_SECONDS = RETRY_SECONDS, STALL_SECONDS
    try:
        yield
    finally:
        files.RETRY_SECONDS, files.STALL_SECONDS = before


def begin_network(folder: Path) -> Whole:
    words = prepare(folder)
    with quiet_and_short(folder), impatient(), RangeServer(folder / "data") as server:
        ran = train([*words, "--source", f"{server.url}/a.parquet", "--output_dir", str(folder / "whole")])
        return Whole(str(folder), words, ran, len(server.requests()))


def run_network_script(whole: Whole, number: int, run_dir: Path, chance: random.Random) -> dict:
    """The figures of one of NETWORK_SCRIPTS."""
    how, stays = NETWORK_SCRIPTS[number % len(NETWORK_SCRIPTS)]
    words, served = [*whole.words, "--output_dir", str(run_dir)], Path(whole.folder) / "data"
    formats.close_parquet()
    with quiet_and_short(run_dir.parent), impatient(), RangeServer(served) as server:
        source = ["--source", f"{server.url}/a.parquet"]
        begin = chance.randint(2 * whole.num_requests // 3, whole.num_requests - 4)
        server.fail_after(begin, how, count=10**6 if stays else 2)
        ran = [train([*words, *source])]
        server.reset()
        formats.close_parquet()
        if ran[0].code == 4:
            ran.append(train([*words, *source, "--resume_from_checkpoint", "latest"]))
    figures = judge(whole, ran, run_dir, expected=4 if stays else 0)
    is_silent = not (figures["warnings"] or figures["errors"] or how in ("close", "reset"))  # aiohttp asks once more
    what = f"{how}, {'for good' if stays else 'twice'}"
    return figures | {"survived": figures["survived"] and not is_silent, "what": what, "steps_lost": 0}
