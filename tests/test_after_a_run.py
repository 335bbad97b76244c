"""`generate`, `evaluate` and `compare` on trained runs, which they leave as they are."""

import csv
import gzip
import hashlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub.repocard_data import ModelCardData
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer

from recipe.__main__ import run
from recipe.compare import compare_runs, distinct_names
from recipe.data.packing import hash_of_tokenizer
from recipe.evaluate import estimate_ratio
from recipe.generate import Sampling, sample_tokens
from recipe.guards.records import read_lines
from recipe.next_steps import next_commands
from recipe.noise import compare_ends
from recipe.results import save_tokenizer
from recipe.trained import find_trained, load_model
from tests.conftest import document

TEXTS = [document(index) for index in range(1000, 1060)]


def hashes_of(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config, tokenizer_dir):
    """A folder with two runs, `slow` and `fast`, which differ in their learning rate. No test may change them."""
    root, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setattr("recipe.trainer.SAMPLE_TOKENS", 4)
    pq.write_table(pa.table({"text": [document(i) for i in range(300)]}), root / "data.parquet", row_group_size=10)
    (root / "model.json").write_text(json.dumps(tiny_config))
    values = {
        "model_config": str(root / "model.json"),
        "tokenizer": tokenizer_dir,
        "source": str(root / "data.parquet"),
        "block_size": 32,
        "max_steps": 6,
        "eval_skip": 250,
        "eval_documents": 40,
        "num_lanes": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
    }
    (root / "config.json").write_text(json.dumps(values))
    for name, rate in (("slow", "0.003"), ("fast", "0.01")):
        words = ["--output_dir", str(root / name), "--learning_rate", rate]
        assert run(["train", str(root / "config.json"), *words]) == 0
    patch.undo()
    before = hashes_of(root / "slow") | hashes_of(root / "fast")
    yield root
    assert hashes_of(root / "slow") | hashes_of(root / "fast") == before


@pytest.fixture
def fails(capsys):
    """Runs a command that the user got wrong; returns what it said, which is short."""

    def fail(*words) -> str:
        assert run([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.strip().splitlines()) <= 3 and "Traceback" not in err
        return err

    return fail


def answer(capsys, *words) -> dict:
    """The JSON that a command ends with."""
    assert run([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# Which model is meant.


def test_a_run_its_parts_and_any_model_folder_are_found(runs, tmp_path, caplog):
    slow = runs / "slow"
    assert find_trained(slow).folder == find_trained(slow / "final").folder == slow / "final"
    assert find_trained(slow / "checkpoint-3").folder == slow / "checkpoint-3"
    assert find_trained(slow / "final").arguments["block_size"] == 32
    shutil.copytree(slow / "final", tmp_path / "model")
    assert find_trained(tmp_path / "model").run_dir is None
    shutil.copytree(slow, tmp_path / "killed", ignore=shutil.ignore_patterns("final"))
    assert find_trained(tmp_path / "killed").folder.name == "checkpoint-6"
    assert "has no final model, since it did not finish: taking checkpoint-6" in caplog.text


def test_what_is_no_model_is_said(runs, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    for name in "abcdef":
        (tmp_path / "data" / f"{name}.txt").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    expected = "expected a run, its final/ or checkpoint-N, or a folder with config.json and model.safetensors"
    for path, found in (
        (runs / "data.parquet", "is a file"),
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "data", "holds a.txt, b.txt, c.txt, d.txt and 2 more"),
    ):
        assert f"error: {path}: {found}; {expected}" in fails("generate", path, "w1")
    assert "merge it first" in fails("evaluate", tmp_path / "adapter", "my.txt")


def test_a_damaged_model_is_refused_rather_than_filled_with_random_numbers(runs, tmp_path, fails):
    folder = tmp_path / "model"
    shutil.copytree(runs / "slow" / "final", folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights lack model.layers.1.mlp.down_proj.weight and 2 more" in fails("generate", folder, "w1")
    (folder / "model.safetensors").write_bytes(b"half")
    assert "the model cannot be loaded" in fails("generate", folder, "w1")
    broken = {name: value * math.nan for name, value in weights.items()}
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    assert "logits are not finite" in fails("generate", folder, "w1")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in it" in fails("generate", folder, "w1")


# generate


def test_generate_streams_what_the_seed_gives(runs, capsys):
    words = ["generate", str(runs / "slow"), "w1 w2", "--max_new_tokens", "8"]
    assert run([*words, "--num_samples", "2", "--seed", "7", "--temperature", "1.0", "--top_p", "0.9"]) == 0
    out = capsys.readouterr().out
    model, tokenizer = load_model(find_trained(runs / "slow"))
    prompt = tokenizer("w1 w2")["input_ids"]
    texts = []
    for seed in (7, 8):
        ids = sample_tokens(model, tokenizer, prompt, Sampling(8, 1.0, 0.9, seed))
        texts.append("w1 w2" + tokenizer.decode(ids, skip_special_tokens=True))
    assert out == f"--- sample 1 of 2, seed 7\n{texts[0]}\n--- sample 2 of 2, seed 8\n{texts[1]}\n"
    assert texts[0] != texts[1]


def test_generate_at_temperature_0_takes_the_most_likely_token(runs, capsys):
    found = answer(capsys, "generate", runs / "slow", "w1 w2", "--temperature", "0", "--max_new_tokens", "5")
    model, tokenizer = load_model(find_trained(runs / "slow"))
    ids = tokenizer("w1 w2")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (sample,) = found["samples"]
    assert "w1 w2" + sample["text"] == tokenizer.decode(ids, skip_special_tokens=True) and sample["num_tokens"] == 5


def test_generate_stays_within_what_the_model_was_trained_on(runs, capsys, fails, caplog):
    found = answer(capsys, "generate", runs / "slow", "w" * 30)  # 30 tokens of 32
    assert found["samples"][0]["num_tokens"] <= 2 and "2 new ones at most" in caplog.text
    assert "the prompt has 32 tokens, the model reads 32; shorten it" in fails("generate", runs / "slow", "w" * 32)


def test_generate_begins_a_document_without_a_prompt(runs, capsys):
    assert answer(capsys, "generate", runs / "slow", "", "--max_new_tokens", "3")["samples"][0]["num_tokens"] <= 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["--temperature", "-1"], "must be a number from 0 to 100, got -1"),
        (["--temperature", "hot"], "must be a number from 0 to 100, got hot"),
        (["--top_p", "0"], "must be a number from 1e-06 to 1, got 0"),
        (["--max_new_tokens", "0"], "must be a whole number from 1, got 0"),
        (["--seed", "1.5"], "must be a whole number from 0"),
        (["--temperature", "0", "--num_samples", "2"], "at temperature 0 all samples are the same"),
    ],
)
def test_generate_refuses_impossible_settings(runs, fails, words, said):
    assert said in fails("generate", runs / "slow", "w1", *words)


# evaluate


def test_evaluate_without_a_source_repeats_the_evaluation_of_the_run(runs, capsys):
    recorded = json.loads((runs / "slow" / "run.json").read_text())["result"]
    (found,) = answer(capsys, "evaluate", runs / "slow")["sources"]
    for name in ("loss", "perplexity", "bits_per_byte", "next_token_accuracy"):
        assert found[name]["value"] == pytest.approx(recorded[f"eval_{name}"], rel=1e-5)  # fp32 in another order
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert found["recorded_loss"] == recorded["eval_loss"]
    assert found["interval"]["over"] == "documents" and found["documents"] == found["interval"]["units"] == 40


def test_every_token_of_a_text_is_scored_once(runs, tmp_path, capsys):
    """By hand: 45 tokens are a block of 32 and one of 13; the first of each has no context and is not scored."""
    text = "The quick brown fox jumps over the lazy dog."
    (tmp_path / "text.txt").write_text(text)
    (found,) = answer(capsys, "evaluate", runs / "slow" / "final", tmp_path / "text.txt")["sources"]
    model, tokenizer = load_model(find_trained(runs / "slow"))
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    nats, right = [], []
    for block in (ids[:32], ids[32:]):
        with torch.no_grad():
            logits = model(block[None]).logits[0, :-1]
        nats += F.cross_entropy(logits, block[1:], reduction="none").tolist()
        right += (logits.argmax(-1) == block[1:]).tolist()
    assert found["tokens"] == len(nats) == len(ids) - 2
    assert found["loss"] == {"value": pytest.approx(np.mean(nats), rel=1e-5), "low": None, "high": None}
    assert found["perplexity"]["value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert found["bits_per_byte"]["value"] == pytest.approx(sum(nats) / math.log(2) / (len(text) - 2), rel=1e-5)
    assert found["next_token_accuracy"]["value"] == np.mean(right)


def test_all_formats_that_training_reads_give_the_same_numbers(runs, tmp_path, capsys):
    table = pa.table({"text": TEXTS})
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    pq.write_table(table, tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text(lines)
    (tmp_path / "data.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    paths = sorted(tmp_path.glob("data.*"))
    found = answer(capsys, "evaluate", runs / "slow", *paths)["sources"]
    assert [each["source"] for each in found] == [str(path) for path in paths] and len(paths) == 5
    for each in found:
        assert each["documents"] == 60 and each["interval"] == found[0]["interval"]
        # Each format is read in another order, so the blocks differ.
        assert each["loss"]["value"] == pytest.approx(found[0]["loss"]["value"], rel=0.02)


def test_the_table_says_what_a_reader_must_know(runs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text.")
    words = ["evaluate", str(runs / "slow"), str(tmp_path / "short.txt"), str(runs / "data.parquet")]
    assert run([*words, "--max_tokens", "640"]) == 0
    out = capsys.readouterr().out
    assert "blocks of 32 tokens" in out and re.search(r"short\.txt +1 +13 .* blocks: too few$", out, flags=re.M)
    assert f"{runs / 'data.parquet'}: training data of this model; its loss says nothing about new text" in out
    assert f"{runs / 'data.parquet'}: up to --max_tokens only" in out and "–" not in out
    assert re.search(r"data\.parquet +\d+ +620  \d\.\d{4} ± 0\.\d{4}", out)


def test_a_bad_source_costs_no_other_its_result(runs, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    words = ["evaluate", str(runs / "slow"), str(tmp_path / "empty.txt"), str(runs / "data.parquet"), "none.txt"]
    assert run(words) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["source", str(runs / "data.parquet")]
    assert "1 file without a single document" in lines[-2] and "no such file" in lines[-1]
    assert run([*words, "--json"]) == 2
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["sources"]
    assert ["error" in each for each in found] == [True, False, True]


def test_evaluate_refuses_what_it_cannot_score(runs, tmp_path, fails):
    shutil.copytree(runs / "slow" / "final", tmp_path / "model")
    assert "name a SOURCE to evaluate it on" in fails("evaluate", tmp_path / "model")
    assert "no such file" in fails("evaluate", runs / "slow", tmp_path / "none.txt")
    assert "block_size 999 is over" in fails("evaluate", runs / "slow", runs / "data.parquet", "--block_size", "999")


def test_an_interval_is_that_of_the_bootstrap():
    """Over documents of very different lengths, which a naive interval over tokens would ignore."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 400, size=200).astype(float)
    nats = tokens * rng.normal(4.0, 0.8, size=200)
    estimate = estimate_ratio(nats, tokens)
    drawn = rng.integers(0, 200, size=(4000, 200))
    low, high = np.percentile(nats[drawn].sum(axis=1) / tokens[drawn].sum(axis=1), [2.5, 97.5])
    assert estimate.value == nats.sum() / tokens.sum()
    assert estimate.high - estimate.low == pytest.approx(high - low, rel=0.05)
    assert estimate.low == pytest.approx(low, abs=0.01)


# Tasks of lm-evaluation-harness.

TASK = """
task: next_letter
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_a_local_task_is_scored_by_the_harness(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"question": f"w{i} w", "choices": ["1", "Z"], "answer": i % 2} for i in range(20)]
    (tmp_path / "task").mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (tmp_path / "task" / "next_letter.yaml").write_text(TASK.format(data=data))
    words = ["--tasks", "next_letter", "--include_path", tmp_path / "task"]
    found = answer(capsys, "evaluate", runs / "slow", *words)
    assert found["sources"] == []
    (score,) = found["tasks"]
    model, tokenizer = load_model(find_trained(runs / "slow"))
    right = 0
    for each in documents:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(each["question"])["input_ids"]])).logits[0, -1]
        one, letter = (float(logits[tokenizer(choice)["input_ids"][0]]) for choice in each["choices"])
        right += (letter > one) == each["answer"]
    assert score["metric"] == "acc" and score["value"] == right / 20 and score["examples"] == 20
    assert 0.0 <= score["standard_error"] < 0.2


def test_missing_harness_and_tasks_are_said(runs, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("recipe.harness.find_spec", lambda name: None)
    assert "not installed: pip install lm-eval" in fails("evaluate", runs / "slow", "--tasks", "hellaswag")
    monkeypatch.setattr("recipe.harness.find_spec", lambda name: "found")
    words = ["--tasks", "mine", "--include_path", tmp_path / "none"]
    assert "no such folder" in fails("evaluate", runs / "slow", *words)


# compare


def test_compare_names_settings_and_the_first_different_step(runs, tmp_path, capsys):
    page = tmp_path / "compare.html"
    assert run(["compare", str(runs / "slow"), str(runs / "fast" / "final"), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    slow, fast = (read_lines(runs / name / "steps.jsonl") for name in ("slow", "fast"))
    first = next(place for place, (a, b) in enumerate(zip(slow, fast, strict=True)) if a["loss"] != b["loss"])
    assert first == 1  # the first loss is of the same weights
    values = f"({slow[1]['loss']:.9g} | {fast[1]['loss']:.9g})"
    assert f"loss at step 2 {values}" in out and "learning_rate at step 1 (0.003 | 0.01)" in out
    assert "\nlearning_rate: 0.003 | 0.01\n" in out and "output_dir" not in out
    assert "the ends are not compared: fewer than 20 steps in the last 20% of the common tokens" in out
    html = page.read_text()
    assert "learning_rate" in html and "run1" in html and str(runs) not in html


def test_a_copy_of_a_run_is_the_same_bit_for_bit(runs, tmp_path, capsys):
    shutil.copytree(runs / "slow", tmp_path / "copy", ignore=shutil.ignore_patterns("final", "checkpoint-*"))
    words = ["compare", runs / "slow", tmp_path / "copy", "--out", tmp_path / "c.html"]
    found = answer(capsys, *words)
    (against,) = found["against_first"]
    assert against["parting"] == {"common_steps": 6, "differences": {}} and found["settings"] == {}
    assert against["end"] is None and "differ in nothing but their seeds" in against["not_judged"]


def test_compare_refuses_what_it_cannot_compare(runs, tmp_path, fails):
    slow, out = runs / "slow", ["--out", tmp_path / "c.html"]
    assert "the same run as" in fails("compare", slow, slow / "final", *out)
    assert "compare takes 2 to 8 runs, got 1" in fails("compare", slow, *out)
    assert "is empty; expected a run" in fails("compare", slow, tmp_path, *out)
    assert "no such folder; expected a run" in fails("compare", slow, tmp_path / "none", *out)
    assert "runs stay as they are" in fails("compare", slow, runs / "fast", "--out", slow / "c.html")
    assert "no such folder; name a file" in fails("compare", slow, runs / "fast", "--out", tmp_path / "no/c.html")


def write_run(folder: Path, losses, arguments=(), verdict="healthy", content_hash="feed", evals=()) -> Path:
    folder.mkdir(parents=True)
    known = {"seed": 1, "train_seed": 1, "block_size": 32, "tokenizer": "t", **dict(arguments)}
    info = {"arguments": known, "source": {"content_hash": content_hash}, "result": {"verdict": verdict}}
    (folder / "run.json").write_text(json.dumps({**info, "finished": "2026-01-05"}))
    steps = ({"step": i, "tokens_seen": 32 * i, "loss": float(loss)} for i, loss in enumerate(losses, start=1))
    (folder / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "findings.jsonl").touch()
    records = [{"step": len(losses), "tokens_seen": 32 * len(losses), "eval_loss": loss} for loss in evals]
    (folder / "evals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_the_end_is_held_to_the_noise_of_the_batches(tmp_path):
    rng = np.random.default_rng(0)
    shared = 4.0 + rng.normal(0, 0.3, size=200)  # hard and easy batches, the same in all runs
    own = [rng.normal(0, 0.01, size=200) for _ in range(3)]
    runs = [
        write_run(tmp_path / "base", shared + own[0]),
        write_run(tmp_path / "better", shared + own[1] - 0.05, {"learning_rate": 2}),
        write_run(tmp_path / "equal", shared + own[2], {"learning_rate": 3}),
        write_run(tmp_path / "other", shared - 1, {"learning_rate": 4}, content_hash="beef"),
        write_run(tmp_path / "stock", shared, {"learning_rate": 5}, content_hash=None),
    ]
    better, equal, other, stock = compare_runs(runs).result["against_first"]
    gaps = (own[1] - own[0] - 0.05)[160:]
    assert better["end"]["difference"] == pytest.approx(gaps.mean()) and better["end"]["is_more_than_noise"]
    assert better["end"]["noise"] < 0.01 and "the same batches in both" in better["end"]["measured_by"]
    assert better["end"]["what"] == "train loss of the last 40 common steps"
    assert not equal["end"]["is_more_than_noise"]
    assert other["end"] is None and other["not_judged"] == "they were trained on different text"
    assert stock["not_judged"] == "the text that one of them was trained on is not recorded"


def test_curves_with_the_same_end_are_within_the_noise_nineteen_times_in_twenty():
    rng, tokens = np.random.default_rng(0), 32.0 * np.arange(1, 201)
    found = 0
    for _ in range(400):
        pair = [{"tokens_seen": tokens, "loss": 4 + rng.normal(0, 0.1, size=200)} for _ in range(2)]
        found += compare_ends(*pair, same_batches=True).is_more_than_noise
    assert 0.02 < found / 400 < 0.08


def test_the_end_is_held_to_the_noise_of_seeds_where_runs_show_it(tmp_path):
    ends = {
        "a1": (4.00, 1, 0.1),
        "a2": (4.04, 2, 0.1),
        "b1": (3.99, 1, 0.2),
        "b2": (4.01, 2, 0.2),
        "b3": (4.03, 3, 0.2),
    }
    runs = [
        write_run(tmp_path / name, [4.0] * 30, {"seed": seed, "learning_rate": rate}, evals=[loss])
        for name, (loss, seed, rate) in ends.items()
    ]
    same, *others = compare_runs(runs).result["against_first"]
    assert same["end"] is None and "their gap of +0.0400 nats comes from the seeds" in same["not_judged"]
    deviation = math.sqrt((2 * 0.02**2 + 2 * 0.02**2) / 3)
    for other in others:
        assert other["end"]["difference"] == pytest.approx(4.01 - 4.02)
        assert other["end"]["noise"] == pytest.approx(3.18 * deviation * math.sqrt(1 / 2 + 1 / 3))
        assert other["end"]["what"] == "eval loss, runs with these settings: 3 against 2"
        assert other["end"]["of_seeds"] and not other["end"]["is_more_than_noise"]


def test_runs_of_one_name_are_told_apart_without_the_path(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert distinct_names(folders) == ["x/run", "y/run"]


# What a run prints, and its card.


def test_the_printed_commands_work_from_where_the_user_stands(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    commands = next_commands(Path("slow"))
    assert [shlex.split(command)[-3:-1] for command in commands[:1]] == [["generate", "slow"]]
    assert str(runs) not in "".join(commands) and len(commands) == 3
    monkeypatch.chdir(tmp_path)
    for command in next_commands(runs / "slow"):
        words = shlex.split(command)
        name = next(place for place, word in enumerate(words) if word in ("generate", "evaluate", "compare"))
        assert run(words[name:]) == 0
    assert (tmp_path / "compare.html").exists()
    capsys.readouterr()


def test_a_run_on_another_text_is_not_proposed_for_comparing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("mine", "a"), ("before", "a"), ("other", "b")):
        write_run(tmp_path / name, [4.0], content_hash=text)
    assert next_commands(Path("mine"))[-1].endswith(" compare before mine")


def test_a_path_with_spaces_is_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = write_run(tmp_path / "my run", [4.0])
    assert next_commands(run_dir)[1].endswith(" evaluate 'my run'")


def test_the_tokenizer_keeps_what_other_programs_need(tmp_path):
    """llama.cpp's converter: without either, it makes a model that tokenizes in another way, silently."""
    name = Path(__file__).parent.parent / "tokenizer" / "llama-4k"
    tokenizer = AutoTokenizer.from_pretrained(name)
    save_tokenizer(tokenizer, str(name), tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (name / "tokenizer.model").read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is False
    assert hash_of_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == hash_of_tokenizer(tokenizer)


def test_the_snippet_of_the_card_runs_and_its_metadata_is_valid(runs, monkeypatch, capsys):
    final = runs / "slow" / "final"
    text = (final / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    card = ModelCardData(**front, ignore_metadata_errors=False)
    assert card.library_name == "transformers" and card.pipeline_tag == "text-generation"
    assert card.to_dict() == front
    assert str(runs) not in text and not re.search(r"(?<![\w:/.<])/(home|tmp|root|work)\b", text)
    snippet = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in snippet.splitlines() if line and not line.startswith("from ")]) == 3
    monkeypatch.chdir(final)
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("The")
