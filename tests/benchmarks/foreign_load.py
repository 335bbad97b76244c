"""Training on a machine that others use too: tokens/s alone and beside busy processes, by how OpenMP's threads wait.

`python -m tests.benchmarks load`. Every setting has a process of its own, since OpenMP reads its variables once. The
parent asks it for one measurement at a time: alone, beside as many busy processes as there are cores, alone, ...
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
    found = {name: {"alone": [], "loaded": []} for name in SETTINGS}
    children = {name: start(variables) for name, variables in SETTINGS.items()}
    for child in children.values():
        child.stdout.readline()  # it is ready
    for _ in range(ROUNDS):
        for name, child in children.items():
            found[name]["alone"].append(ask(child))
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
        for name, child in children.items():
            found[name]["loaded"].append(ask(child))
        for each in busy:
            each.kill()
            each.wait()
    for child in children.values():
        child.stdin.close()
        child.wait()
    return describe(found, cores)


def describe(found: dict, cores: int) -> Result:
    own = next(iter(found.values()))
    rows = []
    for name, rates in found.items():
        alone, loaded = (statistics.median(rates[kind]) for kind in ("alone", "loaded"))
        rows.append(
            {
                "waiting": f"{name} (the recipe's)" if SETTINGS[name] == WAITING else name,
                "alone, tokens/s": alone,
                "alone, against OpenMP's own": alone / statistics.median(own["alone"]),
                "beside others, tokens/s": loaded,
                "smallest to largest": f"{min(rates['loaded']):,.0f} to {max(rates['loaded']):,.0f}",
                "slower by": alone / loaded,
            }
        )
    measured = (
        f"The demo's model, 8 rows of 256 tokens, forward, backward and AdamW in fp32, {cores} threads on {cores} "
        f"cores; medians of {ROUNDS} alternating measurements of {SECONDS:g} s. Others: {cores} processes that only "
        "count. A fair scheduler gives each side half of the machine then: slower by 2."
    )
    return Result("training beside other processes", measured, rows)


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
