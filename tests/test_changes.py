"""What may change at a resume: the table of docs/resume.md against the code, and against runs."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch

from recipe.__main__ import run
from recipe.arguments import FIELDS, parse_config
from recipe.config_checks import FIXED
from recipe.data.pipeline import build_data
from recipe.guards.records import read_lines
from recipe.internals import takes_found_inf
from recipe.model import build_model
from recipe.resume import ELSEWHERE, FREE, SETTINGS, find_differences, is_named, keep_configured, settings_of
from recipe.train import assemble

DOCS = Path(__file__).resolve().parent.parent / "docs/resume.md"


def table() -> dict[str, str]:
    """Key -> what the page says."""
    rows = re.findall(r"^\| (`.*?) \| (free|refused.*?) \|$", DOCS.read_text(), re.MULTILINE)
    words = ((names.split(": ")[0] if names.startswith("`model") else names, says) for names, says in rows)
    found = {name: says for names, says in words for name in re.findall(r"`([\w.]+)`", names)}
    rest = re.findall(r"^\| (`max_steps`.*?) \| (free.*?) \|$", DOCS.read_text(), re.MULTILINE)
    return found | {name: says for names, says in rest for name in re.findall(r"`(\w+)`", names)}


def test_the_table_is_what_the_code_does():
    says, counted = table(), {"ranks", "rows_per_step", "train_tokens"}
    assert {name for name in says if says[name].startswith("free")} == {*FREE} | counted
    watched = {name for name in says if says[name] == "refused unless named"} - {"model", "tokenizer"}
    assert set(SETTINGS) == watched | FIXED.keys()  # which have one value
    assert {"model", "tokenizer", "train_seed", "block_size", "num_lanes"} <= says.keys()


def test_every_key_is_watched_unless_the_table_says_that_it_is_free():
    assert sorted([*SETTINGS, *FREE, *ELSEWHERE]) == sorted(FIELDS)  # each in one of them
    assert {"neftune_noise_alpha", "optim_target_modules", "use_liger_kernel", "fsdp"} <= set(SETTINGS)


# Of every setting another value that the configuration accepts
OTHER = {
    "optim": "adamw_torch",
    "optim_args": "x=1",
    "learning_rate": 0.001,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-7,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 2,
    "seed": 7,
    "document_masking": True,
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": None,  # no value that this machine accepts
    "use_liger_kernel": None,
    "liger_kernel_config": {"rope": False},
    "use_cache": None,
    "fsdp": None,
    "fsdp_config": {"min_num_params": 9},
    "deepspeed": None,
}
OTHER_MODEL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "hidden_act": "gelu",
    "attention_dropout": 0.1,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 2,
}
OTHER_FREE = {
    "logging_steps": 2,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_steps": 2,
    "eval_seed": 3,
    "per_device_eval_batch_size": 2,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 1,
    "max_steps": 9,
    "disabled_guards": ["loss_spike"],
    "on_regression": "stop",
    "trajectory": "none",
}


def settings_of_file(path: str, **changes) -> dict:
    words = [word for name, value in changes.items() for word in (f"--{name}", as_word(value))]
    config = parse_config(path, [*words, "--use_cpu", "true"])
    data = build_data(config)
    known = dict(tokenizer=data.tokenizer, block_size=config.data.block_size)
    known |= dict(document_masking=config.data.document_masking, model_name_or_path=None)
    return settings_of(config, build_model(model_config=config.model.model_config, **known), data.tokenizer)


def as_word(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_each_setting_is_seen(write_config):
    assert OTHER.keys() == set(SETTINGS) - FIXED.keys()
    path = write_config()
    before = settings_of_file(path)
    for name, value in OTHER.items():
        if name != "lr_scheduler_kwargs" and value is not None:
            differences = find_differences(
                before["settings"], settings_of_file(path, **{name: value})["settings"], True
            )
            assert list(differences) == [name], name
    for name, value in OTHER_FREE.items():
        after = settings_of_file(path, **{name: value})
        assert find_differences(before["settings"], after["settings"], True) == {}
        assert name in find_differences(before["free"], after["free"], True)


def test_each_effective_value_of_the_model_is_seen(write_config, tmp_path, tiny_config):
    path = write_config()
    before = settings_of_file(path)["settings"]
    for name, value in OTHER_MODEL.items():
        (tmp_path / "model.json").write_text(json.dumps({**tiny_config, name: value}))
        differences = find_differences(before, settings_of_file(path)["settings"], True)
        assert any(is_named(each, [name, f"model.{name}"]) for each in differences), name
        assert all(is_named(each, ["model"]) for each in differences)
    explicit = {**tiny_config, "hidden_act": "silu", "head_dim": 8}  # the defaults
    explicit["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (tmp_path / "model.json").write_text(json.dumps(explicit))
    assert find_differences(before, settings_of_file(path)["settings"], True) == {}


def test_only_what_both_versions_know_is_compared():
    saved = {"model": {"rope": {"theta": 1}, "old": 2}, "tokenizer": {"added_tokens": {"3": 4}}}
    wanted = {"model": {"rope": {"theta": 2, "new": 3}, "newer": 4}, "tokenizer": {"added_tokens": {"3": 4, "5": 6}}}
    assert find_differences(saved, wanted, of_both=True).keys() == {"model.rope.theta", "tokenizer.added_tokens.5"}
    assert is_named("model.rope.theta", ["theta"]) and is_named("model.rope.theta", ["model.rope"])
    assert not is_named("model.rope.theta", ["rope"])


@pytest.mark.parametrize("is_fused", [True, False])
def test_an_optimizer_keeps_the_code_that_skips_steps(is_fused):
    """The groups of a checkpoint would choose it otherwise."""

    def make(is_fused):
        weight = torch.nn.Parameter(torch.ones(2))
        weight.grad = torch.ones(2)
        optimizer = torch.optim.AdamW([weight], fused=is_fused)
        optimizer.step()
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    (optimizer, scheduler), (other, _) = make(is_fused), make(not is_fused)
    configured = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(other.state_dict())
    keep_configured(optimizer, scheduler, configured, 1)
    assert optimizer.param_groups[0]["fused"] is is_fused and takes_found_inf(optimizer) == is_fused
    optimizer.found_inf = torch.ones(())
    if is_fused:
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        optimizer.step()
        assert torch.equal(before, optimizer.param_groups[0]["params"][0])


# --- whole runs


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr("recipe.trainer.SampleCallback.__init__.__defaults__", (4,))


def rates(run_dir: Path) -> list[float]:
    return [record["learning_rate"] for record in read_lines(run_dir / "steps.jsonl")]


def test_a_named_change_takes_effect_and_the_jump_is_stated(write_config, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    path = write_config(eval_strategy="no", eval_steps=None)
    assert run(["train", path]) == 0
    again = ["train", path, "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-3"), "--learning_rate", "0.006"]
    again += ["--weight_decay", "0.5"]
    assert run(again) == 2
    error = capsys.readouterr().err.strip()
    assert "learning_rate: checkpoint 0.003, config 0.006" in error and "--allow_change" in error
    assert len(error.splitlines()) == 3
    assert run([*again, "--allow_change", "learning_rate"]) == 2
    assert "learning_rate" not in capsys.readouterr().err.splitlines()[1]
    for name, value in (("optim", "sgd"), ("optim", "adafactor"), ("lr_scheduler_type", "reduce_lr_on_plateau")):
        words = [f"--{name}", value, "--eval_strategy", "steps", "--eval_steps", "3"]
        assert run([*again, *words, "--allow_change", f"learning_rate,weight_decay,{name}"]) == 2
        assert f"{value} (never: " in capsys.readouterr().err
    assert run([*again, "--neftune_noise_alpha", "5"]) == 2
    assert "neftune_noise_alpha: checkpoint none, config 5" in capsys.readouterr().err
    assert run([*again, "--max_steps", "2"]) == 2
    assert "checkpoint-3 is after max_steps 2" in capsys.readouterr().err
    assert run([*again, "--allow_change", "learning_rate,weight_decay"]) == 0
    assert "missing keys" not in caplog.text  # of tied weights
    assert "learning rate of step 4: 0.0015 in the checkpoint, 0.003 now" in caplog.text
    assert rates(tmp_path / "run")[3:] == pytest.approx([0.003, 0.002, 0.001])
    assert read_lines(tmp_path / "run/findings.jsonl") == []


def test_a_longer_run_says_how_the_rate_jumps(write_config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_config(eval_strategy="no", eval_steps=None)
    assert run(["train", path, "--max_steps", "4"]) == 0
    again = ["--max_steps", "8", "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-3"), "--save_steps", "2"]
    assert run(["train", path, *again]) == 0
    assert "learning rate of step 4: 0.00075 in the checkpoint, 0.001875 now" in caplog.text
    assert "changed since checkpoint-3 (free)" in caplog.text and "max_steps: checkpoint 4, config 8" in caplog.text
    assert "save_steps: checkpoint 3, config 2" in caplog.text
    assert rates(tmp_path / "run")[3] == pytest.approx(0.001875)
    assert read_lines(tmp_path / "run/findings.jsonl") == []


def test_another_stream_can_be_allowed_by_name(write_config, tmp_path):
    path = write_config(eval_strategy="no", eval_steps=None)
    assert run(["train", path]) == 0
    checkpoint = str(tmp_path / "run/checkpoint-3")
    words = ["--resume_from_checkpoint", checkpoint, "--train_seed", "7", "--allow_change", "train_seed"]
    run_of = assemble(parse_config(path, [*words, "--use_cpu", "true"]), tmp_path / "run")
    assert run_of.data.loader.position["rows"] == 12


def test_a_model_of_another_size_is_never_resumed(write_config, tmp_path, tiny_config, capsys):
    path = write_config(eval_strategy="no", eval_steps=None)
    assert run(["train", path]) == 0
    (tmp_path / "model.json").write_text(json.dumps({**tiny_config, "intermediate_size": 32}))
    assert run(["train", path, "--resume_from_checkpoint", "latest", "--allow_change", "model"]) == 2
    assert "model.parameters: checkpoint 26816" in capsys.readouterr().err
