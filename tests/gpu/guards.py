"""The guards on the device: the probes on the 180M, and runs of the zoo with a bug and without.

The zoo's runs are tiny; several run at the same time, each in a process of its own.
"""

import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import torch

from recipe.guards import GUARDS, Guard
from recipe.guards.session import PreflightDone
from recipe.model import why_not_compile
from tests.gpu.part import Report
from tests.gpu.scale import Scale, build_run, synchronize
from tests.zoo.cases import PARTS, bugs_of, healthy_of
from tests.zoo.pool import Task
from tests.zoo.setting import Setting

PROCESSES = 6  # on a GPU: the host's cores limit a tiny run, and each process takes half a GiB of the device
TIMEOUT = 90  # seconds of one run
TO_COMPILE = 40
SHORT = Setting(steps=60)
# Runs of the zoo by name, and settings of this suite.
HEALTHY = {
    "packed rows": Setting(),
    "bf16, 2 micro-batches": None,
    "bf16 weights, rate 1e-2, constant": None,
    "compiled, bf16": SHORT.changed(arguments={"torch_compile": True, "bf16": True}),
    "documents kept apart": None,
    "padded rows of 256": None,
    "8 micro-batches of padded rows": None,
    "label smoothing, gradient checkpointing": None,
    "GPT-2 with dropout": None,
    "evaluation every 25 steps": None,
    "resumed at step 40": None,
    "the recipe, resumed": None,
}
FAULTY = (
    *("original_no_shift", "collator_shifts_too", "causal_mask_dropped", "mean_over_batch", "ones_beside_positions"),
    *("loss_divided_twice", "micro_batch_means_averaged", "stuck_iterator", "scheduler_stepped_twice"),
    *("layer_left_out_of_the_optimizer", "optimizer_state_lost", "resume_from_first_row"),
)
TINY_HEALTHY, TINY_FAULTY = ("resumed at step 40",), ("original_no_shift",)
TINY_STEPS = 12
PROBED = {name for guard in GUARDS if guard.probe is not Guard.probe for name in guard.ids}


def run(scale: Scale, report: Report, folder: Path) -> None:
    report.section("probes", lambda: probes(scale, folder))
    report.section("zoo", lambda: run_zoo(scale, report))


# --- the probes


def probes(scale: Scale, folder: Path) -> dict:
    """Before step 1 of the 180M, through the recipe's own path: what each says, and its seconds."""
    run = build_run(scale, folder / "probes", max_steps=2)
    probing = []
    for guard in [guard for guard in GUARDS if guard.probe is not Guard.probe]:
        probing.append(guard.__name__)
        guard.probe = _synchronised(scale, guard.probe)  # so that its seconds are its own
    if scale.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    run.guards.only_check = True
    with suppress(PreflightDone):
        run.trainer.train()
    run.guards.on_train_end(run.trainer.args, run.trainer.state, run.trainer.control)
    seconds = run.guards.session.runner.seconds
    return {
        "seconds": {name: seconds[name] for name in probing if name in seconds} | {"all": sum(seconds.values())},
        "peak memory, GiB": torch.cuda.max_memory_allocated() / 2**30 if scale.is_cuda else None,
        "judged": sorted(run.guards.judged),
        "alarms": {each.id: each.found for each in run.guards.findings if each.severity != "info"},
        "could not judge": {n: r for n, r in run.guards.cannot_judge.items() if n in PROBED},
    }


def _synchronised(scale: Scale, probe):
    def call(guard, batch):
        yield from probe(guard, batch)
        synchronize(scale)

    return call


# --- the zoo


def tasks_of(scale: Scale) -> dict[str, Task]:
    """By name; each on the repo's texts and on the device."""
    healthy = {name: setting for part in PARTS for name, setting in healthy_of(part).items()}
    bugs = {bug.name: bug for part in PARTS for bug in bugs_of(part)}
    names = (TINY_HEALTHY, TINY_FAULTY) if scale.is_tiny else (HEALTHY, FAULTY)
    tasks = {name: Task(on_device(scale, HEALTHY[name] or healthy[name])) for name in names[0]}
    return tasks | {name: Task(on_device(scale, bugs[name].setting), bugs[name]) for name in names[1]}


def on_device(scale: Scale, setting: Setting) -> Setting:
    arguments = {"use_cpu": not scale.is_cuda}
    if scale.is_tiny:
        setting = setting.changed(steps=TINY_STEPS, save_at=setting.save_at and TINY_STEPS // 2)
    return setting.changed(text="stored" if setting.text == "english" else setting.text, arguments=arguments)


def run_zoo(scale: Scale, report: Report) -> dict:
    """A row for each run: the alarms, and whether they are what they should be."""
    tasks, rows = tasks_of(scale), {}
    if reason := why_not_compile():
        for name in [name for name, task in tasks.items() if task.setting.arguments.get("torch_compile")]:
            tasks.pop(name)
            rows[name] = {"kind": "healthy", "error": f"not run: {reason}"}
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context(multiprocessing.get_start_method(allow_none=True) or "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["tests.zoo.run"])
    pool = ThreadPoolExecutor(PROCESSES if scale.is_cuda else os.cpu_count() or 1)
    # What takes longest begins first.
    order = sorted(tasks, key=lambda name: (not tasks[name].setting.arguments.get("torch_compile"), -tasks[name].cost))
    waiting = {pool.submit(_run, context, tasks[name], report): name for name in order}
    try:
        for future in as_completed(waiting):
            name = waiting[future]
            rows[name] = row_of(tasks[name], future.result())
            report.put("zoo", rows)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def row_of(task: Task, record: dict) -> dict:
    row = {"kind": "faulty" if task.bug else "healthy", "seconds": record.get("seconds")}
    if "error" in record:
        return {**row, "error": record["error"].strip().splitlines()[-1][:300]}
    alarms = [finding for finding in record["findings"] if finding["severity"] != "info"]
    failed = [reason for reason in record["cannot_judge"].values() if "the guards failed" in reason]
    probes_failed = {name: r for name, r in record["cannot_judge"].items() if "the probe failed" in r}
    row |= {"alarms": [(finding["id"], finding["step"]) for finding in alarms], "judged": len(record["judged_steps"])}
    row |= {"guards failed": failed[0] if failed else None, "probes failed": probes_failed}
    if task.bug is None:
        return {**row, "is as it should be": not alarms and not failed and bool(row["judged"])}
    named = any(finding["id"] in task.bug.names for finding in alarms)
    return {**row, "names": task.bug.names, "took effect": record["effects"] > 0, "is as it should be": named}


def _run(context, task: Task, report: Report) -> dict:
    """In a process of its own; what is left of the part's time bounds it."""
    seconds = min(TIMEOUT, report.left - 2)
    if seconds < 5 or (task.setting.arguments.get("torch_compile") and seconds < TO_COMPILE):
        return {"error": "not run: no time left"}
    folder = tempfile.mkdtemp(prefix="zoo-")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, task, folder))
    try:
        process.start()
        there.close()
        if not here.poll(seconds):
            return {"error": f"no result after {seconds:.0f} s"}
        return here.recv()
    except EOFError:
        process.join(5)
        return {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _child(connection, task: Task, folder: str) -> None:
    from tests.zoo.run import execute

    started = time.monotonic()
    try:
        record = execute(task.setting, task.bug.apply if task.bug else None, folder=folder, with_others=False)
        connection.send({**record, "seconds": time.monotonic() - started})
    except BaseException:
        connection.send({"error": traceback.format_exc()})
