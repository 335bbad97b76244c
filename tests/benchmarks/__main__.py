"""`python -m tests.benchmarks SUITE [--only NAME]`: measures, and writes RESULTS.md.

`stream` takes `--corpus PATH_OR_GLOB` too; `guards` measures what the guards cost on the demo and on the 180M;
`checkpoints` how long a commit takes; `limits` memory: a long run's report, one huge document, a plan and its step;
`load` training beside other processes, in 3 minutes, on a machine that does nothing else; `start` seconds until an
answer. `faults` and `endurance` are commands of their own: `python -m tests.benchmarks.faults`.
"""

import argparse
import glob
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from recipe.data.docstrings import build_docstring_corpus
from tests.benchmarks import checkpoints, foreign_load, guards, limits, start_up, stream
from tests.benchmarks.results import RESULTS, format_section, write_section
from tests.benchmarks.stream import Options

SUITES = {
    "stream": stream.BENCHMARKS,
    "guards": guards.BENCHMARKS,
    "checkpoints": checkpoints.BENCHMARKS,
    "limits": limits.BENCHMARKS,
    "load": foreign_load.BENCHMARKS,
    "start": start_up.BENCHMARKS,
}
QUICK = {"rows": 130_000, "repeats": 1, "rounds": 1, "index_megabytes": 10}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", action="append", help="may be repeated; default: all but memory")
    parser.add_argument("--corpus", default="docstrings", help="parquet files with a column text, 20 MB to 1 GB")
    parser.add_argument("--minutes", type=float, default=10, help="how long memory reads")
    parser.add_argument("--quick", action="store_true", help="small sizes, once; prints and writes nothing")
    arguments = parser.parse_args()
    benchmarks = SUITES[arguments.suite]
    names = arguments.only or [name for name in benchmarks if name != "memory"]
    if unknown := set(names) - set(benchmarks):
        parser.error(f"{arguments.suite} has no {', '.join(unknown)}; there are {', '.join(benchmarks)}")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="recipe-benchmark-") as folder:
            result = benchmarks[name](build_options(Path(folder), arguments))
        section = format_section(name, result, command_of(name, arguments))
        print(section, flush=True)
        if not arguments.quick:
            write_section(name, section, RESULTS)


def build_options(folder: Path, arguments: argparse.Namespace) -> Options | guards.Options | Path:
    if arguments.suite in ("checkpoints", "limits", "load", "start"):
        return folder
    if arguments.suite == "guards":
        return guards.Options(steps=120, block=10, with_180m=False) if arguments.quick else guards.Options()
    source = arguments.corpus
    if source == "docstrings":
        source = str(build_docstring_corpus())
    source = str(Path(source).resolve())  # measured processes start in the checkout's root
    files = sorted(glob.glob(source))
    if not files:
        raise SystemExit(f"--corpus {arguments.corpus}: no such file")
    sizes = QUICK if arguments.quick else {}
    return Options(folder, source, files, describe(arguments.corpus, files), arguments.minutes, **sizes)


def describe(corpus: str, files: list[str]) -> str:
    """A corpus by the name of its folder and its size, without a path."""
    metadata = [pq.read_metadata(file) for file in files]
    column = metadata[0].schema.to_arrow_schema().names.index("text")
    size = sum(
        m.row_group(i).column(column).total_uncompressed_size for m in metadata for i in range(m.num_row_groups)
    )
    name = corpus if corpus == "docstrings" else Path(files[0]).parent.name
    counts = f"{len(files)} files, {sum(m.num_rows for m in metadata):,} documents, {size / 1e6:.0f} MB of text"
    return f"Corpus {name} ({counts})"


def command_of(name: str, arguments: argparse.Namespace) -> str:
    if arguments.suite != "stream":
        return f"python -m tests.benchmarks {arguments.suite} --only {name}"
    corpus = "" if arguments.corpus == "docstrings" else " --corpus 'FOLDER/*.parquet'"
    minutes = f" --minutes {arguments.minutes:g}" if name == "memory" else ""
    return f"python -m tests.benchmarks stream --only {name}{corpus}{minutes}"


if __name__ == "__main__":
    main()
