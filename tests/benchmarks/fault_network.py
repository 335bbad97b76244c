"""20 scripts of a network that fails in mid-run: ten faults, each once for two requests and once for good.

A fault that passes costs nothing. One that stays ends the run with exit code 4 and a checkpoint of its last step; the
run is then resumed on a network that works.
"""

import random
import tempfile
from pathlib import Path

from recipe.data import files, formats
from tests.benchmarks.fault_runs import judge, prepare, publish, quiet_and_short, train
from tests.range_server import RangeServer

FAULTS = ("404", "401", "429", "503", "close", "reset", "short", "stall", "no range", "page")
RETRY_SECONDS, STALL_SECONDS = (0.01, 0.01, 0.01), 0.3


def network_faults(faults: tuple[str, ...] = FAULTS, seed: int = 0) -> list[dict]:
    """Runs the scripts; a dict of figures for each."""
    before = files.RETRY_SECONDS, files.STALL_SECONDS
    files.RETRY_SECONDS, files.STALL_SECONDS = RETRY_SECONDS, STALL_SECONDS
    generator = random.Random(seed)
    try:
        with tempfile.TemporaryDirectory(prefix="recipe-faults-") as name, quiet_and_short(Path(name)):
            folder = Path(name)
            words = prepare(folder)
            with RangeServer(folder / "data") as server:
                source = ["--source", f"{server.url}/a.parquet"]
                whole = train([*words, *source, "--output_dir", str(folder / "whole")])
                count = len(server.requests())
            scripts = [(how, stays) for how in faults for stays in (False, True)]
            return [
                _script(folder, words, whole, number, *script, generator.randint(2 * count // 3, count - 4))
                for number, script in enumerate(scripts)
            ]
    finally:
        files.RETRY_SECONDS, files.STALL_SECONDS = before


def _script(folder: Path, words: list[str], whole, number: int, how: str, stays: bool, begin: int) -> dict:
    run_dir = folder / f"run-{number}"
    words = [*words, "--output_dir", str(run_dir)]
    formats.close_parquet()
    with RangeServer(folder / "data") as server:
        source = ["--source", f"{server.url}/a.parquet"]
        server.fail_after(begin, how, count=10**6 if stays else 2)
        ran = [train([*words, *source])]
        server.reset()
        formats.close_parquet()
        if ran[0].code == 4:
            ran.append(train([*words, *source, "--resume_from_checkpoint", "latest"]))
    name = f"{how}, {'for good' if stays else 'twice'}"
    return judge(name, whole, folder / "whole", ran, run_dir, expected=4 if stays else 0)


MEASURED = """A run of 12 steps over a loopback HTTP server that begins to fail, for two requests or for good. Where it
fails for good the run ends with exit code 4, and is resumed on a server that works. `survived`: the expected
exit code, at most three lines of error, no traceback. Rows and weights are compared with the run that nothing
disturbed. `lines`: error lines; `warnings`: lines about retries."""

if __name__ == "__main__":
    publish("fault_network", "a network that fails in mid-run", MEASURED, network_faults())
