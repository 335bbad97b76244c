"""Several ranks under torchrun: a rank that is lost, restarts, several machines."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.__main__ import COMMANDS, run
from recipe.checkpoints import list_checkpoints, problems_of, read_manifest
from recipe.errors import exit_code_of, is_lost_peer, message_of
from recipe.guards.records import read_lines
from recipe.read_config import read_config
from recipe.rundir import choose_output_dir

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launch(tmp_path, words, fault, *options, timeout=240) -> tuple[dict, str]:
    """Two ranks, with a fault on one. What was reported, and stderr."""
    exit_file = tmp_path / "exit-file.json"
    exit_file.touch()
    environment = {**os.environ, "RECIPE_EXIT_FILE": str(exit_file), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"FAULT": json.dumps(fault), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as run_clm.sh sets it
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
        "-m",
        "tests.benchmarks.fault_run",
        "train",
    ]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=timeout)
    return json.loads(exit_file.read_text() or "{}"), done.stderr


@pytest.fixture
def words(write_config) -> list[str]:
    path = write_config(eval_strategy="no", eval_steps=None, save_steps=2, max_steps=8)
    return [path, "--per_device_train_batch_size", "2", "--resume_from_checkpoint", "auto"]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run_dir / "steps.jsonl")]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_lost_rank_is_restarted_and_the_run_goes_on(words, tmp_path, rank):
    """The second time from the checkpoint; the losses are those of one rank that nothing disturbed."""
    ended, log = launch(tmp_path, words, {"phase": "backward", "step": 6, "rank": rank}, "--max-restarts", "1")
    assert ended["code"] == 0, log[-3000:]
    assert f"resuming from {tmp_path}/run/checkpoint-4" in log
    assert [each["began_from"] for each in read_manifest(tmp_path / "run/checkpoint-8")["lineage"]] == [
        None, "checkpoint-4",
    ]  # fmt: skip
    assert run(["train", words[0], "--output_dir", str(tmp_path / "one")]) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


def test_without_restarts_a_lost_rank_ends_the_others_in_seconds(words, tmp_path):
    begin = time.monotonic()
    ended, log = launch(tmp_path, words, {"phase": "backward", "step": 5, "rank": 0}, timeout=120)
    assert ended.get("code", 1) == 1 and "Signal 9" in log and "a bug in the recipe" not in log
    assert "another process of the run was lost" in ended.get("reason", "another process of the run was lost")
    assert time.monotonic() - begin < 90  # mostly the start; gloo alone would wait for half an hour
    assert all(problems_of(path, is_deep=True) == [] for path in list_checkpoints(tmp_path / "run"))


def test_what_ended_on_purpose_is_not_restarted(words, tmp_path):
    ended, log = launch(tmp_path, [*words, "--eval_skip", "5000"], {"phase": "none", "step": 0}, "--max-restarts", "1")
    assert ended["code"] == 2 and "has 300 documents" in ended["reason"] and log.count("has 300 documents") == 1


@pytest.mark.slow
def test_two_machines_on_loopback(words, tmp_path):
    """As run_clm.sh starts them with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for node in range(2):
        environment = {**os.environ, "NNODES": "2", "NODE_RANK": str(node), "NPROC": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RECIPE_VENV": sys.prefix}
        command = ["bash", str(ROOT / "run_clm.sh"), *words]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    logs = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log[-2000:] for log in logs)
    assert json.loads((tmp_path / "run/run.json").read_text())["device"]["count"] == 2
    assert len(losses(tmp_path / "run")) == 8


# --- without starting any


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_path_to_resume_from_means_its_newest_descendant_after_a_restart(
    write_config, tmp_path, monkeypatch, is_elsewhere
):
    """Also where the checkpoint itself has been deleted since, by rotation, and where the run is in another folder."""
    run_dir = tmp_path / "run"
    path = (tmp_path / "before" if is_elsewhere else run_dir) / "checkpoint-4"
    words = ["--resume_from_checkpoint", str(path), "--output_dir", str(run_dir)]

    def wanted(restarts: int) -> str:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        reading = read_config(write_config(), words)
        reading.refuse()
        chosen = reading.values["resume_from_checkpoint"]
        assert choose_output_dir(str(run_dir), False, chosen) == run_dir
        return chosen

    def begin(*parts: str | None) -> None:
        run_dir.mkdir(exist_ok=True)
        lineage = [{"part": str(number), "began_from": name, "step": 0} for number, name in enumerate(parts)]
        (run_dir / "run.json").write_text(json.dumps({"lineage": lineage}))

    path.mkdir(parents=True)
    if not is_elsewhere:
        begin(None, "checkpoint-2")
    assert wanted(0) == wanted(1) == str(path)  # the first start ended before it began its part
    begin(None, "checkpoint-4")
    assert wanted(1) == (str(path) if is_elsewhere else "latest")  # nothing was saved elsewhere yet
    (run_dir / "checkpoint-40").mkdir()
    path.rmdir()
    assert wanted(1) == "latest"
    begin(None, "checkpoint-4", "checkpoint-40")
    assert wanted(2) == "latest"


def test_a_lost_process_is_no_bug_of_the_recipe(monkeypatch, capsys, tmp_path):
    error = RuntimeError(
        "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:64694: Connection reset by peer. This is typically "
        "caused by a remote worker hanging or bugs in the application. GLHF!"
    )
    assert is_lost_peer(error) and exit_code_of(error) == 1 and "GLHF" not in message_of(error)
    assert not is_lost_peer(ConnectionResetError("Connection reset by peer"))  # of a server of the data
    assert not is_lost_peer(RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:456] 1024 vs 512"))

    def lose(_):
        raise error

    monkeypatch.setitem(COMMANDS, "explain", lose)
    monkeypatch.setenv("RECIPE_EXIT_FILE", str(tmp_path / "exit"))
    assert run(["explain"]) == 1
    assert capsys.readouterr().err.startswith("error: another process of the run was lost: killed")
    assert json.loads((tmp_path / "exit").read_text())["code"] == 1
