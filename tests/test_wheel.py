"""A wheel that is built from the checkout and installed elsewhere is whole: it needs nothing of the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow  # it downloads the build backend

GUARDED = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from recipe.guards import RegressionCallback

config = LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 99, (16, 12))]
arguments = TrainingArguments(sys.argv[1], max_steps=2, use_cpu=True, report_to=[])
trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)
trainer.add_callback(RegressionCallback())
trainer.train()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of an environment with the wheel, and with the packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT], capture_output=True, text=True)
    if "hatchling" in built.stderr:
        pytest.skip(f"the build backend cannot be downloaded: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin"


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    """In a folder that is no checkout, with no way to this one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_it_is_not_the_checkout(installed, tmp_path):
    found = run([installed / "python", "-c", "import recipe; print(recipe.__file__)"], tmp_path).stdout
    assert Path(found.strip()).is_relative_to(installed.parent)


def test_the_guards(installed, tmp_path):
    (tmp_path / "guarded.py").write_text(GUARDED)
    done = run([installed / "python", "guarded.py", "out"], tmp_path)
    assert "recipe guards: " in done.stderr and "report: out/_recipe/report.html" in done.stderr
    assert "<title>out</title>" in (tmp_path / "out/_recipe/report.html").read_text()


def test_a_training_with_the_default_config(installed, tmp_path):
    (tmp_path / "my.txt").write_text(
        "\n\n".join(f"{i} is followed by {i + 1}, and then comes more." for i in range(900))
    )
    small = ["--use_cpu", "true", "--max_steps", "3", "--block_size", "64", "--per_device_train_batch_size", "2"]
    done = run([installed / "recipe", "train", "--source", "my.txt", *small, "--json"], tmp_path)
    assert "training recipe/configs/cpu_demo.json" in done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 3 and (tmp_path / result["run_dir"] / "final/model.safetensors").exists()


def test_a_config_by_the_name_that_the_docs_use(installed, tmp_path):
    done = run([installed / "recipe", "plan", "recipe/configs/cpu_demo.json", "--json"], tmp_path)
    assert json.loads(done.stdout)
