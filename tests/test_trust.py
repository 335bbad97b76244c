"""Nothing that is read can run code: pickles in each file of a checkpoint, remote code, arrays, parquet."""

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recipe.__main__ import run
from recipe.data.source import open_source
from recipe.guards.checkpoint import read_session

RECIPE = Path(__file__).resolve().parent.parent / "recipe"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "code-has-run"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(write_config, tmp_path, trained_once, monkeypatch):
    """The config of a run with checkpoints; it is trained once, and each test gets a copy."""
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))
    config = write_config(save_steps=3, max_steps=6)
    if not any(trained_once.iterdir()):
        assert run(["train", config]) == 0
        shutil.copytree(tmp_path / "run", trained_once / "run")
        shutil.copy(tmp_path / "part-00.parquet", trained_once)
    else:
        shutil.copy2(trained_once / "part-00.parquet", tmp_path)
        shutil.copytree(trained_once / "run", tmp_path / "run")
    return config


def raw_pickle(file: Path, payload) -> None:
    file.write_bytes(pickle.dumps(payload))


def torch_zip(file: Path, payload) -> None:
    torch.save({"state": payload}, file)


def array_of_objects(file: Path, payload) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([payload], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("ledger.payload.npy", buffer.getvalue())


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "scaler.pt"]


@pytest.mark.parametrize("write", [raw_pickle, torch_zip])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_a_checkpoint_is_not_run(trained, tmp_path, marker, name, write):
    checkpoint = tmp_path / "run/checkpoint-3"
    write(checkpoint / name, Payload(marker))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    try:
        run(["train", trained, "--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "run")])
    except Exception as error:
        assert "weights_only" in str(error) or "Weights only" in str(error), error
    assert not marker.exists()
    with pytest.raises(FileExistsError):  # the payload does work
        marker.mkdir()
        (
            torch.load(checkpoint / name, weights_only=False)
            if write is torch_zip
            else pickle.loads((checkpoint / name).read_bytes())
        )


@pytest.mark.parametrize("write", [raw_pickle, torch_zip])
def test_weights_in_a_pickle_are_not_run(trained, tmp_path, marker, write, capsys):
    shutil.copytree(tmp_path / "run/final", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    write(tmp_path / "model/pytorch_model.bin", Payload(marker))
    words = [
        "--model_config",
        "null",
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--output_dir",
        str(tmp_path / "x"),
    ]
    assert run(["train", trained, *words]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.parametrize("write", [raw_pickle, array_of_objects])
def test_an_array_of_objects_in_the_guards_state_is_not_run(trained, tmp_path, marker, write):
    write(tmp_path / "run/checkpoint-3/guards.npz", Payload(marker))
    assert read_session(tmp_path / "run/checkpoint-3") is None
    assert not marker.exists()


CODE = """
from pathlib import Path
Path({marker!r}).mkdir()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
class Config(LlamaConfig): model_type = "evil"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer(LlamaTokenizer): pass
"""


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run_nor_asked_about(trained, tmp_path, marker, monkeypatch, what):
    def asked(*_):
        raise AssertionError("a question at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    folder = tmp_path / "evil"
    shutil.copytree(tmp_path / "run/final", folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    if what == "model":
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
        words = ["--model_config", "null", "--model_name_or_path", str(folder)]
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        changes = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        words = ["--tokenizer", str(folder)]
    assert run(["train", trained, *words, "--output_dir", str(tmp_path / "x")]) == 2
    assert not marker.exists()


def test_an_extension_type_in_parquet_is_not_run(tmp_path, marker):
    metadata = {"ARROW:extension:name": "arrow.py_extension_type"}
    metadata["ARROW:extension:metadata"] = pickle.dumps(Payload(marker))
    field = pa.field("text", pa.string(), metadata=metadata)
    pq.write_table(pa.table([pa.array(["a", "b"])], schema=pa.schema([field])), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.read_chunk(source.chunks[0]) == ["a", "b"] and not marker.exists()


def calls_in(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_every_loader_in_the_package_refuses_code():
    needed = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    loaders, seen = ("AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained"), set()
    loaders += ("AutoModelForCausalLM.from_pretrained", "AutoModelForCausalLM.from_config")
    needed |= dict.fromkeys(loaders, ("trust_remote_code", "False"))
    for path in RECIPE.rglob("*.py"):
        for name, keywords in calls_in(path):
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "marshal.loads"), path
            if name in needed:
                key, value = needed[name]
                assert keywords.get(key) == value, f"{path}: {name}"
                seen.add(name)
    assert {*loaders, "np.load"} <= seen


def test_no_key_of_a_configuration_allows_code(write_config, capsys):
    assert run(["train", write_config(), "--trust_remote_code", "true"]) == 2
    assert "unknown key" in capsys.readouterr().err
