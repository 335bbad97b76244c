"""Seconds until an answer: help, typing errors, and what importing the guards adds to importing `Trainer`.

`python -m tests.benchmarks start`. Fresh processes that alternate; files are in the page cache after the first round.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.results import ROOT, Result

ROUNDS = 3
MISSPELT = "model.json"
DEMO = "recipe/configs/cpu_demo.json"
STARTS = {
    "recipe --help": ["-m", "recipe", "--help"],
    "recipe train --help": ["-m", "recipe", "train", "--help"],
    "a misspelt key": ["-m", "recipe", "train", DEMO, "--learning_rat", "1"],
    "a value of a wrong type": ["-m", "recipe", "train", DEMO, "--learning_rate", "fast"],
    "a misspelt key of the model's JSON": ["-m", "recipe", "train", DEMO, "--model_config", MISSPELT],
    "a file that is not there": ["-m", "recipe", "train", DEMO, "--source", "nowhere.txt"],
    "recipe plan, demo": ["-m", "recipe", "plan", DEMO],
    "recipe plan, 180M": ["-m", "recipe", "plan", "recipe/configs/llama_180m.json", "--use_cpu"],
    "import transformers": ["-c", "import transformers"],
    "import torch, transformers": ["-c", "import torch, transformers"],
    "from transformers import Trainer": ["-c", "from transformers import Trainer"],
    "from recipe.guards import RegressionCallback": ["-c", "from recipe.guards import RegressionCallback"],
}


def measure_start(folder: Path) -> Result:
    (folder / MISSPELT).write_text('{"hiden_size": 64}')
    found = {name: [] for name in STARTS}
    for number in range(ROUNDS + 1):
        for name, words in STARTS.items():
            seconds = run_once([str(folder / word) if word == MISSPELT else word for word in words])
            found[name] += [seconds] if number else []
    rows = [
        {
            "start": name,
            "wall, s": statistics.median(wall for wall, _ in times),
            "processor, s": statistics.median(processor for _, processor in times),
        }
        for name, times in found.items()
    ]
    measured = (
        f"Fresh processes; medians of {ROUNDS} alternating rounds after one that is not counted. The "
        "environment of the tests has peft, which transformers imports."
    )
    return Result("seconds until an answer", measured, rows)


def run_once(words: list[str]) -> tuple[float, float]:
    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, begin = processor(), time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - begin, processor() - before


BENCHMARKS = {"start": measure_start}
