"""run_clm.sh and .bootstrap.sh in a copy of the checkout where every Python, pip and nvidia-smi is a fake."""

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

REPO = Path(__file__).resolve().parents[1]
# fmt: off
TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "find", "flock", "getconf", "grep", "head", "ln", "ls", "mkdir",
         "mktemp", "mv", "readlink", "rm", "sed", "tail", "touch", "uname"]
# fmt: on

# Plays python3, the environment's python and all that they start. FAKE_* variables say how it behaves, $FAKE_DIR/calls
# what it was asked.
FAKE_PYTHON = r"""#!/usr/bin/env bash
call="$*"
printf '%s\n' "${call//$'\n'/ }" >>"$FAKE_DIR/calls"
hang() { [ "${FAKE_HANG:-}" != "$1" ] || exec "$REAL_PYTHON" -I -S "$FAKE_DIR/hang.py"; }
case "$1 $2" in
  "-c "*ensurepip*) echo "${FAKE_PROBE:-3.11 new venv}" ;;
  "-c "*device_count*) echo "${FAKE_TORCH_GPUS:-0}" ;;
  "-c "*version_info*) echo "${FAKE_VERSION:-3.11}"; [ "${FAKE_VERSION:-3.11}" = 3.11 ] ;;
  "- "*) cat >/dev/null; echo "${FAKE_MISSING:-}" ;;
  "-m venv" | "-m virtualenv")
    mkdir -p "$3/bin" "$3/lib/python3.11/site-packages"
    touch "$3/pyvenv.cfg"
    hang venv
    cp "$0" "$3/bin/python" ;;
  "-m pip")
    [ "$3" = install ] || exit 0
    site=$(dirname "$0")/../lib/python3.11/site-packages
    mkdir -p "$site/half-1.0.dist-info" "$site/~torn"
    hang pip
    touch "$site/half-1.0.dist-info/INSTALLER"
    printf '%s\n' "${FAKE_PIP_OUTPUT:-Successfully installed}"
    exit "${FAKE_PIP_CODE:-0}" ;;
  "-m recipe" | "-m torch.distributed.run")
    report='{\n  "code": %s,\n  "reason": "as reported, code 9"\n}\n'
    [ -z "${FAKE_REPORT:-}" ] || printf "$report" "$FAKE_REPORT" >"$RECIPE_EXIT_FILE"
    printf '%s' "${PET_SIGNALS_TO_HANDLE:-}" >"$FAKE_DIR/handled"
    echo '{"loss": 1.0}'
    hang train
    exit "${FAKE_CODE:-0}" ;;
esac
"""

# Says that it is there, then takes signals; a second one within 0.2 s would be a signal delivered twice.
HANG = """
import json, os, signal
directory = os.environ["FAKE_DIR"]
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "started with SIGINT ignored"
stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, stops)
with open(f"{directory}/ready", "w") as ready:
    ready.write(f"{os.getpid()}")
if os.environ.get("FAKE_RELEASE"):
    open(f"{directory}/release").read()
    raise SystemExit(0)
first = signal.sigwait(stops)
second = signal.sigtimedwait(stops, 0.2)
with open(f"{directory}/signals", "w") as file:
    file.write(" ".join(signal.Signals(s).name for s in (first, second and second.si_signo) if s))
if "RECIPE_EXIT_FILE" in os.environ:
    with open(os.environ["RECIPE_EXIT_FILE"], "w") as file:
        json.dump({"code": 128 + first, "reason": "interrupted"}, file)
raise SystemExit(1)
"""


class Checkout:
    """A copy of the scripts in `root`, with PATH holding a few plain tools and our fakes only."""

    def __init__(self, tmp_path: Path):
        self.root = tmp_path / "check out"  # a path with a space in it
        self.bin = tmp_path / "bin"
        self.state = tmp_path / "state"
        for directory in (self.root / "recipe" / "configs", self.root / "tests", self.bin, self.state):
            directory.mkdir(parents=True)
        for name in ("run_clm.sh", ".bootstrap.sh", "pyproject.toml", "constraints.txt", "tests/run.sh"):
            shutil.copy(REPO / name, self.root / name)
        for name in ("llama_180m", "cpu_demo"):
            (self.root / "recipe" / "configs" / f"{name}.json").write_text('{"max_steps": 1}')
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.add_tool("sleep", f"#!/usr/bin/env bash\nexec {shutil.which('sleep')} 0.02\n")
        self.add_tool("python3", FAKE_PYTHON)
        (self.state / "hang.py").write_text(HANG)
        for fifo in ("ready", "release"):
            os.mkfifo(self.state / fifo)
        self.env = {"PATH": str(self.bin), "HOME": str(tmp_path), "FAKE_DIR": str(self.state)}
        self.env |= {"REAL_PYTHON": sys.executable, "TMPDIR": str(self.state)}

    def add_tool(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add_gpus(self, count: int) -> None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(count))
        self.add_tool("nvidia-smi", f"#!/usr/bin/env bash\n{lines}")

    def add_environment(self, path: Path) -> Path:
        (path / "bin").mkdir(parents=True)
        (path / "bin" / "python").write_text(FAKE_PYTHON)
        (path / "bin" / "python").chmod(0o755)
        return path

    def start(self, *args: str, script: str = "run_clm.sh", cwd: Path | None = None, **env: str) -> subprocess.Popen:
        command = ["bash", str(self.root / script), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=cwd, env=self.env | env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *args: str, **options) -> subprocess.CompletedProcess:
        process = self.start(*args, **options)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def wait_until_hanging(self) -> int:
        """Blocks until a fake hangs; returns its process id."""
        fifo = os.open(self.state / "ready", os.O_RDONLY | os.O_NONBLOCK)
        try:
            readable, _, _ = select.select([fifo], [], [], 10)
            assert readable, f"no fake hung; calls: {self.calls}"
            return int(os.read(fifo, 100))
        finally:
            os.close(fifo)

    @property
    def calls(self) -> list[str]:
        path = self.state / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def calls_of(self, start: str) -> list[str]:
        return [call for call in self.calls if call.startswith(start)]

    def forget_calls(self) -> None:
        (self.state / "calls").unlink()

    def config(self, name: str) -> str:
        return str(self.root / "recipe" / "configs" / f"{name}.json")


@pytest.fixture
def fresh(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def checkout(fresh):
    """One whose environment is there already."""
    assert fresh.run().returncode == 0
    fresh.forget_calls()
    return fresh


# --- the run


def test_without_gpu_the_demo_is_trained_and_the_reason_said(checkout):
    result = checkout.run()
    assert checkout.calls == [f"-m recipe train {checkout.config('cpu_demo')}"]
    assert result.stderr == "run_clm.sh: no CUDA GPU: training the demo, recipe/configs/cpu_demo.json\n"
    assert result.stdout == '{"loss": 1.0}\n', "stdout is the run's own"


def test_with_a_gpu_the_180m_model_is_trained(checkout):
    checkout.add_gpus(1)
    result = checkout.run(FAKE_TORCH_GPUS="1")
    assert checkout.calls[-1] == f"-m recipe train {checkout.config('llama_180m')}"
    assert result.stderr == "run_clm.sh: 1 CUDA GPU(s): training recipe/configs/llama_180m.json\n"


def test_a_gpu_that_torch_cannot_use_is_named_and_the_demo_taken(checkout):
    checkout.add_gpus(2)
    result = checkout.run(FAKE_TORCH_GPUS="0")
    assert checkout.calls[-1] == f"-m recipe train {checkout.config('cpu_demo')}"
    assert "nvidia-smi lists 2 GPU(s) but torch can use none" in result.stderr


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_cuda_visible_devices_hides_gpus(checkout, hidden):
    checkout.add_gpus(2)
    checkout.run(FAKE_TORCH_GPUS="2", CUDA_VISIBLE_DEVICES=hidden)
    assert checkout.calls == [f"-m recipe train {checkout.config('cpu_demo')}"], "torch need not be asked"


def test_several_gpus_start_torchrun(checkout):
    checkout.add_gpus(4)
    checkout.run("--max_steps", "5", FAKE_TORCH_GPUS="4")
    train = f"-m recipe train {checkout.config('llama_180m')} --max_steps 5"
    assert checkout.calls[-1] == f"-m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 0 {train}"


def test_nproc_overrides_the_number_of_processes(checkout):
    checkout.run(NPROC="2")
    train = f"-m recipe train {checkout.config('cpu_demo')}"
    assert checkout.calls == [f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 0 {train}"]
    checkout.add_gpus(4)
    checkout.run(NPROC="1", FAKE_TORCH_GPUS="4")
    assert checkout.calls[-1] == f"-m recipe train {checkout.config('llama_180m')}"


@pytest.mark.parametrize("bad", ["0", "two", "-1", "1.5"])
def test_a_bad_nproc_is_the_users_mistake(checkout, bad):
    result = checkout.run(NPROC=bad)
    assert (result.returncode, checkout.calls) == (2, [])
    assert f"NPROC must be a whole number of at least 1, not '{bad}'" in result.stderr


@pytest.mark.parametrize("where", ["config", "option"])
def test_use_cpu_keeps_to_one_process_on_a_machine_with_gpus(checkout, where):
    checkout.add_gpus(4)
    options = ["--use_cpu", "true"] if where == "option" else []
    Path(checkout.config("cpu_demo")).write_text('{"use_cpu": true}' if where == "config" else "{}")
    checkout.run(checkout.config("cpu_demo"), *options, FAKE_TORCH_GPUS="4")
    assert checkout.calls[-1].startswith("-m recipe train")


def test_a_config_and_overrides_are_passed_on_word_by_word(checkout, tmp_path):
    (tmp_path / "my config.json").write_text("{}")
    checkout.run("my config.json", "--run_name", "a b", "--accelerator_config", '{"x": 1}', cwd=tmp_path)
    expected = '-m recipe train my config.json --run_name a b --accelerator_config {"x": 1}'
    assert checkout.calls == [expected]


def test_a_relative_config_may_start_at_the_checkout(checkout, tmp_path):
    checkout.run("recipe/configs/llama_180m.json", cwd=tmp_path)
    assert checkout.calls == [f"-m recipe train {checkout.config('llama_180m')}"]


def test_a_config_that_is_not_there_is_told_before_anything_is_installed(fresh):
    result = fresh.run("train")
    assert (result.returncode, fresh.calls) == (2, [])
    assert "no such config file: train" in result.stderr


def test_help_tells_usage_and_starts_nothing(fresh):
    result = fresh.run("--help")
    assert (result.returncode, fresh.calls) == (0, [])
    assert "bash run_clm.sh [CONFIG.json] [--field value ...]" in result.stdout


def test_called_through_a_symbolic_link_from_elsewhere(checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "go").symlink_to(Path("..") / "check out" / "run_clm.sh")
    process = subprocess.run(
        ["bash", "elsewhere/go"], cwd=tmp_path, env=checkout.env, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert checkout.calls == [f"-m recipe train {checkout.config('cpu_demo')}"]


# --- exit codes and signals


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 130, 143])
def test_the_runs_own_code_is_returned(checkout, code):
    assert checkout.run(FAKE_CODE=str(code)).returncode == code


@pytest.mark.parametrize("code", [0, 2, 3, 4, 130, 143])
def test_the_reported_code_wins_over_torchruns_1(checkout, code):
    result = checkout.run(NPROC="2", FAKE_CODE="1", FAKE_REPORT=str(code))
    assert result.returncode == code
    assert (f"run_clm.sh: exit code {code}: as reported, code 9\n" in result.stderr) == (code != 0)
    assert not list(checkout.state.glob("recipe-exit.*")), "the exit file is removed"


def test_without_a_report_torchruns_code_is_returned(checkout):
    assert checkout.run(NPROC="2", FAKE_CODE="1").returncode == 1


@pytest.mark.parametrize("nproc", ["1", "2"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_reaches_the_run_once_and_its_code_comes_back(checkout, sent, code, nproc):
    process = checkout.start(NPROC=nproc, FAKE_HANG="train")
    checkout.wait_until_hanging()
    os.killpg(process.pid, sent)  # to the whole group, as a terminal does
    process.communicate(timeout=60)
    assert (checkout.state / "signals").read_text() == sent.name
    assert process.returncode == code


def test_torchrun_is_told_to_pass_on_sigusr1(checkout, monkeypatch):
    """By what its parser reads: SIGUSR1 would kill it, and the ranks would go on alone."""
    checkout.run(NPROC="2")
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", (checkout.state / "handled").read_text())
    config, _, _ = config_from_args(parse_args(["script.py"]))
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"} == set(config.signals_to_handle.split(","))


@pytest.fixture
def sighup():
    """As it is in a terminal: tests started by nohup inherit that it is ignored, and bash cannot trap it then."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_stops_the_run(checkout, sighup):
    process = checkout.start(FAKE_HANG="train")
    checkout.wait_until_hanging()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert (checkout.state / "signals").read_text() == "SIGHUP"
    assert process.returncode == 129


def test_a_run_killed_from_outside_returns_the_shells_code(checkout):
    process = checkout.start(FAKE_HANG="train")
    os.kill(checkout.wait_until_hanging(), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 137


# --- the environment


def test_first_start_says_what_it_does_and_installs_what_pyproject_names(fresh):
    result = fresh.run()
    env = fresh.root / ".venv"
    making = f"run_clm.sh: first use: making a Python 3.11 environment in {env} (about 1-3 minutes; log: {env}"
    assert making in result.stderr
    pip = "-m pip install --disable-pip-version-check --no-input"
    assert fresh.calls_of("-m pip install") == [f"{pip} -c {fresh.root}/constraints.txt -e {fresh.root}"]
    assert (env / ".recipe-install.log").read_text() == "Successfully installed\n"


def test_second_start_is_silent_and_starts_no_python_for_the_environment(checkout):
    result = checkout.run(checkout.config("cpu_demo"))
    assert result.stderr == ""
    assert checkout.calls == [f"-m recipe train {checkout.config('cpu_demo')}"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_environment(checkout, name):
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    checkout.run()
    assert len(checkout.calls_of("-m pip install")) == 1
    assert not checkout.calls_of("-m venv")


def test_a_copied_checkout_does_not_trust_the_copied_environment(checkout, tmp_path):
    shutil.copytree(checkout.root, tmp_path / "copy", symlinks=True)
    checkout.root = tmp_path / "copy"
    checkout.run()
    assert checkout.calls_of("-m pip install")[0].endswith(f"-e {tmp_path}/copy")


def test_tests_add_their_extra_and_serve_the_run_too(checkout):
    checkout.run("-k", "some", script="tests/run.sh")
    assert checkout.calls_of("-m pip install")[0].endswith(f"-e {checkout.root}[test]")
    assert checkout.calls[-3:] == ["-m ruff check .", "-m ruff format --check .", "-m pytest -k some"]
    checkout.forget_calls()
    checkout.run()
    assert checkout.calls == [f"-m recipe train {checkout.config('cpu_demo')}"]


def test_torch_alone_comes_from_its_own_index(fresh):
    result = fresh.run(TORCH_INDEX_URL="https://index.invalid/cpu")
    first, second = fresh.calls_of("-m pip install")
    pinned = next(line for line in (REPO / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert first.endswith(f"--no-deps --index-url https://index.invalid/cpu {pinned}")
    assert "index.invalid" not in second
    assert "several GB" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has GPU builds of torch by default")
def test_without_gpu_the_size_of_the_default_torch_is_said(fresh):
    assert "pip's default torch may be several GB" in fresh.run().stderr


def test_with_gpu_the_size_is_not_mentioned(fresh):
    fresh.add_gpus(1)
    assert "several GB" not in fresh.run().stderr


def test_too_old_python_is_named(fresh):
    fresh.add_tool("python", FAKE_PYTHON.replace("3.11 new venv", "2.7 old none"))
    result = fresh.run(FAKE_PROBE="")
    assert result.returncode == 0, "python3 is new enough"
    shutil.rmtree(fresh.root / ".venv")
    fresh.add_tool("python3", FAKE_PYTHON.replace("3.11 new venv", "3.9 old venv"))
    result = fresh.run()
    assert result.returncode == 2
    message = "Python 3.11 or newer is needed (python3 is 3.9, python is 2.7)"
    assert result.stderr.splitlines() == [f"run_clm.sh: {message}: install one, or set RECIPE_PYTHON=/path/to/python3"]


def test_no_python_at_all(fresh):
    (fresh.bin / "python3").unlink()
    result = fresh.run()
    assert result.returncode == 2
    assert "Python 3.11 or newer is needed (none found)" in result.stderr


def test_a_python_that_does_not_start_is_passed_over(fresh):
    fresh.add_tool("python3.13", "#!/usr/bin/env bash\nexit 127\n")  # as a version manager's shim does
    assert fresh.run().returncode == 0


def test_the_newest_python_without_venv_gives_way_to_one_that_has_it(fresh):
    fresh.add_tool("python3.12", FAKE_PYTHON.replace("3.11 new venv", "3.12 new none"))
    assert fresh.run().returncode == 0
    assert len(fresh.calls_of("-m venv")) == 1


def test_missing_venv_module_names_the_package_to_install(fresh):
    result = fresh.run(FAKE_PROBE="3.12 new none")
    assert result.returncode == 2
    assert "apt install python3.12-venv" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_virtualenv_stands_in_for_a_missing_venv_module(fresh):
    assert fresh.run(FAKE_PROBE="3.12 new virtualenv").returncode == 0
    assert fresh.calls_of("-m virtualenv")


def test_the_probe_knows_a_real_python(fresh):
    real = fresh.add_tool(
        "real", f'#!/usr/bin/env bash\n[ "$1" != -c ] || exec {sys.executable} "$@"\nexec python3 "$@"\n'
    )
    result = fresh.run(RECIPE_PYTHON=str(real))
    assert f"making a Python {sys.version_info[0]}.{sys.version_info[1]} environment" in result.stderr


def test_pip_failure_names_the_line_and_the_log_and_the_next_start_goes_on(fresh):
    output = "WARNING: NameResolutionError: Retrying\nERROR: No matching distribution found for torch\nhint: none"
    result = fresh.run(FAKE_PIP_CODE="1", FAKE_PIP_OUTPUT=output)
    log = fresh.root / ".venv" / ".recipe-install.log"
    assert result.returncode == 4
    last = result.stderr.splitlines()[-1]
    assert "pip failed: ERROR: No matching distribution found for torch (the package index cannot be reached" in last
    assert f"log: {log}" in last
    assert not fresh.calls_of("-m recipe")
    assert fresh.run().returncode == 0
    assert len(fresh.calls_of("-m venv")) == 1, "the environment itself is kept"


def test_an_unwritable_place_is_the_users_to_mend(fresh):
    result = fresh.run(RECIPE_VENV="/dev/null/env")
    assert result.returncode == 2
    assert "cannot write to /dev/null/env: activate a virtual environment, or set RECIPE_VENV" in result.stderr


def test_a_folder_that_is_no_environment_is_left_alone(fresh):
    precious = fresh.root / ".venv" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("all of it")
    result = fresh.run()
    assert result.returncode == 2
    assert "was not made by this script" in result.stderr
    assert precious.read_text() == "all of it"


def test_an_environment_whose_python_went_away_is_made_again(checkout):
    (checkout.root / ".venv" / "bin" / "python").unlink()
    result = checkout.run()
    assert result.returncode == 0
    assert "no longer works: making it again" in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_the_environment_is_made(fresh, how):
    process = fresh.start(FAKE_HANG="venv")
    orphan = fresh.wait_until_hanging()
    process.send_signal(how)
    _, err = process.communicate(timeout=60) if how != signal.SIGKILL else kill_orphan(process, orphan)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert how == signal.SIGKILL or "interrupted; the next start continues" in err
    assert fresh.run().returncode == 0
    assert len(fresh.calls_of("-m venv")) == 2, "a half-made environment is made again"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_pip_installs(fresh, how):
    process = fresh.start(FAKE_HANG="pip")
    orphan = fresh.wait_until_hanging()
    process.send_signal(how)
    _, err = process.communicate(timeout=60) if how != signal.SIGKILL else kill_orphan(process, orphan)
    assert how == signal.SIGKILL or "interrupted; the next start continues" in err
    site = fresh.root / ".venv" / "lib" / "python3.11" / "site-packages"
    (site / "half-1.0.dist-info" / "METADATA").write_text("cut off")
    (site / "whole-1.0.dist-info").mkdir()
    (site / "whole-1.0.dist-info" / "INSTALLER").write_text("pip")
    assert fresh.run().returncode == 0
    assert not (site / "half-1.0.dist-info" / "METADATA").exists(), "pip would have taken it for installed"
    assert (site / "whole-1.0.dist-info").exists()
    assert (len(fresh.calls_of("-m venv")), len(fresh.calls_of("-m pip install"))) == (1, 2)


def kill_orphan(process: subprocess.Popen, orphan: int) -> tuple[str, str]:
    """Ends what a killed script left behind, as a power cut would have done."""
    process.wait(timeout=60)
    os.kill(orphan, signal.SIGKILL)
    return process.communicate(timeout=60)


@pytest.mark.parametrize("lock", ["flock", "link"])
def test_of_two_first_starts_one_installs_and_the_other_waits(fresh, lock):
    if lock == "link":
        (fresh.bin / "flock").unlink(missing_ok=True)
    elif not shutil.which("flock"):
        pytest.skip("this machine has no flock")
    one = fresh.start(FAKE_HANG="pip", FAKE_RELEASE="1")
    fresh.wait_until_hanging()
    two = fresh.start()
    first_words = two.stderr.readline()
    with (fresh.state / "release").open("w"):
        pass
    for process in (one, two):
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert "another start is installing in" in first_words
    assert len(fresh.calls_of("-m pip install")) == 1
    assert len(fresh.calls_of("-m recipe")) == 2


def test_the_link_lock_of_a_dead_start_is_broken(fresh):
    (fresh.bin / "flock").unlink(missing_ok=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (fresh.root / ".venv").mkdir()
    link = fresh.root / ".venv" / ".recipe-lock.pid"
    link.symlink_to(str(dead.pid))
    assert fresh.run().returncode == 0
    assert not link.is_symlink()


# --- an active environment


@pytest.mark.parametrize("kind", ["venv", "conda"])
def test_an_active_environment_with_everything_is_used_as_it_is(fresh, tmp_path, kind):
    active = fresh.add_environment(tmp_path / "mine")
    variables = {"VIRTUAL_ENV": str(active)}
    if kind == "conda":
        variables = {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "mine"}
    result = fresh.run(fresh.config("cpu_demo"), **variables)
    assert (result.returncode, result.stderr) == (0, "")
    assert not fresh.calls_of("-m pip install")
    assert not (fresh.root / ".venv").exists()
    fresh.forget_calls()
    fresh.run(fresh.config("cpu_demo"), **variables)
    assert fresh.calls == [f"-m recipe train {fresh.config('cpu_demo')}"]


def test_what_an_active_environment_lacks_is_installed_there_after_saying_so(fresh, tmp_path):
    active = fresh.add_environment(tmp_path / "mine")
    result = fresh.run(VIRTUAL_ENV=str(active), FAKE_MISSING="datasets evaluate")
    assert f"the active environment {active} lacks datasets evaluate" in result.stderr
    assert fresh.calls_of("-m pip install")[0].endswith(f"-c {active}/.recipe-constraints -e {fresh.root}")
    assert not (fresh.root / ".venv").exists()


def test_an_active_environment_with_an_old_python_is_refused(fresh, tmp_path):
    active = fresh.add_environment(tmp_path / "mine")
    result = fresh.run(VIRTUAL_ENV=str(active), FAKE_VERSION="3.9")
    assert result.returncode == 2
    assert f"the environment {active} has Python 3.9, and 3.11 or newer is needed" in result.stderr


def test_condas_base_and_a_vanished_environment_are_not_used(fresh, tmp_path):
    base = fresh.add_environment(tmp_path / "conda")
    variables = {"CONDA_PREFIX": str(base), "CONDA_DEFAULT_ENV": "base", "VIRTUAL_ENV": str(tmp_path / "gone")}
    result = fresh.run(**variables)
    assert result.returncode == 0
    assert f"VIRTUAL_ENV={tmp_path}/gone has no bin/python" in result.stderr
    assert (fresh.root / ".venv").is_dir()


def test_missing_packages_are_found_and_pins_kept_off_what_is_there(fresh, tmp_path):
    """With the real Python: pytest is good enough, hypothesis too old for what is asked, the third absent."""
    dependencies = (
        '["pytest>=1", "hypothesis>=9999", "no-such-package; python_version > \'3\'", "never; python_version < \'3\'"]'
    )
    (fresh.root / "pyproject.toml").write_text(f"[project]\ndependencies = {dependencies}\n")
    (fresh.root / "constraints.txt").write_text(
        "# pins\npytest==1.0\nhypothesis==9999\nno_such.package==1\nabsent==2\n"
    )
    active = tmp_path / "mine"
    (active / "bin").mkdir(parents=True)
    wrapper = active / "bin" / "python"
    fake = fresh.bin / "python3"
    wrapper.write_text(f'#!/usr/bin/env bash\n[ "$1" != - ] || exec {sys.executable} "$@"\nexec {fake} "$@"\n')
    wrapper.chmod(0o755)
    result = fresh.run(VIRTUAL_ENV=str(active))
    assert "lacks hypothesis no-such-package\n" in result.stderr
    kept = (active / ".recipe-constraints").read_text()
    assert kept == "hypothesis==9999\nno_such.package==1\nabsent==2\n"
