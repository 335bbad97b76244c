"""The table at the end of a run, and RESULTS.md: a section per device, made of OUT alone."""

import re
import statistics
from pathlib import Path

from tests.benchmarks.results import format_table, format_value
from tests.gpu.throughput import BARE, COMPILED, EAGER, OFF, STOCK, STOCK_TUNED, utilization

RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = """# Results on GPUs

Written by `python -m tests.gpu`, a section per device; a section is replaced when the command runs on that device
again. What each part measures is in [docs/gpu.md](../../docs/gpu.md). Runs on a CPU and with `--tiny` are not kept
here: they show only that the code runs.
"""
NOT_YET = "No GPU has run this yet.\n"
TRAINERS = (COMPILED, EAGER, STOCK, STOCK_TUNED)
WAYS = {"6N": "by 6N", "with attention": "with attention"}
MARKS = (1, 10, 20, 40, 60, 80)  # steps of the loss curve that are shown


def rows_of(out: dict) -> list[dict]:
    """What was measured, a line each: part, what, figure."""
    tables = {
        "environment": environment,
        "throughput": throughput,
        "guards": guards,
        "correctness": correctness,
        "assertions": assertions,
        "memory": memory,
        "muon": muon,
        "schedule": schedule,
    }
    rows = []
    for name, part in out["parts"].items():
        ended = part["status"] + (f", {part['error']}" if part.get("error") else "")
        rows.append({"part": name, "what": "how it ended", "figure": f"{ended} ({part['seconds']:.0f} s)"})
        found = tables[name](part["values"])
        rows += [{"part": name, "what": what, "figure": shown(figure)} for what, figure in found]
        for section, value in part["values"].items():
            if isinstance(value, dict) and (reason := value.get("error") or value.get("not run")):
                kind = "failed" if "error" in value else "not run"
                rows.append({"part": name, "what": section, "figure": f"{kind}: {reason}"})
    return rows


def shown(figure) -> str:
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    if isinstance(figure, float) and abs(figure) < 0.001:
        return f"{figure:.1e}" if figure else "0"
    return format_value(figure).replace("|", "/")


def environment(values: dict) -> list[tuple]:
    device = values.get("device", {})
    names = ("name", "driver", "CUDA", "cuDNN", "torch", "transformers", "triton", "bf16")
    rows = [(name, device[name]) for name in names if device.get(name) is not None]
    rows += [(f"{name} matrix product, TFLOP/s", rate) for name, rate in values.get("matrix rates", {}).items()]
    for name, ran in {**values.get("attention", {}), **values.get("attention of transformers", {})}.items():
        if isinstance(ran, dict):
            kernels = ran["kernels"] or [n.removeprefix("aten::_") for n in ran["operators"] if "backward" not in n]
            mask = "with a mask: " if ran["with mask"] else ""
            rows.append((f"attention, {name}", mask + (", ".join(kernels[:3]) or "none found")))
    precision = values.get("precision of the recipe", {})
    rows += [(f"recipe: {name}", value) for name, value in precision.items() if name != "error"]
    compiled = values.get("torch.compile", {})
    rows += [(f"torch.compile: {name}", value) for name, value in compiled.items() if name not in ("not run", "error")]
    liger = values.get("Liger", {})
    return rows + [(f"Liger: {name}", value) for name, value in liger.items() if name not in ("not run", "error")]


def throughput(values: dict) -> list[tuple]:
    rows, mfu, bare = [], utilization(values), []
    if "rows" in values:
        rows.append(("micro-batches x rows x tokens", " x ".join(map(str, values["rows"]))))
    for name in TRAINERS:
        found = values.get(name, {})
        bare += found.get("tokens/s", {}).get(BARE, []) and [found["tokens/s"][BARE]]
        for arm, speed in found.get("tokens/s", {}).items():
            if arm != BARE:
                rows.append((f"{arm}: tokens/s", f"{speed:,.0f}{_share(mfu.get(arm))}"))
        rows += [(f"{pair}: seconds, ratio", each["median"]) for pair, each in found.get("ratios", {}).items()]
        rows += [(f"{arm}: peak memory, GiB", peak) for arm, peak in found.get("peak memory, GiB", {}).items()]
        if found.get("to the first step, s") is not None:
            rows.append((f"{name}: to the first step, s", found["to the first step, s"]))
        if found.get("graphs"):
            late = found["graphs after step 3"]
            graphs = f"{found['graphs']} in all" + (f", {late} after step 3" if late is not None else "")
            rows.append((f"{name}: graphs compiled", graphs))
        for part, milliseconds in found.get("parts of the guards, host ms a step", {}).items():
            seconds = statistics.median(found["seconds a step"].get(name + OFF) or [0.0])
            share = f" ({milliseconds / 10 / seconds:.2f} % of a step)" if seconds else ""
            rows.append((f"{name}: guards, {part}", f"{milliseconds:.2f} ms of the host{share}"))
        for arm, callers in found.get("host reads a step", {}).items():
            most = ", ".join(f"{caller} {count:.1f}" for caller, count in list(callers.items())[:4])
            rows.append((f"{arm}: host reads a step", f"{sum(callers.values()):.1f}" + (f" ({most})" if most else "")))
        if found.get("guards' failure"):
            rows.append((f"{name}: guards failed", found["guards' failure"]))
    if bare:
        rows.insert(1, (f"{BARE}: tokens/s", f"{statistics.median(bare):,.0f}{_share(mfu.get(BARE))}"))
    return rows


def _share(mfu: dict | None) -> str:
    return "" if not mfu else " (MFU " + ", ".join(f"{share:.1%} {WAYS[way]}" for way, share in mfu.items()) + ")"


def guards(values: dict) -> list[tuple]:
    probes, zoo, rows = values.get("probes", {}), values.get("zoo", {}), []
    if "seconds" in probes:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in probes["seconds"].items() if name != "all")
        rows.append(("probes before step 1, s", f"{probes['seconds'].get('all', 0.0):.2f} ({parts})"))
        rows.append(("probes: judged", len(probes["judged"])))
        rows.append(("probes: alarms", ", ".join(probes["alarms"]) or "none"))
        if probes["could not judge"]:
            rows.append(("probes: could not judge", ", ".join(probes["could not judge"])))
    runs = {name: row for name, row in zoo.items() if isinstance(row, dict)}
    for kind, word in (("healthy", "silent"), ("faulty", "named")):
        ended = {name: row for name, row in runs.items() if row["kind"] == kind and "error" not in row}
        right = [name for name, row in ended.items() if row["is as it should be"]]
        if ended:
            rows.append((f"{kind} runs, {word}", f"{len(right)} of {len(ended)}"))
        for name in [name for name in ended if name not in right]:
            said = ", ".join(f"{guard} at {step}" for guard, step in ended[name]["alarms"]) or "silent"
            rows.append((f"{kind}: {name}", ended[name]["guards failed"] or said))
    for name, row in runs.items():
        if "error" in row:
            rows.append((f"{row['kind']}: {name}", row["error"]))
        for probe, reason in row.get("probes failed", {}).items():
            rows.append((f"{name}: {probe}", reason))
    return rows


def correctness(values: dict) -> list[tuple]:
    losses, rows = values.get("losses", {}), []
    if "fp32" in losses:
        for name in ("CPU, fp32", "fp32", "TF32", "bf16"):
            if name in losses:
                rows.append((f"first losses, {name}", ", ".join(f"{loss:.5f}" for loss in losses[name])))
        rows += [(f"largest difference, {name}", losses[name]) for name in ("fp32 / CPU", "bf16 / fp32")]
        if losses["weights"] > 1e-3:
            rows.append(("initial weights", f"differ from the CPU's (sums differ by {losses['weights']:.3g})"))
    return [*rows, *resumed(values, "resume, eager"), *resumed(values, "resume, compiled")]


def resumed(values: dict, name: str) -> list[tuple]:
    rows = []
    for what in ("resumed", "run again"):
        if what in (found := values.get(name, {})):
            equal = found[what]["is bit-equal"]
            off = f"loss differs by {found[what]['loss']:.1e}, a weight by {found[what]['weights']:.1e}"
            rows.append((f"{name}: {what}", "bit-equal" if equal else off))
            alarms = found[what]["guards' failure"] or ", ".join(found[what]["alarms"])
            rows += [(f"{name}: {what}, guards", alarms)] if alarms else []
    return rows


def assertions(values: dict) -> list[tuple]:
    tests = values.get("tests", {})
    counts = {
        word: sum(test["outcome"] == word for test in tests.values()) for word in ("passed", "failed", "skipped")
    }
    rows = [("tests", ", ".join(f"{count} {word}" for word, count in counts.items() if count))] if tests else []
    return rows + [(name, test["reason"]) for name, test in tests.items() if test["outcome"] == "failed"]


def memory(values: dict) -> list[tuple]:
    parts = {optim: found for optim, found in values.items() if "planned, GB" in found}
    return [(f"{optim}: {what}", figure) for optim, found in parts.items() for what, figure in found.items()]


def muon(values: dict) -> list[tuple]:
    found, rows = values.get("iteration", {}), []
    for name in ("fp32", "bf16"):
        if name in found:
            low, high = found[name]["singular values"]
            rows.append((f"iteration in {name} / fp32 of a CPU, off by", found[name]["off by"]))
            rows.append((f"iteration in {name}: singular values", f"{low:.3f} to {high:.3f}"))
    if "precision" in found:
        rows.append(("iterates in", found["precision"]))
    if "off by" in (other := values.get("torch's own", {})):
        rows.append(("one step / torch.optim.Muon, off by", other["off by"]))
    rows += [(f"optimizer step, {name}: ms", took) for name, took in values.get("step", {}).items() if name != "error"]
    return [*rows, *resumed(values, "resume")]


def schedule(values: dict) -> list[tuple]:
    found = values.get("run", {})
    curve = found.get("curve", [])
    if not curve:
        return []
    kept = [record for record in curve if record["step"] in MARKS or record is curve[-1]]
    last = curve[-1]["step"]
    rows = [(f"loss at step {record['step']}", f"{record['loss']:.4f}") for record in kept]
    speed = statistics.median(record["tokens_per_second"] for record in curve)
    rows += [("steps", last), ("tokens/s, median", speed)]
    alarms = ", ".join(f"{guard} at {step}" for guard, step in found["alarms"])
    return [*rows, ("guards", found["guards' failure"] or alarms or "no alarm")]


# --- RESULTS.md


def format_section(out: dict) -> str:
    device = out["parts"]["environment"]["values"].get("device", {})
    about = f"{out['date']}, commit {out['commit']}, `python -m tests.gpu --minutes {out['minutes']:g}`, "
    about += f"{out['seconds'] / 60:.1f} minutes."
    return f"## {device.get('name', 'unknown device')}\n\n{about}\n\n{format_table(rows_of(out))}\n"


def write_results(out: dict, path: Path = RESULTS) -> bool:
    """Put the section of the run's device in its place. False where the run is none to keep: a CPU's, tiny, or one
    that ended before it knew the device."""
    described = out["parts"].get("environment", {}).get("values", {}).get("device", {})
    if out["device"] != "cuda" or out["is_tiny"] or "name" not in described:
        return False
    section = format_section(out)
    title = section.splitlines()[0]
    text = path.read_text(encoding="utf-8") if path.exists() else HEADER
    sections = [part.strip() + "\n" for part in re.split(r"^(?=## )", text.replace(NOT_YET, ""), flags=re.MULTILINE)]
    others = [part for part in sections[1:] if part.splitlines()[0] != title]
    path.write_text("\n".join([sections[0], *others, section]), encoding="utf-8")
    return True


if __name__ == "__main__":
    RESULTS.write_text(f"{HEADER}\n{NOT_YET}", encoding="utf-8")
