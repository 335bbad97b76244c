"""What is known of the keys without torch: types, defaults, help, and the configurations that `recipe new` writes."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import trainer_log_levels

from recipe import arguments, config_checks, keys
from recipe.__main__ import COMMANDS, CONFIG_COMMANDS, run
from recipe.arguments import SourceArguments, parse_config
from recipe.guards import FINDING_IDS
from recipe.keys import FieldType, Required, all_keys, source_types
from recipe.model import load_model_config
from recipe.new import CONFIGS, SIZES, count_parameters, starting_config, step_law


def type_of(hint) -> FieldType:
    """What `keys.py` reads from the source, of the hint itself."""
    kinds, choices = [], []
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(member) is Literal:
            choices += get_args(member)
        elif isinstance(member, type) and issubclass(member, Enum):
            choices += [item.value for item in member]
        else:
            kinds.append(get_origin(member) or member)
    return FieldType(tuple(dict.fromkeys([str] * bool(choices) + kinds)), tuple(choices))


GROUPS = (*arguments.OURS, TrainingArguments)


def test_types_and_defaults_are_those_of_the_classes():
    hints: Mapping = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    known = all_keys()
    assert list(known) == [field.name for group in GROUPS for field in fields(group)]
    for field in (field for group in GROUPS for field in fields(group)):
        if field.name not in keys.HINTS and field.name not in config_checks.REFUSED:
            assert known[field.name].type == type_of(hints[field.name]), field.name
        default = field.default if field.default_factory is MISSING else field.default_factory()
        assert known[field.name].default == (Required if default is MISSING else default), field.name
    assert source_types() == {name: type_of(hint) for name, hint in get_type_hints(SourceArguments).items()}


def test_words_of_transformers_and_of_the_guards():
    assert {*config_checks.TRACKERS, "kubeflow", "flyte"} == {*INTEGRATION_TO_CALLBACK}
    assert {*config_checks.WORDS["log_level"]} == {*trainer_log_levels}
    assert {*config_checks.finding_ids()} == {*FINDING_IDS}


@pytest.mark.parametrize("command", CONFIG_COMMANDS)
def test_the_help_of_a_command_has_every_key_in_a_line(command, capsys):
    assert run([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith((f"  {command} CONFIG.json", f"  {command} [CONFIG.json]"))
    shown = [line.split()[0] for line in lines if line.startswith("  ")][1:]
    assert {*shown} >= arguments.FIELDS.keys() and len(set(shown)) == len(shown)
    assert max(map(len, lines)) <= keys.LINE
    learning_rate = next(line for line in lines if line.startswith("  learning_rate "))
    assert learning_rate.split() == ["learning_rate", "float", "5e-05", "The", "peak,", "after", "the", "warm-up"]
    assert not any(key.text == "" for name, key in all_keys().items() if name in arguments.FIELDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in CONFIG_COMMANDS])
def test_other_commands_have_their_own_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert f"usage: recipe {command}" in capsys.readouterr().out


def test_typing_errors_and_help_need_no_torch(tmp_path):
    config = tmp_path / "my.json"
    config.write_text('{"learning_rat": 1, "_note": 2, "tokenizer": "x", "source": "docstrings", "bf16": "yes"}')
    (tmp_path / "model.json").write_text('{"hiden_size": 64}')
    model = ["--model_config", str(tmp_path / "model.json")]
    commands = [["train", str(config), "--max-step", "3", "--seed=x", *model], ["plan", str(tmp_path)]]
    commands += [["train", "--help"]]
    commands += [["new", str(config)], ["new", "--help"], ["nothing"]]
    code = (
        "import sys; from recipe.__main__ import run\n"
        f"codes = [run(words) for words in {commands!r}]\n"
        "print(codes, [name in sys.modules for name in ('torch', 'transformers', 'datasets', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[2, 2, 0, 2, 0, 2] [False, False, False, False]"
    assert "learning_rat: unknown key; did you mean learning_rate?" in done.stderr
    assert "--max_step: unknown key; did you mean max_steps?" in done.stderr
    assert "LlamaConfig has no key hiden_size (did you mean hidden_size?)" in done.stderr
    assert '--seed: expected a whole number, got "x"' in done.stderr and "bf16: expected true or false" in done.stderr
    assert "is a folder" in done.stderr and "my.json exists already" in done.stderr


# recipe new


@pytest.mark.parametrize("size", SIZES)
def test_a_new_config_of_each_size_plans(size, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipe.plan.GPUS", {})  # of this machine only: each precision takes a second
    path = tmp_path / "my.json"
    assert run(["new", str(path), "--size", size]) == 0
    assert f"python -m recipe train {path}" in capsys.readouterr().out
    assert run(["plan", str(path), "--use_cpu", "true", "--json"]) == 0
    plan, config = json.loads(capsys.readouterr().out), parse_config(path, ["--use_cpu", "true"])
    assert plan["parameters"]["total"] == pytest.approx(float(size[:-1]) * 1e6, rel=0.06)
    assert plan["tokens_per_parameter"] == pytest.approx(20, rel=0.02)
    model = json.loads((CONFIGS / f"llama_{size}_model.json").read_text())
    assert sum(count_parameters(model)) == plan["parameters"]["total"]
    assert load_model_config(config.model.model_config).max_position_embeddings == config.data.block_size
    rate, batch = step_law(count_parameters(model)[1], config.data.train_tokens)
    assert config.tokens_per_step == pytest.approx(batch, rel=0.1)
    assert config.training.learning_rate == pytest.approx(rate, rel=0.05)
    assert config.training.warmup_steps <= min(2000, 0.1 * config.max_steps + 1)
    assert f"{plan['steps']:,} steps in all" == json.loads(path.read_text())["_comment_often"]


def test_step_law_at_the_size_of_the_demo_is_near_the_demo():
    """docs/model.md has these figures."""
    demo = json.loads((CONFIGS / "cpu_demo.json").read_text())
    rest = count_parameters(json.loads((CONFIGS / demo["model_config"]).read_text()))[1]
    rate, batch = step_law(rest, 1_638_400)
    assert (round(rate, 4), round(batch)) == (0.0041, 2051)


def test_a_new_config_is_explained_and_trains(tmp_path, write_parquet, monkeypatch):
    values = starting_config("3m")
    assert sum(name.startswith("_comment") for name in values) >= 8
    path = tmp_path / "my.json"
    assert run(["new", str(path)]) == 0
    short = ["--source", write_parquet(300), "--max_steps", "2", "--block_size", "32", "--eval_steps", "2"]
    short += ["--gradient_accumulation_steps", "1", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))  # short samples
    assert run(["train", str(path), *short]) == 0
    assert (tmp_path / "run/final/config.json").exists()
    before = path.read_text()
    assert run(["new", str(path), "--size", "60m"]) == 2 and path.read_text() == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on a CPU")
@pytest.mark.parametrize("has_units", [False, True])
def test_new_proposes_what_a_cpu_trains_in_an_hour(tmp_path, monkeypatch, capsys, has_units):
    monkeypatch.setattr("recipe.plan.matrix_rate", lambda device, precision: {"fp32": 1e11, "bf16": 3e11}[precision])
    monkeypatch.setattr("recipe.model.has_fast_bf16_cpu", lambda: has_units)
    monkeypatch.chdir(tmp_path)
    assert run(["new", "my.json", "--size", "15m"]) == 0
    long = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"on this cpu it takes about \d\d\d? hours \(estimate of `recipe plan`\)", long)
    proposed = re.search(r"about one hour: python -m recipe (new .*)$", long)[1].split()
    assert run(proposed) == 0
    short = capsys.readouterr().out.splitlines()[-1]
    assert 0.8 < float(re.search(r"about ([\d.]+) hours", short)[1]) < 1.2 and "one hour" not in short
    config = parse_config(proposed[1])
    model = json.loads((CONFIGS / "llama_3m_model.json").read_text())
    rate, batch = step_law(count_parameters(model)[1], config.data.train_tokens)
    assert config.tokens_per_step == pytest.approx(batch, rel=0.5)  # of whole micro-batches of 2,048
    assert config.training.learning_rate == pytest.approx(rate, rel=0.05)
    assert config.training.warmup_steps <= 0.1 * config.max_steps + 1
