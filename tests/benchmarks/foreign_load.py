"""Training on a machine that others use too: tokens/s alone and beside busy processes, by how OpenMP's threads wait.

`python -m tests.benchmarks load`. Every setting has a process of its own, since OpenMP reads its variables once. The
parent asks it for one measurement at a time: alone, beside one busy process, beside as many as there are cores.
"""

import os
import statistics
import subprocess
import sys
import time

from recipe.threads import WAITING
from tests.benchmarks.results import ROOT, Result

SECONDS, ROUNDS = 2.5, 2
SETTINGS = {
    "OpenMP's own": {},
    "no spins": {"OMP_WAIT_POLICY": "passive"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "20,000 spins": {"GOMP_SPINCOUNT": "20000"},
}
BUSY = "while True: pass"
CHILD = "from tests.benchmarks.foreign_load import serve; serve()"
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND")


def measure_load(_options) -> Result:
    cores = len(os.sched_getaffinity(0))
    found = {name: {others: [] for others in (0, 1, cores)} for name in SETTINGS}
    children = {name: start(variables) for name, variables in SETTINGS.items()}
    for child in children.values():
        child.stdout.readline()  # it is ready
    for others in [*found["no spins"]] * ROUNDS:
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        for name, child in children.items():
            found[name][others].append(ask(child))
        for each in busy:
            each.kill()
            each.wait()
    for child in children.values():
        child.stdin.close()
        child.wait()
    return describe(found, cores)


def describe(found: dict[str, dict[int, list[float]]], cores: int) -> Result:
    """`found`: by setting and number of others, tokens/s."""
    alone_by_itself = statistics.median(found["OpenMP's own"][0])
    rows = []
    for name, rates in found.items():
        alone, *loaded = (statistics.median(each) for each in rates.values())
        rows.append(
            {
                "waiting": f"{name} (the recipe's)" if SETTINGS[name] == WAITING else name,
                "alone, tokens/s": alone,
                "alone, against OpenMP's own": alone / alone_by_itself,
                **{
                    f"slower beside {others} by": f"{alone / rate:.2f} ({fair(cores, others):.2f} is fair)"
                    for others, rate in zip([*rates][1:], loaded, strict=True)
                },
                f"smallest to largest beside {cores}": f"{min(rates[cores]):,.0f} to {max(rates[cores]):,.0f}",
            }
        )
    measured = (
        f"The demo's model, 8 rows of 256 tokens, forward, backward and AdamW in fp32, {cores} threads on {cores} "
        f"cores; medians of {ROUNDS} alternating measurements of {SECONDS:g} s. Others: processes that only count. "
        "Fair: each thread, the training's and the others', gets the same share of the cores."
    )
    return Result("training beside other processes", measured, rows)


def fair(cores: int, others: int) -> float:
    """By how much a training with a thread on each core is slower beside `others` that use one each."""
    return (cores + others) / cores


def start(variables: dict[str, str]) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CHILD], cwd=ROOT, env=environment, text=True, **pipes)


def ask(child: subprocess.Popen) -> float:
    print("measure", file=child.stdin, flush=True)
    return float(child.stdout.readline())


def serve() -> None:
    """The child: for each line on stdin, trains for a while and prints tokens/s."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipe.model import load_model_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_model_config(ROOT / "recipe/configs/llama_3m_model.json"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(4096, (8, 256))

    def train(seconds: float) -> float:
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() < begin + seconds:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        return steps * ids.numel() / (time.perf_counter() - begin)

    train(1)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(train(SECONDS), flush=True)


BENCHMARKS = {"load": measure_load}
