"""The suite for a GPU, on a CPU at tiny sizes: every part runs and gives its figures."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from recipe.guards.adam import OptimizerOff
from recipe.guards.session import Session
from recipe.guards.taps import Taps
from tests.gpu import __main__ as command
from tests.gpu import correctness, results, tokens
from tests.gpu.__main__ import PARTS
from tests.gpu.part import DONE, NOT_RUN, TIMED_OUT, Outcome, Report
from tests.gpu.scale import Scale, build_run
from tests.gpu.sync import SyncCounter, caller
from tests.gpu.throughput import BARE, COMPILED, EAGER, OFF, ON, STOCK, STOCK_TUNED, Switch, ratios, utilization

ROOT = tokens.ROOT
COMMAND = [sys.executable, "-m", "tests.gpu"]


def run(*options: str, **variables) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([*COMMAND, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=[pytest.param("whole", marks=pytest.mark.slow)])
def out(tmp_path_factory):
    """One whole run, of over a minute; every part's figures."""
    path = tmp_path_factory.mktemp("gpu") / "out.json"
    before = results.RESULTS.read_text(encoding="utf-8")
    done = run("--device", "cpu", "--tiny", "--json", str(path), "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results.RESULTS.read_text(encoding="utf-8") == before
    return {**json.loads(path.read_text()), "table": done.stdout}


def test_every_part_ends_well(out):
    assert list(out["parts"]) == list(PARTS)
    assert {name: part["status"] for name, part in out["parts"].items()} == dict.fromkeys(PARTS, DONE)


def test_no_section_of_a_part_fails(out):
    for name, part in out["parts"].items():
        for section, value in part["values"].items():
            assert not isinstance(value, dict) or "error" not in value, (name, section, value)


def values_of(out: dict, part: str) -> dict:
    return out["parts"][part]["values"]


def test_what_is_there_is_described(out):
    values = values_of(out, "environment")
    assert values["device"]["torch"] == torch.__version__ and set(values["matrix rates"]) > {"bf16"}
    compiled = values["torch.compile"]
    assert "not run" in compiled or (compiled["graphs"] == 1 and compiled["graphs after step 3"] == 0)
    for name in ("packed rows", "documents kept apart"):
        assert values["attention"][name]["operators"], name
    assert values["attention"]["documents kept apart"]["with mask"]
    assert not values["attention"]["packed rows"]["with mask"]
    if compiled_rows := values["attention"].get("packed rows, compiled"):
        assert not compiled_rows["with mask"]


def test_every_arm_is_measured(out):
    values = values_of(out, "throughput")
    for name in (COMPILED, EAGER):
        assert set(values[name]["tokens/s"]) == {name + ON, name + OFF, BARE}
        assert len(values[name]["ratios"]) == 3 and values[name]["guards' failure"] is None
        assert values[name]["parts of the guards, host ms a step"]
    for name in (STOCK, STOCK_TUNED):
        assert set(values[name]["tokens/s"]) == {name, BARE}
    assert values[COMPILED]["graphs after step 3"] in (0, None)
    assert set(values[EAGER]["host reads a step"]) == {EAGER + ON, EAGER + OFF}
    assert not [each for each in values[EAGER]["host reads a step"][EAGER + OFF] if "guards" in each]
    assert len(utilization(values)) == 7


def test_the_guards_are_judged(out):
    values = values_of(out, "guards")
    assert values["probes"]["alarms"] == {} and values["probes"]["seconds"]["all"] > 0
    assert {row["kind"] for row in values["zoo"].values()} == {"healthy", "faulty"}
    assert len(values["zoo"]) == 2 and all(row["is as it should be"] for row in values["zoo"].values())


def test_losses_and_resume_are_compared(out):
    values = values_of(out, "correctness")
    assert values["losses"]["fp32 / CPU"] < 1e-4 and values["losses"]["bf16 / fp32"] < 1e-2
    for name in ("resume, eager", "resume, compiled"):
        assert "not run" in values[name] or values[name]["resumed"]["is bit-equal"], values[name]


def test_the_tests_for_a_device_ran(out):
    tests = values_of(out, "assertions")["tests"]
    assert len(tests) >= 7 and {test["outcome"] for test in tests.values()} <= {"passed", "skipped"}


def test_muon_is_compared(out):
    values = values_of(out, "muon")
    assert values["iteration"]["fp32"]["off by"] == 0 and values["iteration"]["bf16"]["off by"] < 0.1
    assert values["torch's own"]["off by"] < 0.1 and values["resume"]["resumed"]["is bit-equal"]
    assert all(milliseconds > 0 for milliseconds in values["step"].values())


def test_memory_is_planned(out):
    assert all(found["planned, GB"] > 0 for found in values_of(out, "memory").values())


def test_the_curve_is_kept(out):
    curve = values_of(out, "schedule")["run"]["curve"]
    assert [record["step"] for record in curve] == list(range(1, len(curve) + 1)) and len(curve) >= 5


def test_the_table_names_every_part_and_says_what_it_is_worth(out):
    assert all(f"| {name} | how it ended | done" in out["table"] for name in PARTS)
    assert "the figures mean nothing" in out["table"]


class OffAndOn(TrainerCallback):
    """Guards off in steps 2 and 3 of 4."""

    def __init__(self, switch: Switch):
        self.switch = switch

    def on_step_begin(self, args, state, control, **kwargs):
        (self.switch.off if state.global_step in (1, 2) else self.switch.on)()


def test_without_the_guards_none_of_their_calls_is_left(monkeypatch, tmp_path):
    made = build_run(Scale("cpu", is_tiny=True), tmp_path, max_steps=4)
    switch, calls = Switch(made.trainer, made.guards), []

    def counted(name, function):
        return lambda *a, **k: (calls.append((name, switch.clock.is_on)), function(*a, **k))[1]

    hooks = ((Session, "before_micro_step"), (Taps, "before_clip"))
    hooks += ((OptimizerOff, "_before_step"), (Session, "end_step"))
    for owner, name in hooks:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    made.trainer.callback_handler.callbacks.insert(0, OffAndOn(switch))
    made.trainer.train()
    once = {name: calls.count((name, True)) for _, name in hooks}
    assert once == {"before_micro_step": 4, "before_clip": 2, "_before_step": 2, "end_step": 2}
    assert all(is_on for _, is_on in calls) and made.guards.failure is None
    assert "training_step" not in vars(made.trainer)  # the guards saw the end


# --- what a user does wrong


@pytest.mark.parametrize(
    "options, said",
    [
        (("--minutes", "0"), "more than 0"),
        (("--device", "cpu"), "--tiny"),
        (("--json", "/dev/null/out.json"), "cannot be written"),
        (("--json", "/"), "it is a folder"),
        (("--results", "nowhere.json"), "nowhere.json"),
        (("--only", "everything"), "invalid choice"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(options, said):
    done = run(*options)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_the_command_says_what_to_add():
    done = run()
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_what_no_time_is_left_for_is_reported(tmp_path):
    path = tmp_path / "out.json"
    done = run("--device", "cpu", "--tiny", "--json", str(path), "--minutes", "0.1")
    parts = json.loads(path.read_text())["parts"]
    assert done.returncode == 1 and list(parts) == list(PARTS)
    assert {part["status"] for part in parts.values()} <= {DONE, TIMED_OUT, NOT_RUN}
    assert parts["schedule"]["status"] == NOT_RUN and "not run" in done.stdout


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    path = tmp_path / "out.json"
    started = subprocess.Popen(
        [*COMMAND, "--device", "cpu", "--tiny", "--json", str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "environment" not in (started.stderr.readline() or "environment"):
        pass
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    table, said = started.communicate(timeout=60)
    assert started.returncode == 130 and "Traceback" not in said
    assert "| schedule | how it ended | not run, interrupted" in table
    assert list(json.loads(path.read_text())["parts"]) == list(PARTS)


def test_an_interrupted_part_keeps_its_figures(monkeypatch, tmp_path):
    def run_part(context, name, scale, folder, seconds):
        folder.mkdir()
        Report(folder / "report.json", 100).put("figure", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_part", run_part)
    arguments = SimpleNamespace(minutes=8, device="cpu", tiny=True, only=["throughput"], json=tmp_path / "out.json")
    out = command.Suite(arguments).run()
    assert out["exit_code"] == 130 and out["parts"]["throughput"]["error"] == "interrupted"
    assert json.loads(arguments.json.read_text())["parts"]["throughput"]["values"] == {"figure": 1.0}


@pytest.mark.slow
def test_an_earlier_out_is_kept(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("earlier")
    run("--device", "cpu", "--tiny", "--json", str(path), "--minutes", "0.01")
    assert (tmp_path / "out.json.before").read_text() == "earlier" and json.loads(path.read_text())["parts"]


# --- its own arithmetic


def test_the_token_ids_are_those_described():
    about = json.loads(tokens.ABOUT.read_text())
    ids = tokens.load_ids()
    assert tokens.IDS.stat().st_size < 4e6 and about["tokens"] == len(ids) and about["licence"] == "Apache-2.0"
    assert about["documents"] == len(tokens.documents()) and ids[-1] == tokens.EOS
    assert tokens.hashlib.sha256(ids.tobytes()).hexdigest() == about["sha256"]


def test_documents_of_other_licences_are_left_out():
    assert tokens.is_kept("transformers.trainer, datasets.load")
    assert not tokens.is_kept("transformers.trainer, sympy.core") and not tokens.is_kept("torch")


def test_ratios_are_of_neighbouring_blocks():
    seconds = {COMPILED + ON: [1.1, 2.2], COMPILED + OFF: [1.0, 2.0], BARE: [1.0, 1.0]}
    found = ratios(seconds)
    assert found[f"{COMPILED + ON} / {COMPILED + OFF}"]["all"] == pytest.approx([1.1, 1.1])
    assert found[f"{COMPILED + OFF} / {BARE}"]["median"] == 1.5 and len(found) == 3


def test_mfu_is_of_the_rate_measured():
    values = {"bf16 matrix rate": 100.0, "FLOPs a token": {"6N": 10**9}, COMPILED: {"tokens/s": {"arm": 50_000}}}
    assert utilization(values) == {"arm": {"6N": pytest.approx(0.5)}}
    assert utilization({}) == {}


def test_host_reads_are_counted_by_caller():
    counter = SyncCounter(is_cuda=False)
    counter.start()
    torch.ones(1).item(), bool(torch.ones(1))
    counter.stop()
    torch.ones(1).item()
    assert counter.by_caller == {"tests/test_gpu_suite.py:test_host_reads_are_counted_by_caller": 2}


def test_a_caller_outside_the_packages_is_torch():
    assert caller([]) == "torch"


def test_torch_s_warnings_are_counted_each_time(monkeypatch):
    modes, counter = [], SyncCounter(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    counter.start()
    for text in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "something else"):
        warnings.warn(text, stacklevel=1)
    counter.stop()
    assert list(counter.by_caller.values()) == [2] and modes == ["warn", "default"]


@pytest.mark.parametrize("gib, rows", [(80, 16), (44, 8), (24, 4)])
def test_the_micro_batch_goes_by_the_device_s_memory(monkeypatch, gib, rows):
    device = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    scale = Scale("cuda", is_tiny=False)
    assert (scale.micro_batch, scale.accumulation * scale.micro_batch, scale.tokens_per_step) == (rows, 48, 49_152)


def test_a_part_that_finds_no_cuda_in_a_fork_runs_again_in_a_fresh_interpreter(monkeypatch, tmp_path):
    tried = []

    def run_part(context, name, *_):
        tried.append((context.get_start_method(), name))
        error = "RuntimeError: CUDA error: initialization error"
        return Outcome(DONE, values={"device": {"error": error}} if len(tried) == 1 else {})

    monkeypatch.setattr(command, "run_part", run_part)
    arguments = SimpleNamespace(minutes=8, device="cuda", tiny=False, only=None, json=tmp_path / "out.json")
    suite = command.Suite(arguments)
    for name in ("environment", "throughput"):
        assert suite._run_part(name, None, tmp_path / name).values == {}
    assert tried == [("forkserver", "environment"), ("spawn", "environment"), ("spawn", "throughput")]


def test_a_failed_section_keeps_what_it_put(tmp_path):
    report = Report(tmp_path / "report.json", 100)

    def fail():
        report.put("part", {"figure": 1.0, "odd": float("nan")})
        raise RuntimeError("no\nmore")

    report.section("part", fail)
    report.section("late", dict, least=1000)
    found = json.loads(report.path.read_text())
    assert found["part"] == {"figure": 1.0, "odd": "nan", "error": "RuntimeError: no"}
    assert "not run" in found["late"]


def test_difference_is_zero_for_equal_runs_alone():
    run = {"losses": [1.0], "weights": {"w": torch.ones(2)}, "alarms": [], "failure": None}
    assert correctness.difference(run, run)["is bit-equal"]
    assert not correctness.difference({**run, "losses": [1.0 + 1e-7]}, run)["is bit-equal"]


# --- RESULTS.md


def test_results_are_of_whole_runs_on_a_gpu(tmp_path, out):
    path = tmp_path / "RESULTS.md"
    path.write_text(f"{results.HEADER}\n{results.NOT_YET}")
    assert not results.write_results(out, path)
    of_a_gpu = {**out, "device": "cuda", "is_tiny": False}
    assert not results.write_results({**of_a_gpu, "parts": {}}, path) and results.NOT_YET in path.read_text()
    for _ in range(2):  # a second run replaces the section
        assert results.write_results(of_a_gpu, path)
    text = path.read_text()
    assert text.count("\n## ") == 1 and results.NOT_YET not in text and "| throughput |" in text


def test_results_say_that_no_gpu_has_run_this():
    text = results.RESULTS.read_text(encoding="utf-8")
    assert (results.NOT_YET in text) == ("\n## " not in text)
