"""`plan`: parameters, memory and what fits, without allocating."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from recipe import memory
from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.errors import UserError
from recipe.memory import (
    check_fits,
    count_parameters,
    evaluation_memory,
    meta_model,
    optimizer_bytes,
    step_memory,
    update_bytes,
)
from recipe.model import flops_per_token, read_model_config
from recipe.plan import (
    StepSizes,
    compiling_pays_on_cpu,
    extrapolate,
    format_plan,
    make_plan,
    matrix_rate,
    with_layers,
)

CONFIGS = Path(__file__).resolve().parent.parent / "recipe" / "configs"
DEMO = CONFIGS / "llama_3m_model.json"
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_by_part(is_tied):
    config = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": is_tied})
    parts = count_parameters(config)
    assert sum(parts.values()) == AutoModelForCausalLM.from_config(config).num_parameters()
    assert parts["embedding"] == 64 * 32
    assert parts.get("head", 0) == (0 if is_tied else 64 * 32)
    assert parts["MLP"] == 3 * 3 * 32 * 96
    assert parts["attention"] == 3 * (2 * 32 * 32 + 2 * 32 * 16)
    assert parts["norms and others"] == 7 * 32


def test_untied_embedding_takes_no_part_in_matrix_products():
    tied, untied = (LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": tied}) for tied in (True, False))
    counts = [sum(count_parameters(config).values()) for config in (tied, untied)]
    assert (
        flops_per_token(tied, counts[0], 16)
        == flops_per_token(untied, counts[1], 16)
        == 6 * counts[0] + 12 * 3 * 32 * 16
    )


@pytest.mark.parametrize("is_accumulating", [False, True])
@pytest.mark.parametrize("is_checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_grows_in_proportion_to_rows_and_layers(is_accumulating, is_checkpointing, precision):
    options = dict(
        block_size=64, is_accumulating=is_accumulating, is_checkpointing=is_checkpointing, precision=precision
    )
    whole = step_memory(TINY, rows=5, **options)
    at = {
        (layers, rows): step_memory(with_layers(TINY, layers), rows=rows, **options)
        for layers in (1, 2)
        for rows in (1, 2)
    }
    one, two = (extrapolate(at[1, rows], at[2, rows], 3) for rows in (1, 2))
    estimate = extrapolate(one, two, 5)
    assert estimate.peak == pytest.approx(whole.peak, rel=0.01)  # equal but for a few tensors of a row's size
    assert estimate.weights == whole.weights == 4 * sum(count_parameters(TINY).values())


def test_memory_knows_logits_gradients_and_optimizer():
    rows, block = 4, 32
    at = step_memory(TINY, rows=rows, block_size=block)
    assert at.logits == 4 * rows * block * TINY.vocab_size  # one chunk, whose gradient takes its place
    assert at.gradients == at.weights and at.optimizer == 2 * at.weights
    assert step_memory(TINY, rows=rows, block_size=block, optim="sgd").optimizer == 0
    accumulating = step_memory(TINY, rows=rows, block_size=block, is_accumulating=True)
    of_head = 4 * TINY.vocab_size * TINY.hidden_size  # that gradient and a copy are there at the peak in any case
    assert accumulating.peak - at.peak == pytest.approx(at.gradients - 2 * of_head, rel=0.02)


@pytest.mark.parametrize(
    ("optim", "num_bytes"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("stable_adamw", 8)]
)
def test_bytes_of_optimizer_states(optim, num_bytes):
    model = meta_model(TINY)
    assert optimizer_bytes(model, optim) == num_bytes * model.num_parameters()


def test_muon_keeps_one_number_for_each_weight_of_a_hidden_matrix():
    parts = count_parameters(TINY)
    hidden = parts["attention"] + parts["MLP"]
    assert optimizer_bytes(meta_model(TINY), "muon") == 8 * (sum(parts.values()) - hidden) + 4 * hidden


def test_model_that_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 23e9)
    big = LlamaConfig(hidden_size=8192, num_hidden_layers=40, intermediate_size=28672, num_attention_heads=64)
    with pytest.raises(UserError, match=r"39\.\dB parameters need \d{3} GB .* 23 GB are free on this cpu"):
        check_fits(big, "adamw_torch", torch.device("cpu"))
    check_fits(TINY, "adamw_torch", torch.device("cpu"))


def test_plan_of_a_shipped_config(monkeypatch):
    plan = make_plan(parse_config(CONFIGS / "cpu_demo.json", ["--use_cpu", "true"]))
    assert plan["parameters"]["total"] == 3_148_224
    assert plan["steps"] == 280 and plan["tokens"] == 573_440
    assert all(device["rows"] * device["accumulation"] == 8 for device in plan["devices"])
    assert plan["disk"]["kept"] == 2
    memory = plan["step_memory"]
    assert 8e6 < memory["logits"] < 9e6  # a chunk of them, whatever the rows
    # 296 and 314 MB were measured, once each: `python -m tests.benchmarks limits --only plan`
    assert memory["peak"] == pytest.approx(305e6, rel=0.15)
    json.dumps(plan)
    text = format_plan(plan)
    assert "3,148,224" in text and max(map(len, text.splitlines())) <= 120


@pytest.fixture(scope="module")
def demo() -> StepSizes:
    config = parse_config(CONFIGS / "cpu_demo.json", ["--use_cpu", "true"])
    return StepSizes(config, read_model_config(config.model.model_config, None), "bf16", "cpu")


def test_hours_are_of_all_ranks_and_only_one_prints(monkeypatch, capsys, demo):
    monkeypatch.setattr("recipe.plan.StepSizes", lambda *given: demo)
    monkeypatch.setattr("recipe.plan.matrix_rate", lambda device, precision: 1e11)
    words = [str(CONFIGS / "cpu_demo.json"), "--use_cpu", "true"]
    alone = make_plan(parse_config(words[0], words[1:]))
    monkeypatch.setattr("recipe.plan.num_ranks", lambda: 2)
    both = make_plan(parse_config(words[0], words[1:]))
    assert both["devices"][0]["hours"] == pytest.approx(alone["devices"][0]["hours"] / 2)
    assert "Hours: of one device" in format_plan(alone) and "Hours: of 2 devices, one a rank" in format_plan(both)
    monkeypatch.setenv("RANK", "1")
    assert run(["plan", *words]) == 0 and capsys.readouterr().out == ""


def test_a_gpu_has_chunks_of_its_own(demo):
    config = parse_config(CONFIGS / "cpu_demo.json", ["--use_cpu", "true"])
    model = read_model_config(config.model.model_config, None)
    on_gpu = StepSizes(config, model, "bf16", "cuda")
    assert on_gpu.step(8).logits == 4 * demo.step(8).logits  # 2,048 positions instead of 512


def test_an_evaluation_in_bf16_keeps_copies_of_all_layers(demo):
    config = parse_config(CONFIGS / "cpu_demo.json", ["--use_cpu", "true"])
    model = read_model_config(config.model.model_config, None)
    shared = {"block_size": 256, "precision": "bf16", "attention": "sdpa"}
    whole = evaluation_memory(model, rows=config.training.per_device_eval_batch_size, **shared)
    assert demo.evaluation == pytest.approx(whole, rel=1e-3)


def test_what_a_cpu_emulates_is_measured_shortly_and_said(monkeypatch, demo):
    sizes = []
    ones = torch.ones
    monkeypatch.setattr("recipe.plan.time.perf_counter", iter(range(100)).__next__)  # a second a product
    monkeypatch.setattr("recipe.plan.torch.ones", lambda *size, **given: sizes.append(size) or ones(*size, **given))
    assert matrix_rate(torch.device("cpu"), "bf16") == 2 * 256**3 and sizes == [(256, 256)]
    monkeypatch.undo()
    monkeypatch.setattr("recipe.plan.StepSizes", lambda *given: demo)
    monkeypatch.setattr("recipe.plan.has_fast_bf16_cpu", lambda: False)
    monkeypatch.setattr("recipe.plan.matrix_rate", lambda device, precision: 1e9)
    config = parse_config(CONFIGS / "cpu_demo.json", ["--use_cpu", "true", "--bf16", "true"])
    assert "emulates it: --bf16 false trains faster" in format_plan(make_plan(config))
    words = ["--use_cpu", "true", "--activation_checkpointing", "true"]
    text = format_plan(make_plan(parse_config(CONFIGS / "cpu_demo.json", words)))
    assert "emulates" not in text and "With activation_checkpointing malloc keeps more" in text


def test_rows_that_do_not_fit_are_divided(monkeypatch):
    monkeypatch.setattr("recipe.plan.free_memory", lambda device: 3.4e9)
    overrides = ["--use_cpu", "true", "--per_device_train_batch_size", "128", "--per_device_eval_batch_size", "8"]
    plan = make_plan(parse_config(CONFIGS / "cpu_demo.json", overrides))
    own, text = plan["devices"][0], " ".join(format_plan(plan).split())
    assert own["peak"] > 3.4e9 > own["memory"] - 1
    assert "3.4 GB are usable: per_device_train_batch_size 64, gradient_accumulation_steps 2 would do" in text
    assert own["rows"] == 64 and own["accumulation"] == 2
    monkeypatch.setattr("recipe.plan.free_memory", lambda device: 1e7)
    plan = make_plan(parse_config(CONFIGS / "cpu_demo.json", overrides))
    assert plan["devices"][0]["rows"] is None and "no micro-batch fits" in format_plan(plan)


@pytest.mark.parametrize(
    ("words", "missing", "pays"),
    [
        ([], None, False),
        (["--train_tokens", "1e13"], None, True),
        (["--train_tokens", "1e13"], "g++", False),
    ],
)
def test_a_long_run_on_a_cpu_is_compiled(monkeypatch, words, missing, pays):
    monkeypatch.setattr("recipe.plan.why_not_compile", lambda: missing)
    config = parse_config(str(CONFIGS / "cpu_demo.json"), words, {"use_cpu": True})
    assert compiling_pays_on_cpu(config, TINY) is pays


def test_the_update_of_muon_is_counted():
    model = meta_model(TINY)
    square, mlp = (4 + 2) * 4 * 32 * 32 * 6, (4 + 2 * 32 / 96) * 4 * 32 * 96 * 9  # two squares, three MLPs a layer
    assert update_bytes(model, "muon") == int(max(square, mlp)) and update_bytes(model, "adamw_torch") == 0
