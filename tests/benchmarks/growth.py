"""`python -m tests.benchmarks.growth [--only AXIS] [--json]`: how the cost of a token grows.

From the demo one thing grows at a time: block, rows, vocabulary, model, workers. Each point is a process of its own
that trains a few steps with the guards on. Writes the section `growth` of RESULTS.md, and docs/growth.svg.
"""

import argparse
import json
import math
import statistics
import sys

from recipe.data.docstrings import default_cache_dir
from tests.benchmarks.measure import ROOT, run_fresh
from tests.benchmarks.measure_throughput import point
from tests.benchmarks.results import Result, format_section, write_section

PLOT = ROOT / "docs" / "growth.svg"
DEMO = json.loads((ROOT / "recipe/configs/llama_3m_model.json").read_text())
# Hidden size, layers, heads, MLP
SHAPES = {"1M": (96, 4, 3, 256), "3M": (192, 6, 6, 512), "12M": (384, 6, 6, 1024), "45M": (576, 10, 9, 1536)}
SHAPES |= {"180M": (1024, 14, 16, 2816)}
STEPS, WARM = 6, 2


def model(**changes) -> dict:
    return {"model_config": {**DEMO, **changes}}


def shaped(hidden: int, layers: int, heads: int, mlp: int) -> dict:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": mlp}
    return model(**sizes, num_attention_heads=heads, num_key_value_heads=heads)


def block(size: int) -> dict:
    """Of 4,096 tokens a step."""
    return {"block_size": size, "per_device_train_batch_size": 4096 // size, **model(max_position_embeddings=size)}


# Of each axis: the points by name, each with the keys that replace the demo's.
AXES = {
    "block": {str(size): block(size) for size in (256, 512, 1024, 2048, 4096)},
    "rows": {str(rows): {"per_device_train_batch_size": rows} for rows in (1, 4, 16, 64)},
    "vocabulary": {f"{size >> 10}k": model(vocab_size=size) for size in (4096, 8192, 16384, 32768, 65536)},
    "model": {name: {**shaped(*shape), "per_device_train_batch_size": 4} for name, shape in SHAPES.items()},
    "workers": {str(count): {"dataloader_num_workers": count} for count in (0, 1, 2, 4)},
}


def measure(axis: str) -> dict[str, dict]:
    found = {}
    for name, keys in AXES[axis].items():
        print(f"{axis} {name}", file=sys.stderr, flush=True)
        environment = {"RECIPE_CACHE": str(default_cache_dir())}
        found[name] = run_fresh(point, environment=environment, steps=STEPS, warm=WARM, keys=keys)
    return found


def cost(run: dict) -> float:
    """Microseconds a token."""
    return 1e6 * statistics.median(run["seconds"]) / run["tokens"]


def rows_of(axis: str, found: dict[str, dict]) -> list[dict]:
    first = cost(next(iter(found.values())))
    return [
        {
            "axis": axis,
            "at": name,
            "parameters": run["parameters"],
            "us a token": cost(run),
            "to the first": f"{cost(run) / first:.2f}",
            "GFLOP/s by 6N": 6e-3 * run["parameters"] / cost(run),
            "end of step (guards), us a token": 1e6 * run["parts"]["end of step in all"] / run["tokens"],
            "peak MB": run["peak_mb"],
        }
        for name, run in found.items()
    ]


# --- the plot


WIDTH, HEIGHT, LEFT, TOP, LOW = 210, 190, 54, 26, 150


def draw(found: dict[str, dict[str, dict]]) -> str:
    """A panel for each axis: microseconds a token, on a log scale that all share."""
    costs = [cost(run) for runs in found.values() for run in runs.values()]
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))

    def height(value: float) -> float:
        return LOW - (math.log10(value) - low) / (high - low) * (LOW - TOP)

    ticks = "".join(
        f'<path d="M{LEFT} {height(10**e):.1f}H{WIDTH * len(found)}" stroke="#ddd"/>'
        f'<text x="{LEFT - 4}" y="{height(10**e) + 4:.1f}" text-anchor="end">{10**e:,}</text>'
        for e in range(low, high + 1)
    )
    panels = []
    for number, (axis, runs) in enumerate(found.items()):
        left = LEFT + 14 + number * (WIDTH - 4)
        places = [left + each * (WIDTH - 50) / max(1, len(runs) - 1) for each in range(len(runs))]
        points = [(x, height(cost(run))) for x, run in zip(places, runs.values(), strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f77b4"/>' for x, y in points)
        names = "".join(
            f'<text x="{x:.1f}" y="{LOW + 16}" text-anchor="middle">{name}</text>'
            for x, name in zip(places, runs, strict=True)
        )
        panels.append(
            f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="2"/>{dots}{names}'
            f'<text x="{left + (WIDTH - 50) / 2:.1f}" y="{LOW + 34}" text-anchor="middle">{axis}</text>'
        )
    size = f"{LEFT + WIDTH * len(found)} {HEIGHT}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="4" y="14">microseconds a token</text>'
        f"{ticks}{''.join(panels)}</svg>\n"
    )


def make_result(found: dict[str, dict[str, dict]]) -> Result:
    measured = (
        "The demo's run with the guards on, one thing changed at a time, 4 steps after 2. Block: 4,096 tokens "
        "a step. Model: 1,024 tokens a step. docs/growth.svg draws it."
    )
    return Result("cost of a token", measured, [row for axis, runs in found.items() for row in rows_of(axis, runs)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    parser.add_argument("--only", choices=AXES, action="append", help="may be repeated; prints, writes nothing")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, and write nothing")
    arguments = parser.parse_args()
    found = {axis: measure(axis) for axis in arguments.only or AXES}
    if arguments.json:
        print(json.dumps(found))
        return
    section = format_section("growth", make_result(found), "python -m tests.benchmarks.growth")
    print(section)
    if arguments.only is None:
        write_section("growth", section)
        PLOT.write_text(draw(found))


if __name__ == "__main__":
    main()
