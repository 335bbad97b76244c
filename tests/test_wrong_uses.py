"""What people get wrong: exit code 2, at most three lines, and the fix that the error proposes, applied, works."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from transformers.training_args import OptimizerNames

from conftest import document
from recipe import other_names
from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.checkpoints import MANIFEST
from recipe.config_checks import OPTIMIZERS, is_installed
from recipe.data.pipeline import build_data
from recipe.hub import why_unreachable
from recipe.keys import all_keys


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text("{}")
    return path


def text(path: Path) -> Path:
    path.write_text("\n<|endoftext|>\n".join(document(i) for i in range(300)))
    return path


# The words that fail (`d` is an empty folder), and what the configuration has once they are fixed.
WRONG = {
    "lr": (lambda d: "--lr 0.01", {"learning_rate": 0.01}),
    "batch_size": (lambda d: "--batch_size 2", {"per_device_train_batch_size": 2}),
    "global_batch_size": (lambda d: "--global_batch_size 12", {"gradient_accumulation_steps": 3}),
    "grad_accum": (lambda d: "--grad_accum 2", {"gradient_accumulation_steps": 2}),
    "epochs": (lambda d: f"--epochs 2 --source {text(d / 'a.txt')}", {"train_tokens": 36_000}),
    "num_train_epochs": (lambda d: f"--num_train_epochs=1 --source {text(d / 'a.txt')}", {"train_tokens": 18_000}),
    "seq_len": (lambda d: "--seq_len 16", {"block_size": 16}),
    "max_length": (lambda d: "--max-length 16", {"block_size": 16}),
    "context_length": (lambda d: "--context_length 16", {"block_size": 16}),
    "steps": (lambda d: "--steps 3", {"max_steps": 3}),
    "tokens": (lambda d: "--tokens 640", {"train_tokens": 640}),
    "warmup": (lambda d: "--warmup 2", {"warmup_steps": 2}),
    "warmup_ratio": (lambda d: "--warmup_ratio 0.25", {"warmup_steps": 0.25}),
    "warm-up longer than the run": (lambda d: "--warmup_steps 1000", {"warmup_steps": 0.1}),
    "wd": (lambda d: "--wd 0.1", {"weight_decay": 0.1}),
    "betas": (lambda d: "--betas [0.8,0.95]", {"adam_beta1": 0.8, "adam_beta2": 0.95}),
    "min_lr": (lambda d: "--min_lr 1e-5", {"lr_scheduler_kwargs": {"min_lr": 1e-5}}),
    "clip": (lambda d: "--grad_clip 0.5", {"max_grad_norm": 0.5}),
    "precision": (lambda d: "--precision fp32", {"bf16": False}),
    "device": (lambda d: "--device cpu", {"use_cpu": True}),
    "flash attention": (lambda d: "--use_flash_attention_2", {"attn_implementation": "auto"}),
    "optimizer": (lambda d: "--optimizer sgd", {"optim": "sgd"}),
    "bitsandbytes": (lambda d: "--optim adamw_bnb_8bit", {"optim": "adamw_torch"}),
    "galore": (lambda d: "--optim galore_adamw", {"optim": "adamw_torch"}),
    "apex": (lambda d: "--optim adamw_apex_fused", {"optim": "adamw_torch_fused"}),
    "schedule-free": (lambda d: "--optim schedule_free_adamw", {"optim": "adamw_torch"}),
    "liger": (lambda d: "--use_liger_kernel", {"use_liger_kernel": False}),
    "deepspeed": (lambda d: f"--deepspeed {folder(d / 'x', 'ds.json')}/ds.json", {"deepspeed": None}),
    "wandb": (lambda d: "--report_to wandb", {"report_to": []}),
    "no such checkpoint": (lambda d: f"--resume_from_checkpoint {d}/checkpoint-9", {"resume_from_checkpoint": None}),
    "resume true": (lambda d: "--resume_from_checkpoint true", {"resume_from_checkpoint": "latest"}),
    "resume": (lambda d: "--resume latest", {"resume_from_checkpoint": "latest"}),
    "resume from final": (
        lambda d: f"--resume_from_checkpoint {folder(d / 'final', 'config.json')}", {"model_config": None},
    ),
    "resume from a run": (
        lambda d: f"--resume_from_checkpoint {folder(d / 'r', f'checkpoint-20/{MANIFEST}')}",
        {"resume_from_checkpoint": "{d}/r/checkpoint-20"},
    ),
    "another checkpoint": (
        lambda d: f"--resume_from_checkpoint {folder(d / 'r', f'checkpoint-20/{MANIFEST}')}/checkpoint-30",
        {"resume_from_checkpoint": "{d}/r/checkpoint-20"},
    ),
    "dataset": (lambda d: "--dataset owner/name", {"source": "hf://owner/name"}),
    "owner/name": (lambda d: "--source owner/name", {"source": "hf://owner/name"}),
    "train_file": (lambda d: f"--train_file {text(d / 'a.txt')}", {"source": "{d}/a.txt"}),
    "a nearly right name": (lambda d: f"--source {text(d / 'a.txt').parent}/b.txt", {"source": "{d}/a.txt"}),
    "validation_file": (lambda d: "--validation_file a.txt", {}),
    "packing": (lambda d: "--packing true", {}),
    "hidden_size": (lambda d: "--hidden_size 64", {}),
    "num_gpus": (lambda d: "--num_gpus 2", {}),
    "model": (lambda d: f"--model {folder(d / 'm', 'config.json')}", {"model_name_or_path": "{d}/m"}),
    "model of a run": (
        lambda d: f"--model_name_or_path {folder(d / 'm', 'final/config.json')}",
        {"model_name_or_path": "{d}/m/final"},
    ),
    "tokenizer_name": (lambda d: "--tokenizer_name tokenizer/llama-4k", {}),
    "folder without a tokenizer": (lambda d: f"--tokenizer {folder(d / 't')}", {}),
    "folder of tokenizers": (
        lambda d: f"--tokenizer {folder(d / 't', 'a/tokenizer.json')}", {"tokenizer": "{d}/t/a"},
    ),
    "eval_every": (lambda d: "--eval_every 2", {"eval_steps": 2}),
    "save_every": (lambda d: "--save_every 2", {"save_steps": 2}),
    "epoch": (lambda d: "--save_strategy epoch", {"save_strategy": "steps"}),
    "evaluation_strategy": (lambda d: "--evaluation_strategy no", {"eval_strategy": "no"}),
    "gradient_checkpointing": (lambda d: "--gradient_checkpointing", {"activation_checkpointing": True}),
    "a typing error": (lambda d: "--learning_rat 0.1", {"learning_rate": 0.1}),
    "a typing error of another name": (lambda d: "--batchsize 2", {"per_device_train_batch_size": 2}),
    "lion": (lambda d: "--optimizer lion", {"optim": "adamw_torch"}),
    "adam": (lambda d: "--optim adam", {"optim": "adamw_torch"}),
    "AdamW": (lambda d: "--optimizer AdamW", {"optim": "adamw_torch"}),
    "fused": (lambda d: "--optimizer adamw-torch-fused", {"optim": "adamw_torch_fused"}),
    "cosine annealing": (lambda d: "--scheduler CosineAnnealing", {"lr_scheduler_type": "cosine"}),
    "a schedule": (lambda d: "--lr_scheduler_type constant_warmup", {"lr_scheduler_type": "constant_with_warmup"}),
    "fp8": (lambda d: "--fp8", {}),
    "8 bit": (lambda d: "--load_in_8bit true", {}),
    "a long block": (lambda d: "--block_size 100000", {"block_size": 64}),
}  # fmt: skip


def fixed(message: str, words: list[str]) -> list[str]:
    """The words as the error says that they should be."""
    [(key, problem)] = re.findall(r"^  --([\w-]+): (.*)$", message, re.M)
    place = next(
        i for i, word in enumerate(words) if word.split("=")[0].replace("-", "_") == f"__{key}".replace("-", "_")
    )
    has_value = place + 1 < len(words) and not words[place + 1].startswith("--") and "=" not in words[place]
    value, rest = words[place + 1 : place + 1 + has_value], words[:place] + words[place + 1 + has_value :]
    value = value or words[place].split("=")[1:]
    if found := re.search(r"did you mean (--.+?)(?: \(.*\))?\?|(--\w+ \S+) would do", problem):
        return [*rest, *shlex.split(found[1] or found[2])]
    if found := re.search(r"did you mean (\w+)\?|its name is now (\w+)", problem):
        return [*rest, f"--{found[1] or found[2]}", *value]
    if found := re.search(r"is not one of (\w+)", problem):
        return [*rest, f"--{key}", found[1]]
    assert "remove it" in problem, problem
    return rest


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_use_is_told_its_fix(case, write_config, tmp_path, capsys):
    wrong, expected = WRONG[case]
    own = folder(tmp_path / "own")
    words, path = shlex.split(wrong(own)), write_config()
    assert run(["train", path, *words]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and len(message.strip().splitlines()) <= 3
    assert max(map(len, message.splitlines())) < 400
    config = parse_config(path, fixed(message, words)).to_dict()
    for key, value in expected.items():
        assert config[key] == (value.replace("{d}", str(own)) if isinstance(value, str) else value)


# Cases whose fix is trained: what is read, made or built may still fail. `TOGETHER` are those that exclude no other.
TRAINED = ("epochs", "model", "model of a run", "folder of tokenizers", "AdamW", "a nearly right name", "a schedule")
TOGETHER = (
    "lr", "batch_size", "grad_accum", "seq_len", "steps", "warmup", "wd", "betas", "min_lr", "clip", "precision",
    "device", "flash attention", "fused", "liger", "wandb", "eval_every", "save_every", "gradient_checkpointing",
    "fp8", "train_file", "packing", "hidden_size", "num_gpus", "validation_file",
)  # fmt: skip


def fix_of(case, path, own, capsys) -> list[str]:
    words = shlex.split(WRONG[case][0](own))
    assert run(["train", path, *words]) == 2
    return fixed(capsys.readouterr().err, words)


def test_the_fixes_of_many_keys_train_together(write_config, tmp_path, capsys):
    path = write_config(save_strategy="no")
    words = [
        word
        for place, case in enumerate(TOGETHER)
        for word in fix_of(case, path, folder(tmp_path / str(place)), capsys)
    ]
    names = [word for word in words if word.startswith("--")]
    assert len(names) == len(set(names)) and len(names) > 20
    assert run(["train", path, *words]) == 0
    run_json = json.loads((tmp_path / "run/run.json").read_text())
    assert run_json["result"]["steps"] == 3 and run_json["arguments"]["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize("case", TRAINED)
def test_the_fix_of_a_source_model_or_tokenizer_trains(case, write_config, tmp_path, tiny_model, tokenizer, capsys):
    path, own = (
        write_config(max_steps=1, eval_strategy="no", eval_steps=None, num_lanes="auto"),
        folder(tmp_path / "own"),
    )
    words = fix_of(case, path, own, capsys)
    for holder in {config.parent for config in own.rglob("*.json")}:  # the cases have put in empty files
        tiny_model.save_pretrained(holder)
        tokenizer.save_pretrained(holder)
    large = ["--per_device_train_batch_size", "32"]
    assert run(["train", path, *words, *large]) == 0, words


@pytest.mark.parametrize("in_file", [{"lr": 0.01}, {"epochs": 2}, {"warmup_steps": 100}, {"dataset": "owner/name"}])
def test_wrong_keys_of_the_file_are_told_too(in_file, write_config, capsys):
    path = write_config(**in_file)
    assert run(["check", path]) == 2
    assert re.search(r"did you mean|would do", capsys.readouterr().err)


def test_a_step_is_told_in_rows_and_tokens(write_config, capsys):
    assert run(["train", write_config(gradient_accumulation_steps=3), "--batch_size", "5"]) == 2
    assert "5 x gradient_accumulation_steps 3 x 1 process = 15 rows, 480 tokens" in capsys.readouterr().err


def test_more_documents_held_out_than_there_are(write_config, capsys):
    path, words = write_config(eval_skip="auto", eval_documents="auto"), ["--eval_documents", "1000"]
    assert run(["train", path, *words]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 3
    fix = re.search(r"(--\w+ \S+(?: --\w+ \S+)*) would do", message)[1]
    build_data(parse_config(path, shlex.split(fix)))


def test_an_empty_folder_is_no_source(write_config, tmp_path, capsys):
    assert run(["train", write_config(), "--source", str(folder(tmp_path / "empty"))]) == 2
    assert re.search(r"--source: \S+empty: the folder has no data file", capsys.readouterr().err)
    assert run(["plan", write_config(), "--source", "/data/of/another/machine/*.parquet"]) == 0


def test_pushing_needs_a_login_and_the_hub(write_config, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert run(["train", write_config(), "--push_to_hub"]) == 2
    assert "not logged in; set HF_TOKEN" in capsys.readouterr().err
    assert run(["train", write_config(), "--push_to_hub", "--hub_token", "hf_x"]) == 2  # offline in tests
    message = capsys.readouterr().err
    assert "the hub cannot be reached" in message and "--push_to_hub false" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("name", "data"),
    [("my.txt", "some text\n"), ("a.jsonl", '{"text": "a"}\n'), ("a.json", '[{"text": "a"}]'), ("a.md", "# A"),
     ("b.json", '{"text": "a"}\n{"text": "b"}\n'), ("folder/a.txt", "text"), ("a.txt.gz", b"\x1f\x8b\x08\xff")],
)  # fmt: skip
def test_data_in_the_place_of_the_config(name, data, tmp_path, capsys):
    file = folder(tmp_path / "own", name) / name
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    place = file.parent if "/" in name else file
    assert run(["train", str(place)]) == 2
    assert f"is no configuration, but data; did you mean --source {place}?" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["docstrings", "hf://owner/name"])
def test_a_source_by_name_in_the_place_of_the_config(given, capsys):
    assert run(["train", given]) == 2
    assert f"did you mean --source {given}?" in capsys.readouterr().err


def test_options_of_the_commands_are_spelt_too(write_config, capsys):
    for wrong, right in {"--hlep": "--help", "--jsno": "--json"}.items():
        assert run(["train", write_config(), wrong]) == 2
        assert f"{wrong}: unknown key; did you mean {right}?" in capsys.readouterr().err
    assert run(["train", write_config(), "--help"]) == 0


def test_a_name_that_neither_the_disk_nor_the_hub_has(write_config, monkeypatch, capsys):
    """One question to the hub, without a repetition; then everything comes from the cache."""
    asked = []

    def ask(url, timeout):
        asked.append(url)
        raise ConnectionError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("recipe.hub.get_session", lambda: SimpleNamespace(head=ask))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    why_unreachable.cache_clear()
    path = write_config()
    for key, fix in {
        "tokenizer": "--tokenizer tokenizer/llama-32k would do",
        "model_name_or_path": "RUN/final",
    }.items():
        assert run(["train", path, f"--{key}", "nosuch/folder"]) == 2
        message = capsys.readouterr().err
        assert "no such folder, nor in the cache of the Hugging Face hub, which cannot be reached" in message
        assert fix in message and len(message.splitlines()) == 1
    assert run(["train", path, "--source", "hf://x/y"]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1 and len(asked) == 1 and constants.HF_HUB_OFFLINE
    why_unreachable.cache_clear()


def test_a_refused_start_leaves_no_folder_and_says_nothing_else(write_config, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.chdir(tmp_path)
    path, out = write_config(warmup_steps=5), ["--output_dir", "nothere", "--max_steps", "2"]
    (tmp_path / "empty.txt").write_text("")
    for words in ("--resume_from_checkpoint latest", "--source empty.txt", "--block_size 128"):
        assert run(["train", path, *out, *words.split()]) == 2
        assert not (tmp_path / "nothere").exists() and "WARNING" not in caplog.text
    (tmp_path / "nothere").mkdir()  # the user's own folder stays
    assert run(["train", path, *out, "--resume_from_checkpoint", "latest"]) == 2
    assert (tmp_path / "nothere/exit.json").exists()


# The tables


def test_other_names_are_not_keys_and_mean_keys():
    names = {*other_names.NAMES, *other_names.NOTHING, *other_names.EPOCHS, *other_names.GLOBAL_BATCH}
    assert names & all_keys().keys() == {"num_train_epochs"}
    assert set(other_names.NAMES.values()) <= all_keys().keys()
    assert not other_names.NAMES.keys() & other_names.NOTHING.keys()


def test_optimizers_of_packages_are_those_of_transformers():
    from transformers import trainer_optimizer as of_transformers

    native = {of_transformers._get_adafactor, of_transformers._get_adamw_torch, of_transformers._get_sgd}
    native |= {of_transformers._get_adagrad, of_transformers._get_rmsprop}
    for optimizer, handler in of_transformers._OPTIMIZER_HANDLERS.items():
        name = OptimizerNames(optimizer).value
        packages = [package for pattern, package in OPTIMIZERS if re.match(pattern, name)]
        assert bool(packages) == (handler not in native), name
    assert is_installed("torch") and not is_installed("no-such-package")
