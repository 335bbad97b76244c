"""The configuration: what is refused and why, what an override does, and that nothing passes silently."""

import json
import os
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from transformers import TrainingArguments

from recipe import arguments, config_checks, read_config
from recipe.__main__ import run
from recipe.arguments import (
    DataArguments,
    GuardArguments,
    ModelArguments,
    format_config,
    parse_config,
)
from recipe.conflicts import find_conflicts
from recipe.errors import UserError
from recipe.keys import HINTS, TEXTS, source_types
from recipe.read_config import ConfigError, find_path

CONFIGS = Path(arguments.__file__).parent / "configs"
TRAINING_NAMES = {field.name for field in fields(TrainingArguments)}


@pytest.fixture(autouse=True)
def on_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config that parses, with `changes`; a change to ... takes the key out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text('{"hidden_size": 4096}')
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")

    def write(**changes) -> Path:
        good = {
            "model_config": "model.json",
            "tokenizer": "tok",
            "source": "docstrings",
            "max_steps": 10,
            "use_cpu": True,
        }
        values = {name: value for name, value in (good | changes).items() if value is not ...}
        path = tmp_path / "demo.json"
        path.write_text(json.dumps(values))
        return path

    return write


def problems_of(path, overrides=(), machine_defaults=MappingProxyType({})) -> dict[str, str]:
    with pytest.raises(arguments.ConfigError) as caught:
        parse_config(path, overrides, machine_defaults)
    return dict(caught.value.problems)


LOAD_BEST = "load_best_model_at_end"
# Each row: what is changed in a good config, the key that must be named, and what the message must say.
BAD_VALUES = [
    # names
    ({"learning_rat": 1e-3}, "learning_rat", "did you mean learning_rate?"),
    ({"blocksize": 64}, "blocksize", "did you mean block_size?"),
    ({"zzzz": 1}, "zzzz", "unknown key"),
    ({"evaluation_strategy": "steps"}, "evaluation_strategy", "its name is now eval_strategy"),
    ({"warmup_ratio": 0.1}, "warmup_ratio", "warmup_steps"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing", "activation_checkpointing"),
    # types
    ({"bf16": "false"}, "bf16", 'expected true or false, got "false": remove the quotes'),
    ({"bf16": 1}, "bf16", "expected true or false, got 1"),
    ({"learning_rate": "3e-4"}, "learning_rate", 'expected a number, got "3e-4": remove the quotes'),
    ({"learning_rate": True}, "learning_rate", "expected a number, got true"),
    ({"learning_rate": None}, "learning_rate", "expected a number, got null"),
    ({"max_steps": 2.5}, "max_steps", "expected a whole number, got 2.5"),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps", "expected a whole number, got true"),
    ({"block_size": "64"}, "block_size", "remove the quotes"),
    ({"source": 3}, "source", "expected a string, or a list of entries like"),
    ({"source": ["a.parquet"]}, "source", "entry 0 must be an object with a path"),
    ({"source": [{"path": "a", "wieght": 1}]}, "source", "entry 0: wieght: unknown key; did you mean weight"),
    ({"output_dir": None}, "output_dir", "expected a string, got null"),
    ({"report_to": None}, "report_to", "expected a string or a list of strings, got null"),
    ({"disabled_guards": "loss_spike"}, "disabled_guards", "expected a list of strings"),
    ({"disabled_guards": [1]}, "disabled_guards", "expected a list of strings"),
    ({"lr_scheduler_kwargs": "x"}, "lr_scheduler_kwargs", "expected an object or null"),
    ({"learning_rate": float("nan")}, "learning_rate", "finite"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm", "finite"),
    ({"max_steps": float("inf")}, "max_steps", "expected a whole number, got Infinity"),
    # words: the nearest comes first
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", '"cosin" is not one of cosine, '),
    ({"optim": "adamw_troch"}, "optim", "not one of adamw_torch, "),
    ({"eval_strategy": "step"}, "eval_strategy", "not one of steps, "),
    ({"save_strategy": "Best"}, "save_strategy", "not one of best, "),
    ({"on_regression": "abort"}, "on_regression", "warn, stop"),
    ({"attn_implementation": "flash"}, "attn_implementation", "flash_attention_2"),
    ({"attn_implementation": 2}, "attn_implementation", "expected one of auto, sdpa"),
    ({"disabled_guards": ["loss_spik"]}, "disabled_guards", '"loss_spik" is not one of loss_spike, '),
    ({"report_to": "wandbb"}, "report_to", "not one of"),
    ({"log_level": "loud"}, "log_level", "not one of"),
    ({"include_num_input_tokens_seen": "some"}, "include_num_input_tokens_seen", "non_padding"),
    ({"eval_strategy": ""}, "eval_strategy", '"" is not one of no, steps'),
    # ranges
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "at least 1, got 0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size", "at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size", "at least 1"),
    ({"learning_rate": -1e-3}, "learning_rate", "at least 0, got -0.001"),
    ({"weight_decay": -0.1}, "weight_decay", "at least 0"),
    ({"adam_beta1": 1.0}, "adam_beta1", "below 1"),
    ({"adam_beta2": -0.1}, "adam_beta2", "at least 0"),
    ({"adam_epsilon": 0.0}, "adam_epsilon", "above 0"),
    ({"max_grad_norm": -1}, "max_grad_norm", "at least 0"),
    ({"warmup_steps": -1}, "warmup_steps", "at least 0"),
    ({"warmup_steps": 10.5}, "warmup_steps", "whole number of steps"),
    ({"block_size": 7}, "block_size", "at least 8"),
    ({"train_tokens": 0, "max_steps": ...}, "train_tokens", "at least 1"),
    ({"max_steps": 0}, "max_steps", "at least 1"),
    ({"eval_documents": 0}, "eval_documents", "at least 1"),
    ({"train_skip": -1}, "train_skip", "at least 0"),
    ({"eval_skip": -1}, "eval_skip", "at least 0"),
    ({"train_seed": 2**32}, "train_seed", "below 2**32"),
    ({"logging_steps": 0}, "logging_steps", "whole number of steps"),
    ({"save_steps": 1.5}, "save_steps", "whole number of steps"),
    ({"eval_strategy": "steps", "eval_steps": -5}, "eval_steps", "whole number of steps"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers", "at least 0"),
    ({"num_lanes": 24}, "num_lanes", "power of two"),
    ({"num_lanes": 1e9}, "num_lanes", "power of two"),
    ({"num_lanes": 0}, "num_lanes", "at least 1"),
    ({"tokenizer": ""}, "tokenizer", "must not be empty"),
    ({"source": ""}, "source", "must not be empty"),
    # what would break the recipe, or do nothing
    ({"remove_unused_columns": True}, "remove_unused_columns", "must stay false: true strips"),
    ({"remove_unused_columns": "false"}, "remove_unused_columns", "remove the quotes"),
    ({"ignore_data_skip": False}, "ignore_data_skip", "must stay true"),
    ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter", "NaN loss as 0.0"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size", "global batch"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor", "next-token loss"),
    ({"average_tokens_across_devices": False}, "average_tokens_across_devices", "must stay true"),
    ({"num_train_epochs": 1}, "num_train_epochs", "train_tokens or max_steps"),
    ({"do_train": True}, "do_train", "command"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last", "refused"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config", "refused"),
    ({"label_names": ["labels"]}, "label_names", "refused"),
    ({"data_seed": 1}, "data_seed", "train_seed"),
    # several fields together
    ({"train_tokens": 1000}, "train_tokens", "both are set"),
    ({"max_steps": ...}, "train_tokens", "neither is set"),
    ({"model_name_or_path": "owner/name"}, "model_config", "both are set"),
    ({"model_config": ...}, "model_config", "neither is set"),
    ({"tokenizer": ...}, "tokenizer", "is required"),
    ({"source": ...}, "source", "is required"),
    ({"dataloader_num_workers": 3}, "dataloader_num_workers", "0, 1, 2, 4, 8, 16, 32 would do"),
    ({"bf16": True, "fp16": True}, "bf16", "keep one"),
    ({"fp16": True}, "fp16", "needs a GPU"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation", "needs a GPU"),
    ({"attn_implementation": "flex_attention"}, "attn_implementation", "needs a GPU"),
    ({"fsdp": "full_shard"}, "fsdp", "needs GPUs: on a CPU accelerate ignores it"),
    ({"document_masking": True, "use_cache": True}, "use_cache", "document_masking"),
    ({"eval_strategy": "steps"}, "eval_steps", "is required"),
    ({"eval_steps": 5}, "eval_steps", "eval_strategy is unset"),
    ({"save_strategy": "epoch"}, "save_strategy", "no epochs"),
    ({"save_strategy": "best"}, "save_strategy", "metric_for_best_model"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps", "constant_with_warmup"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs", "num_decay_steps"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lrr": 1}}, "lr_scheduler_kwargs", "min_lrr"),
    # paths
    ({"model_config": "nope.json"}, "model_config", "nope.json not found; looked for nope.json, "),
    ({"model_config": "tok"}, "model_config", "is a folder"),
    ({"trajectory": "nope.json"}, "trajectory", "not found"),
    ({"tokenizer": "./nope"}, "tokenizer", "nor is it a hub name"),
    ({"tokenizer": "tokenizer/nope"}, "tokenizer", "nor is it a hub name"),
    ({"tokenizer": "model.json"}, "tokenizer", "is a file"),
    # found by TrainingArguments alone
    ({LOAD_BEST: True}, LOAD_BEST, "save and eval strategy to match"),
    ({"eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, LOAD_BEST: True}, LOAD_BEST, "multiple"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "key", "says"), BAD_VALUES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_value_is_one_problem(write, changes, key, says):
    problems = problems_of(write(**changes))
    assert list(problems) == [key]
    assert says in problems[key]


BAD_FILES = [
    (b"", "is empty"),
    (b"[1]", "must be a JSON object of keys and values, not a list"),
    (b"3", "must be a JSON object"),
    (b'{"source": "a",\n "tokenizer": "b",\n}', "line 3 column 1: trailing comma"),
    (b'{"disabled_guards": ["loss_spike",]}', "trailing comma"),
    (b'{\n // a comment\n "source": "a"}', "line 2 column 2: JSON has no comments"),
    (b'{"source": "a" # why\n}', "JSON has no comments"),
    (b"{'source': 1}", "line 1 column 2: invalid JSON"),
    (b'{"source": "a"', "invalid JSON"),
    (b'{"source": "\xff"}', "not UTF-8 (byte 12)"),
    (b"[" * 100_000, "cannot be read: "),
]


@pytest.mark.parametrize(("content", "says"), BAD_FILES, ids=[says[:24] for _, says in BAD_FILES])
def test_unreadable_file(tmp_path, content, says):
    path = tmp_path / "demo.json"
    path.write_bytes(content)
    assert says in problems_of(path)[""]


def test_missing_file_and_folder(tmp_path):
    assert problems_of(tmp_path / "nope.json") == {"": "no such file"}
    (tmp_path / "mine.json").write_text('{"hidden_size": 4096}')
    assert problems_of(tmp_path / "mime.json")[""] == f"no such file; did you mean {tmp_path / 'mine.json'}?"
    assert "is a folder" in problems_of(tmp_path)[""]


def test_repeated_key_is_refused_and_a_repeated_comment_is_not(write):
    path = write()
    text = path.read_text()
    path.write_text(text[:-1] + ', "_note": 1, "_note": 2}')
    parse_config(path)
    path.write_text(text[:-1] + ', "max_steps": 20, "lr_scheduler_kwargs": {"a": 1, "a": 2}}')
    problems = problems_of(path)
    assert problems["max_steps"] == "is given twice; keep one"
    assert problems["a"] == "is given twice; keep one"


def test_all_problems_at_once(write):
    path = write(learning_rat=1, bf16="true", block_size=1, model_config="nope.json", num_lanes=3, do_eval=True)
    with pytest.raises(UserError) as caught:
        parse_config(path, ["stray", "--seed", "x", "--num_workers", "2"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 9 problems"
    keys = {line.split(":")[0].strip() for line in lines[1:]}
    expected = {"learning_rat", "bf16", "block_size", "model_config", "num_lanes", "do_eval"}
    assert keys == expected | {"stray", "--seed", "--num_workers"}


def test_comment_keys_and_byte_order_mark_are_ignored(write):
    path = write(_comment="why", _more={"a": 1})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert parse_config(path).training.max_steps == 10


# Overrides


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--bf16"], "bf16", True),
        (["--bf16", "--learning_rate", "1"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--activation_checkpointing_kwargs", '{"a": true}'], "activation_checkpointing_kwargs", {"a": True}),
        (["--disabled_guards", "loss_spike,row_leak"], "disabled_guards", ["loss_spike", "row_leak"]),
        (["--disabled_guards", '["loss_spike"]'], "disabled_guards", ["loss_spike"]),
        (["--disabled_guards="], "disabled_guards", []),
        (["--save_total_limit", "none"], "save_total_limit", None),
        (["--save_total_limit", "null"], "save_total_limit", None),
        (["--trajectory", "none"], "trajectory", "none"),
        (["--run_name", "12"], "run_name", "12"),
        (["--source", "hf://a/b/c=d"], "source", "hf://a/b/c=d"),
    ],
)  # fmt: skip
def test_override_wins_and_has_the_fields_type(write, words, name, value):
    path = write(save_total_limit=3, bf16=False, learning_rate=0.5, disabled_guards=["lost_updates"])
    found = parse_config(path, words).to_dict()[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        (["--learning_rat", "1"], "--learning_rat", "did you mean learning_rate?"),
        (["--learning_rate"], "--learning_rate", "needs a value"),
        (["--learning_rate", "--bf16"], "--learning_rate", "needs a value"),
        (["--learning_rate", "-1"], "--learning_rate", "at least 0, got -1"),
        (["--learning_rate", "fast"], "--learning_rate", 'expected a number, got "fast"'),
        (["--learning_rate", "nan"], "--learning_rate", "finite"),
        (["--max_steps", "2.5"], "--max_steps", "expected a whole number, got 2.5"),
        (["--bf16", "yes"], "--bf16", "expected true or false"),
        (["--lr_scheduler_kwargs", "{a:1}"], "--lr_scheduler_kwargs", "expected an object"),
        (["--seed", "1", "--seed", "2"], "--seed", "given twice"),
        (["10"], "10", "is not an option"),
        (["-lr", "--bf16"], "-lr", "is not an option"),
        (["--"], "--", "is not an option"),
        (["--warmup_ratio", "0.1"], "--warmup_ratio", "warmup_steps"),
        (["--train_tokens", "10", "--max_steps", "3"], "--train_tokens", "both are set"),
    ],
)
def test_bad_override_is_named_as_an_option(write, words, key, says):
    problems = problems_of(write(), words)
    assert list(problems) == [key]
    assert says in problems[key]


def test_override_mends_a_bad_value_of_the_file(write):
    assert parse_config(write(learning_rate="x"), ["--learning_rate", "0.1"]).training.learning_rate == 0.1


def test_override_of_one_alternative_replaces_the_other(write):
    config = parse_config(write(), ["--train_tokens", "1e6", "--model_name_or_path", "owner/name"])
    assert (config.data.train_tokens, config.training.max_steps) == (1_000_000, -1)
    assert (config.model.model_config, config.model.model_name_or_path) == (None, "owner/name")


def test_machine_defaults_give_way_to_file_and_overrides(write):
    machine = {"bf16": True, "logging_first_step": True}
    assert parse_config(write(), (), machine).training.bf16
    assert not parse_config(write(bf16=False), (), machine).training.bf16
    config = parse_config(write(), ["--logging_first_step", "false"], machine)
    assert (config.training.logging_first_step, config.training.bf16) == (False, True)
    assert list(problems_of(write(fp16=True), (), machine)) == [
        "fp16"
    ]  # for want of a GPU, not for the machine's bf16


# Machines and processes


@pytest.mark.parametrize(
    ("world_size", "workers", "key"), [(2, 16, None), (2, 6, "dataloader_num_workers"), (3, 0, "num_lanes")]
)
def test_lanes_fit_processes_and_workers(write, monkeypatch, world_size, workers, key):
    given = {"num_lanes": 32, "dataloader_num_workers": workers}
    values = parse_config(write()).to_dict() | given
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert list(find_conflicts(values, values.keys(), set(), set())) == [key] * (key is not None)
    if key == "dataloader_num_workers":
        assert "0, 1, 2, 4, 8, 16 would do" in problems_of(write(**given))[key]


def test_steps_of_a_token_budget_are_rounded_up(write):
    path = write(
        max_steps=..., train_tokens=1025, block_size=64, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    config = parse_config(path)
    assert config.tokens_per_step == 512
    assert config.max_steps == 3
    assert parse_config(write()).max_steps == 10


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize(("key", "says"), [("bf16", "--bf16 false"), ("tf32", "leave the key out")])
def test_hardware_that_is_not_there(write, key, says):
    problems = problems_of(write(use_cpu=False, **{key: True}))
    assert list(problems) == [key]
    assert says in problems[key]


def test_error_of_an_unknown_origin_is_one_problem(write, monkeypatch):
    def refuse(self):
        raise ValueError("something\nabout nothing")

    monkeypatch.setattr(TrainingArguments, "__post_init__", refuse)
    assert problems_of(write()) == {"TrainingArguments": "something about nothing"}


# Paths


def test_paths_are_found_beside_the_config_and_in_the_project(write, tmp_path, monkeypatch):
    path = write(model_config="beside.json", trajectory="recipe/errors.py")
    (tmp_path / "beside.json").write_text('{"hidden_size": 4096}')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = parse_config(path)
    assert config.model.model_config == str(tmp_path / "beside.json")
    assert config.guards.trajectory == str(CONFIGS.parent / "errors.py")
    assert config.model.tokenizer == str(tmp_path / "tok")
    (elsewhere / "beside.json").write_text('{"hidden_size": 4096}')
    assert parse_config(path).model.model_config == "beside.json"
    assert find_path("nowhere.json", path) is None


def test_installed_package_holds_the_tokenizer_folder(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages" / "recipe" / "_tokenizer" / "llama-9k"
    folder.mkdir(parents=True)
    monkeypatch.setattr(read_config, "__file__", str(folder.parents[1] / "read_config.py"))
    assert find_path("tokenizer/llama-9k", tmp_path / "demo.json") == folder


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/gpt-neox-20b", "owner/llama-3.2"])
def test_hub_names_are_left_alone(write, name):
    assert parse_config(write(tokenizer=name)).model.tokenizer == name


def test_a_folder_called_auto_does_not_change_the_trajectory(write, tmp_path):
    (tmp_path / "auto").mkdir()
    assert parse_config(write()).guards.trajectory == "auto"


# The resolved configuration


def test_recipe_defaults(write):
    training = parse_config(write()).training
    assert {name: getattr(training, name) for name in config_checks.DEFAULTS} == config_checks.DEFAULTS
    assert training.output_dir == "runs/demo"


def test_to_dict_survives_json_and_parses_to_the_same_config(write, tmp_path):
    path = write(
        max_steps=..., train_tokens=1e6, eval_strategy="steps", eval_steps=50, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1}, debug="underflow_overflow", disabled_guards=["loss_spike"],
        load_best_model_at_end=True, save_steps=100, activation_checkpointing=True, warmup_steps=0.1, bf16=True,
    )  # fmt: skip
    config = parse_config(path)
    stored = json.dumps(config.to_dict())
    path.write_text(stored)
    again = parse_config(path)
    assert json.dumps(again.to_dict()) == stored
    assert (again.model, again.data, again.guards) == (config.model, config.data, config.guards)
    ours = [field.name for group in arguments.OURS for field in fields(group)]
    assert list(config.to_dict()) == ours + list(arguments.TRAINING_FIELDS)


@pytest.mark.parametrize("length", [{"max_steps": ..., "train_tokens": 1e5}, {"max_steps": 10}])
def test_what_a_run_stores_parses_to_the_same_run(write, length):
    path = write(**length)
    config = parse_config(path)
    config.training.max_steps = config.max_steps  # as a run does before it stores its arguments
    stored = config.to_dict()
    path.write_text(json.dumps(stored))
    again = parse_config(path)
    assert again.to_dict() == stored
    assert again.max_steps == config.training.max_steps
    assert again.data.train_tokens == config.data.train_tokens


def test_tokens_are_masked_and_a_mask_is_not_a_token(write):
    path = write(hub_token="hf_secret")
    config = parse_config(path)
    assert config.training.hub_token == "hf_secret"
    assert config.to_dict()["hub_token"] == "<HUB_TOKEN>"
    assert "hf_secret" not in format_config(config)
    path.write_text(json.dumps(config.to_dict()))
    assert "HF_TOKEN" in problems_of(path)["hub_token"]


def test_format_config_shows_what_differs(write):
    config = parse_config(write(learning_rate=0.001, per_device_train_batch_size=8))
    *lines, last = format_config(config).splitlines()
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert shown == {
        "model_config": '"model.json"',
        "tokenizer": '"tok"',
        "source": '"docstrings"',
        "output_dir": '"runs/demo"',
        "max_steps": "10",
        "learning_rate": "0.001",
        "use_cpu": "true",
    }
    assert len({line.index(value) for line, value in zip(lines, shown.values(), strict=True)}) == 1
    assert last == f"{len(config.to_dict()) - len(lines)} other keys at their defaults"


# The lists


def test_names_of_ours_are_frozen():
    names = {group: [field.name for field in fields(group)] for group in arguments.OURS}
    assert names == {
        ModelArguments: ["model_config", "model_name_or_path", "tokenizer", "attn_implementation"],
        DataArguments: [
            "source", "text_column", "block_size", "train_tokens", "train_skip", "train_seed", "eval_skip",
            "eval_seed", "eval_documents", "document_masking", "num_lanes", "on_changed_stream", "on_bad_data",
                "allow_change",
        ],
        GuardArguments: ["trajectory", "on_regression", "disabled_guards"],
    }  # fmt: skip


def test_names_of_ours_do_not_collide_with_training_arguments():
    assert not TRAINING_NAMES & {field.name for group in arguments.OURS for field in fields(group)}


def test_tables_name_only_keys_that_exist():
    known = set(arguments.FIELDS)
    checks = config_checks
    in_ranges = {name for _, _, names in checks.RANGES for name in names.split()}
    assert in_ranges <= known | set(source_types())
    assert set().union(checks.DEFAULTS, checks.WORDS, *checks.ALTERNATIVES, TEXTS, HINTS) <= known
    assert {*read_config.FILES, *read_config.FOLDERS} <= known
    assert not set(checks.REFUSED) & known
    kinds = {kind for known_type in read_config.known_types().values() for kind in known_type.kinds}
    assert kinds <= set(checks.TYPE_NAMES)


def test_refused_names_are_not_spelled_wrong():
    of_version_4 = {"evaluation_strategy", "no_cuda", "warmup_ratio", "overwrite_output_dir", "logging_dir"}
    of_version_4 |= {"save_safetensors", "group_by_length"}
    assert set(config_checks.REFUSED) - TRAINING_NAMES == of_version_4


SHIPPED = [path for path in sorted(CONFIGS.glob("*.json")) if "source" in json.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_config_parses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(path, ["--use_cpu", "true"])
    assert config.max_steps >= 1
    assert os.path.exists(config.model.model_config)


def test_the_commands_find_the_shipped_configs_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recipe.__main__._has_gpu", lambda: False)
    for command in (["train"], ["train", "recipe/configs/cpu_demo.json"], ["plan", "recipe/configs/cpu_demo.json"]):
        assert run([*command, "--no_such_key", "1"]) == 2
        assert "recipe/configs/cpu_demo.json: 1 problem" in capsys.readouterr().err


def test_a_models_json_is_told_from_a_trainings_and_read_before_torch_is(write, tmp_path):
    (tmp_path / "model.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1,}')
    with pytest.raises(ConfigError, match="model_config: .*model.json: line 1 .*: trailing comma"):
        parse_config(write(model_config=str(tmp_path / "model.json")))
    (tmp_path / "model.json").write_text('{"hidden_size": 8, "num_hidden_layers": 1}')
    with pytest.raises(ConfigError, match="1 problem\\n.*is a model's configuration; name that of a training"):
        parse_config(tmp_path / "model.json")
    with pytest.raises(ConfigError, match="hidden_size: unknown key: the shape of a new model is in the JSON that"):
        parse_config(write(hidden_size=8, num_hidden_layers=1))
