"""The commands: `python -m recipe COMMAND ...`. One screen; each command lives in its own module."""

import argparse
import atexit
import contextlib
import difflib
import itertools
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.console import configure_logging, configure_transformers_logging
from recipe.errors import (
    DataError,
    UserError,
    exit_code_of,
    handle_endings,
    is_disk_error,
    is_lost_peer,
    message_of,
)
from recipe.options import add, number, port, positive
from recipe.plain_json import dumps
from recipe.read_config import read_config
from recipe.rundir import ended_on_purpose_before, write_exit
from recipe.threads import choose_waiting

if TYPE_CHECKING:
    pass

USAGE = """usage: python -m recipe COMMAND ...

  train [CONFIG.json] [--field value ...] [--json]    the run; without CONFIG.json llama_180m on a GPU, else the demo
  check CONFIG.json [--field value ...] [--json]      every probe on the first batch, no training; 3: error
  verify-data CONFIG.json [--num_batches 100] [--workers W] [--field value ...] [--json]
                                                      read the stream as training does: repetition, hold-out, speed
  plan CONFIG.json [--field value ...] [--json]       parameters, FLOPs, memory, disk and hours, without a run
  tokenize CONFIG.json OUT_DIR [--field value ...]    write the source's token ids once; then use OUT_DIR as `source`
  report RUN_DIR [--watch [PORT] | --bundle]          findings and curve -> RUN_DIR/report.html; --watch serves it on
                                                      this machine while the run goes on; --bundle packs what is
                                                      needed to debug a finding, without data or paths
  new FILE.json [--size 3m|15m|60m|180m] [--train_tokens N]
                                                      write a starting config; never overwrites
  generate RUN "prompt" [--num_samples N] [--json]    continue a prompt; RUN: a run, its final/, a checkpoint-N,
                                                      or a folder of a transformers model
  evaluate RUN [SOURCE ...] [--tasks NAMES] [--json]  loss, perplexity, bits per byte, accuracy; without SOURCE of the
                                                      run's hold-out; tasks by lm-evaluation-harness
  compare RUN RUN [RUN ...] [--out FILE] [--json]     curves, settings, first different step, end -> compare.html
  explain [ID]                                        what a finding means, how it was measured, what to try
  trajectory record OUT.json RUN_DIR [RUN_DIR ...]    healthy runs of one config -> a reference curve
"""
CONFIG_COMMANDS = ("train", "check", "verify-data", "plan", "tokenize")
KEYS = """
--field value overrides any key of the config; a bare --field means true, null unsets. Keys, their types and defaults:
"""
MODEL = "a run, its final/, a checkpoint-N, or a folder of a transformers model"
GOOD, UNEXPECTED, USER_INPUT, STOPPED_BY_GUARD = 0, 1, 2, 3
PROJECT = Path(__file__).resolve().parent.parent  # of an installed recipe: where the package lies
PORT = 8765  # of `report --watch`


def train(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        arguments = [_default_config(), *arguments]
    options, config = _parse(_config_parser("train"), arguments)
    from recipe.train import run_training

    outcome = run_training(config)
    if not outcome.is_main:
        write_exit(outcome.code, outcome.result["verdict"], None)  # on another machine nobody else does
    if options.json and outcome.is_main:
        try:
            print(dumps(outcome.result), flush=True)
        except OSError as error:  # exit.json has the code already
            logging.getLogger("recipe").warning("the result cannot be printed (%s); run.json has it", error)
    return outcome.code


def _default_config() -> str:
    name = "llama_180m" if _has_gpu() else "cpu_demo"
    logging.getLogger("recipe").info("no CONFIG.json is given: training recipe/configs/%s.json", name)
    return str(PROJECT / f"recipe/configs/{name}.json")


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:  # torch takes seconds to import
        return False
    import torch

    return torch.cuda.is_available()


def check(arguments: list[str]) -> int:
    options, config = _parse(_config_parser("check"), arguments)
    from recipe.check import format_check, run_check

    result = run_check(config)
    if config.training.process_index == 0:
        print(dumps(result) if options.json else format_check(result))
    return result["exit_code"]


def plan(arguments: list[str]) -> int:
    options, config = _parse(_config_parser("plan"), arguments, reads_data=False)
    from recipe.plan import format_plan, make_plan

    result = make_plan(config)
    if os.environ.get("RANK", "0") == "0":
        print(dumps(result) if options.json else format_plan(result))
    return GOOD


def verify_data(arguments: list[str]) -> int:
    parser = _config_parser("verify-data")
    parser.add_argument("--num_batches", type=positive, default=100)
    parser.add_argument("--workers", dest="dataloader_num_workers")
    options, config = _parse(parser, arguments)
    from recipe import verify

    result = verify.verify_data(config, options.num_batches)
    print(dumps(result) if options.json else verify.format_result(result))
    return STOPPED_BY_GUARD if result["findings"] else GOOD


def tokenize(arguments: list[str]) -> int:
    parser = _config_parser("tokenize")
    parser.add_argument("out_dir", type=Path)
    options, config = _parse(parser, arguments)
    from recipe.data.token_cache import write_token_caches

    sources = write_token_caches(config, options.out_dir)
    print(dumps({"source": sources}))
    return GOOD


def _config_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"recipe {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--json", action="store_true")
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: list[str], reads_data: bool = True):
    """The command's own options, and the configuration; all remaining words are overrides."""
    options, overrides = parser.parse_known_args(arguments)
    if not Path(options.config).exists() and (PROJECT / options.config).is_file():  # as `bash run_clm.sh` does
        options.config = str(PROJECT / options.config)
    reading = read_config(options.config, overrides)
    if reads_data:
        reading.check_source()
    reading.refuse()  # at once: what follows takes seconds to import
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("recipe").info("loading torch and transformers: some seconds, up to a minute the first time")
    configure_transformers_logging()
    if getattr(options, "dataloader_num_workers", None) is not None:
        overrides += ["--dataloader_num_workers", options.dataloader_num_workers]
    from recipe.resolve import resolve

    return options, resolve(options.config, overrides)


def new(arguments: list[str]) -> int:
    from recipe.new import SIZES, how_long, write_config

    parser = argparse.ArgumentParser("recipe new", description="Write a starting config; never overwrites.")
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--size", choices=SIZES, default="3m", help="parameters of the model (default: %(default)s)")
    add(parser, "train_tokens", number(1e5, 1e13), None, "tokens of the run; default: 20 for each parameter")
    options = parser.parse_args(arguments)
    print(write_config(options.file, options.size, options.train_tokens), flush=True)
    from recipe.resolve import resolve

    print(how_long(resolve(str(options.file), [])))
    return GOOD


def report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe report", description="Write the report of a run.")
    parser.add_argument("run_dir", type=Path, help="a run, or the output_dir of a Trainer that the guards watched")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--bundle", action="store_true", help="pack what is needed to debug a finding, without data")
    kinds.add_argument(
        "--watch", nargs="?", type=port, const=PORT, metavar="PORT", help="serve the page on this machine"
    )
    options = parser.parse_args(arguments)
    from recipe.bundle import write_bundle
    from recipe.report import write_report
    from recipe.watch import watch

    if options.watch is not None:
        watch(options.run_dir, options.watch)
        return GOOD
    print(write_bundle(options.run_dir) if options.bundle else write_report(options.run_dir))
    return GOOD


def generate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "recipe generate",
        usage="recipe generate RUN PROMPT [options]",
        description="Continue a prompt with a trained model.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=MODEL)
    parser.add_argument("prompt", help="the text to continue; may be empty")
    add(parser, "num_samples", positive, 1, "continuations, with the seeds from --seed on")
    add(parser, "max_new_tokens", positive, 128, "length of each, at most")
    add(parser, "temperature", number(0, 100), 0.7, "of the probabilities; 0: always the most likely token")
    add(parser, "top_p", number(1e-6, 1), 0.95, "among the most likely tokens that have this probability together")
    add(parser, "seed", number(0, 2**31, int), 42, "of the random choices")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, and no stream")
    options = parser.parse_args(arguments)
    from recipe.generate import Sampling, generate_samples
    from recipe.trained import find_trained

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    result = generate_samples(
        find_trained(options.run), options.prompt, sampling, options.num_samples, not options.json
    )
    if options.json:
        print(dumps(result))
    return GOOD


def evaluate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "recipe evaluate",
        usage="recipe evaluate RUN [SOURCE ...] [options]",
        description="How well a trained model predicts other text.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=MODEL)
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="as `source` of a config; none: the run's hold-out"
    )
    add(parser, "text_column", str, None, "column or key of the text; default: that of the run, or text")
    add(parser, "block_size", positive, None, "tokens in a block; default: that of the run")
    add(parser, "batch_size", positive, 8, "blocks that are scored at once")
    add(parser, "max_tokens", positive, 1_000_000, "of each source, at most")
    add(parser, "tasks", str, None, "names of lm-evaluation-harness, with commas between")
    add(parser, "include_path", Path, None, "folder with task files of your own")
    add(parser, "limit", positive, None, "examples of each task, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args(arguments)
    from recipe.evaluate import format_evaluation, run_evaluation
    from recipe.trained import find_trained

    result = run_evaluation(find_trained(options.run), options)
    print(dumps(result) if options.json else format_evaluation(result))
    return max((each.get("exit_code", GOOD) for each in result["sources"]), default=GOOD)


def compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "recipe compare",
        usage="recipe compare RUN RUN ... [--out FILE] [--json]",
        description="What differs between runs; none of them changes.",
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="the first is the baseline")
    add(parser, "out", Path, Path("compare.html"), "the page to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
    options = parser.parse_args(arguments)
    from recipe.compare import compare_runs, format_comparison, write_page

    comparison = compare_runs(options.run_dirs)
    page = write_page(comparison, options.out)
    print(dumps(comparison.result | {"page": str(page)}) if options.json else format_comparison(comparison, page))
    return GOOD


def explain(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe explain", description="What a finding means.")
    parser.add_argument("id", nargs="?", help="of a finding; none: list all ids")
    options = parser.parse_args(arguments)
    from recipe.explain import explain, overview

    print(explain(options.id) if options.id else overview())
    return GOOD


def trajectory(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("recipe trajectory", description="Make a reference curve of healthy runs.")
    parser.add_argument("action", choices=["record"])
    parser.add_argument("out", type=Path)
    parser.add_argument("run_dirs", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    from recipe.record import record_reference

    print(record_reference(options.out, options.run_dirs))
    return GOOD


COMMANDS = {
    "train": train,
    "check": check,
    "plan": plan,
    "verify-data": verify_data,
    "tokenize": tokenize,
    "report": report,
    "new": new,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "explain": explain,
    "trajectory": trajectory,
}


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code (README lists them). A user's mistake is one message, never a
    traceback."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return GOOD if arguments else USER_INPUT
    if arguments[0] in CONFIG_COMMANDS and {"-h", "--help"} & set(arguments):
        print(help_of(arguments[0]))
        return GOOD
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        return _fail(USER_INPUT, f"no command {arguments[0]!r}; {hint}")
    try:
        if arguments[0] not in (*CONFIG_COMMANDS, "new") and not {"-h", "--help"} & set(arguments):
            configure_transformers_logging()
        code = COMMANDS[arguments[0]](arguments[1:])
        if arguments[0] != "train":
            sys.stdout.flush()  # a full disk fails here, not when the process ends
        return code
    except (UserError, DataError) as error:
        return _fail(error.exit_code, message_of(error))
    except SystemExit as stop:  # argparse
        return stop.code or GOOD
    except Exception as error:
        if not is_disk_error(error) and not is_lost_peer(error):
            raise
        return _fail(exit_code_of(error), message_of(error))


def help_of(command: str) -> str:
    """Its lines of the usage, and every key of a configuration."""
    from recipe.keys import format_help

    lines = USAGE.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"  {command} "))
    more = (line for line in lines[first + 1 :])
    own = [lines[first], *itertools.takewhile(lambda line: line.startswith("      "), more)]
    return "\n".join([*own, KEYS, format_help()])


def _fail(code: int, reason: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            print(f"error: {reason}", file=sys.stderr, flush=True)
    write_exit(code, reason, None)
    return code


def _terminate(number, frame):
    raise KeyboardInterrupt(number)


def main() -> None:
    """Entry point of the command line. Leaves by `os._exit`: threads of streaming readers may abort an interpreter
    that is shutting down."""
    choose_waiting()
    configure_logging()
    for name in ("httpx", "filelock", "fsspec", "datasets", "torch", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when it is imported; hides retries
    handle_endings(_terminate)  # while the training runs, its own handler saves a checkpoint
    if ended_on_purpose_before():
        os._exit(GOOD)  # torchrun would start it again; run_clm.sh returns the code that was reported
    try:
        code = run(sys.argv[1:])
    except BrokenPipeError:  # of `| head`
        os._exit(GOOD)
    except KeyboardInterrupt as interrupt:
        code = _fail(exit_code_of(interrupt), message_of(interrupt))
    except Exception:
        logging.getLogger("recipe").exception("unexpected error; a bug in the recipe or in a library")
        write_exit(UNEXPECTED, "unexpected error", None)
        code = UNEXPECTED
    with contextlib.redirect_stdout(sys.stderr):  # what was asked for is printed
        atexit._run_exitfuncs()  # trackers finish their uploads here
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # it has been reported; the code is the one in exit.json
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
