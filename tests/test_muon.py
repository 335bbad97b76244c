"""`optim: muon`: the update against torch's, which parameters it is for, skipped steps, resume, ranks, refusals."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from recipe import muon as recipe_muon
from recipe.__main__ import run
from recipe.arguments import ConfigError, parse_config
from recipe.errors import UserError
from recipe.guards import RegressionCallback
from recipe.guards.records import read_lines
from recipe.memory import optimizer_bytes
from recipe.muon import Muon, group_parameters, make_muon, orthogonalize
from tests.forked_ranks import run_jobs

SETTINGS = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
# Relative, in Frobenius norm, to torch's iteration in bf16. Measured: 0.012 to 0.016 for fp32 and bf16 alike, where no
# singular value is near zero. Those directions hold nothing but bf16's rounding, in torch's as well.
TOLERANCE = 0.03


def make_model(**keys) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, **keys))


def make_optimizer(model, lr=1e-2, **keys) -> Muon:
    decayed = [name for name, p in model.named_parameters() if p.dim() > 1]
    return Muon(group_parameters(model, decayed, **SETTINGS), lr=lr, **keys)


def fill_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def same_bits(model, other) -> bool:
    return all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("shape", [(16, 16), (8, 48), (48, 8), (64, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_the_iteration_is_torchs(shape, dtype, scale):
    torch.manual_seed(0)
    gradient = scale * torch.randn(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    found = 0.2 * max(shape) ** 0.5 * orthogonalize(gradient[None], dtype)[0]
    assert (found + weight.data).norm() <= TOLERANCE * weight.data.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_gradient_of_low_rank_the_part_that_is_there_is_torchs(dtype):
    torch.manual_seed(0)
    gradient = torch.randn(24, 2) @ torch.randn(2, 40)
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, weight_decay=0.0).step()
    found = orthogonalize(gradient[None], dtype)[0]
    assert ((found + weight.data) @ gradient.T).norm() <= TOLERANCE * (weight.data @ gradient.T).norm()


@pytest.mark.parametrize("kind", ["full rank", "rank 2", "rows of very different size", "one row twice", "nothing"])
def test_wide_matrices_are_iterated_on_their_gram_matrix(kind):
    """In fp32, which suffices: as the plain iteration in float64 within 1e-3, twelve-fold rounding in five steps."""
    torch.manual_seed(0)
    matrices = torch.randn(3, 64, 192)
    if kind == "rank 2":
        matrices = torch.randn(3, 64, 2) @ torch.randn(3, 2, 192)
    elif kind == "rows of very different size":
        matrices *= torch.logspace(0, -5, 64)[:, None]
    elif kind == "one row twice":
        matrices[:, 1] = matrices[:, 0]
    elif kind == "nothing":
        matrices.zero_()
    x = matrices.double() / torch.linalg.matrix_norm(matrices.double(), keepdim=True).clamp_min(recipe_muon.EPSILON)
    expected, found = recipe_muon._iterate(x), orthogonalize(matrices, torch.float32)
    if kind == "rank 2":  # what is in the other directions is rounding, in either
        rows = matrices.double().mT @ torch.linalg.pinv(matrices.double().mT, rtol=1e-5)
        expected, found = expected @ rows, found.double() @ rows
    assert torch.linalg.matrix_norm(found - expected).max() <= 1e-3 * 64**0.5
    assert torch.equal(orthogonalize(matrices.mT, torch.float32), orthogonalize(matrices, torch.float32).mT)


def test_several_matrices_at_once_are_as_one_by_one():
    matrices = torch.randn(5, 12, 20)
    torch.testing.assert_close(
        orthogonalize(matrices, torch.float32)[3:4], orthogonalize(matrices[3:4], torch.float32)
    )


def test_steps_are_those_of_torchs_muon_and_adamw(monkeypatch):
    monkeypatch.setattr(recipe_muon, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(recipe_muon, "AT_ONCE", 3)  # the four equal matrices in two parts
    model = make_model(tie_word_embeddings=False)
    other, optimizer = copy.deepcopy(model), make_optimizer(model)
    start = copy.deepcopy(model)
    hidden = [p for name, p in other.named_parameters() if "proj" in name]
    outer = [p for name, p in other.named_parameters() if "embed" in name or "lm_head" in name]
    norms = [p for name, p in other.named_parameters() if "norm" in name]
    adamw = [{"params": outer, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    theirs = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=1e-2, betas=(0.9, 0.95), fused=True),
    ]
    for seed in range(3):
        for each in (model, other):
            fill_gradients(each, seed)
        optimizer.step()
        for each in theirs:
            each.step()
    for (name, ours), wanted, before in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        limit = TOLERANCE if "proj" in name else 0
        assert (ours - wanted).norm() <= limit * (wanted - before).norm(), name


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_head_and_norms_are_adamws(is_tied):
    model = make_model(tie_word_embeddings=is_tied)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, *others = make_optimizer(model).param_groups
    assert all("proj" in names[id(p)] for p in matrices["params"]) and len(matrices["params"]) == 14
    assert [group["weight_decay"] for group in others] == [0.1, 0.0]
    kept = {names[id(p)] for group in others for p in group["params"]}
    assert kept == {name for name in names.values() if "proj" not in name}


def test_the_state_is_as_large_as_plan_says():
    model = make_model()
    optimizer = make_optimizer(model)
    fill_gradients(model, 0)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(4 * value.numel() for value in states) == optimizer_bytes(model, "muon")


def test_a_step_that_is_not_finite_changes_nothing():
    model = make_model()
    optimizer = make_optimizer(model)
    for seed, bad in ((0, False), (1, True), (2, False)):
        before, states = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
        fill_gradients(model, seed)
        if bad:
            for parameter in model.parameters():
                parameter.grad[0] = torch.nan
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        assert same_bits(model, before) is bad
    now = optimizer.state_dict()["state"]
    assert bad or not all(torch.equal(now[i][name], states[i][name]) for i in states for name in states[i])
    assert all(value.isfinite().all() for state in now.values() for value in state.values())


def test_restored_state_continues_with_the_same_bits():
    model = make_model()
    optimizer = make_optimizer(model)
    for seed in range(2):
        fill_gradients(model, seed)
        optimizer.step()
    copied = copy.deepcopy(model)
    restored = make_optimizer(copied, lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, steps in ((model, optimizer), (copied, restored)):
        fill_gradients(each, 9)
        steps.step()
    assert same_bits(model, copied)


def test_ranks_share_the_work_and_end_with_the_same_bits(monkeypatch):
    """Each of three ranks computes its share; a stand-in for the collective puts the shares together."""
    matrices, shares = torch.randn(4, 6, 10), {}
    for rank in range(3):
        optimizer = make_optimizer(make_model(), world_size=3)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            torch.distributed, "all_gather", lambda parts, own, rank=rank: shares.update({rank: own.clone()})
        )
        optimizer._orthogonalize(matrices)
    monkeypatch.setattr(
        torch.distributed,
        "all_gather",
        lambda parts, own: [part.copy_(shares[rank]) for rank, part in enumerate(parts)],
    )
    torch.testing.assert_close(optimizer._orthogonalize(matrices), orthogonalize(matrices), rtol=0.02, atol=0.02)


def test_models_that_it_does_not_suit_are_refused():
    empty = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=0, n_head=1))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no hidden matrix"):
        make_optimizer(empty)
    adapted = make_model()
    adapted.peft_config = {"default": None}
    with pytest.raises(UserError, match="adapter"):
        make_optimizer(adapted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fsdp", "full_shard"),
        *(("optim_args", f"{each}") for each in ("momentum=0.9", "embedding_lr_ratio", "embedding_lr_ratio=0")),
        *(("optim_args", f"embedding_lr_ratio={each}") for each in ("nan", "inf", "-1", "2,momentum=0.9", "two")),
    ],
)
def test_settings_that_it_does_not_suit_are_refused(tmp_path, key, value):
    words = ["--optim", "muon", f"--{key}", value, "--use_cpu", "true"]
    with pytest.raises(ConfigError, match="muon"):
        parse_config("recipe/configs/cpu_demo.json", words)


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_rate_of_embeddings_and_head_is_a_multiple(is_tied):
    model = make_model(tie_word_embeddings=is_tied)
    decayed = [name for name, p in model.named_parameters() if p.dim() > 1]
    optimizer = Muon(group_parameters(model, decayed, **SETTINGS, embedding_lr=3e-2), lr=1e-2)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters()}
    assert {name for name, rate in rates.items() if rate == 3e-2} == {
        "model.embed_tokens.weight",
        *([] if is_tied else ["lm_head.weight"]),
    }
    assert set(rates.values()) == {1e-2, 3e-2}
    fill_gradients(model, 1)
    before = model.get_input_embeddings().weight.clone()
    optimizer.step()
    moved = model.get_input_embeddings().weight - before
    fill_gradients(other := make_model(tie_word_embeddings=is_tied), 1)
    make_optimizer(other, lr=3e-2).step()
    torch.testing.assert_close(moved, other.get_input_embeddings().weight - before)


def test_other_optimizers_do_not_ignore_its_argument(tmp_path):
    with pytest.raises(ConfigError, match="optim_args: is muon's, and sgd does not read it; --optim_args ''"):
        parse_config("recipe/configs/cpu_demo.json", ["--optim", "sgd", "--use_cpu", "true"])
    parse_config("recipe/configs/cpu_demo.json", ["--optim", "sgd", "--optim_args", "", "--use_cpu", "true"])
    with pytest.raises(ConfigError, match="optim_target_modules: is read by galore and apollo, and muon ignores it"):
        parse_config("recipe/configs/cpu_demo.json", ["--optim_target_modules", "all-linear", "--use_cpu", "true"])
    with pytest.raises(ConfigError, match="did you mean --optim_args embedding_lr_ratio=2"):
        parse_config("recipe/configs/cpu_demo.json", ["--embedding_lr_ratio", "2"])


# --- whole runs


def train(path: str, out, *words) -> list[float]:
    assert run(["train", path, "--output_dir", str(out), "--use_cpu", "true", *words]) == 0
    return [record["loss"] for record in read_lines(out / "steps.jsonl")]


@pytest.mark.parametrize("optim_args", [None, "embedding_lr_ratio=2"])
def test_a_resumed_run_has_the_same_bits_and_keeps_its_optimizer(write_config, tmp_path, capsys, optim_args):
    path = write_config(optim="muon", optim_args=optim_args, eval_strategy="no", eval_steps=None)
    whole = train(path, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "parted/checkpoint-3")
    parted = train(path, tmp_path / "parted", "--resume_from_checkpoint", str(tmp_path / "parted/checkpoint-3"))
    assert parted[-3:] == whole[-3:]
    final = [load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "parted")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    assert not [f for f in read_lines(tmp_path / "parted/findings.jsonl") if f["severity"] != "info"]
    words = ["--resume_from_checkpoint", "latest", "--optim", "adamw_torch_fused", "--allow_change", "optim"]
    words += ["--optim_args", ""]
    assert run(["train", path, "--output_dir", str(tmp_path / "whole"), "--use_cpu", "true", *words]) == 2
    assert "optim: checkpoint muon, config adamw_torch_fused" in capsys.readouterr().err


def test_a_rate_of_embeddings_that_changes_at_a_resume_is_said(write_config, tmp_path, caplog):
    path = write_config(optim="muon", optim_args="embedding_lr_ratio=2", eval_strategy="no", eval_steps=None)
    train(path, tmp_path / "run")
    checkpoint = str(tmp_path / "run/checkpoint-3")
    words = ["--resume_from_checkpoint", checkpoint, "--allow_change", "optim_args"]
    train(path, tmp_path / "run", *words, "--optim_args", "embedding_lr_ratio=4")
    said = [record for record in caplog.records if record.msg.startswith("learning rate of step")]
    assert [record.args[0] for record in said] == [4]
    assert said[0].args[2] == pytest.approx(2 * said[0].args[1])


@pytest.mark.slow
def test_two_ranks_are_the_same_run_as_one(write_config, tmp_path):
    path = write_config(optim="muon", eval_strategy="no", eval_steps=None)
    one = train(path, tmp_path / "one")
    words = ["--output_dir", str(tmp_path / "two"), "--use_cpu", "true", "--per_device_train_batch_size", "2"]
    assert run_jobs([{"words": [path, *words], "ranks": 2, "log": str(tmp_path / "log")}]) == [[0, 0]]
    two = [record["loss"] for record in read_lines(tmp_path / "two/steps.jsonl")]
    assert two == pytest.approx(one, abs=2e-3)  # a bf16 iteration rounds gradients of another last bit to 2**-8


def test_in_a_trainer_of_ones_own(tmp_path):
    """As docs/how_to.md has it; groups that nobody has divided are refused at once."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    ids = torch.randint(0, 32, (32, 8), generator=torch.Generator().manual_seed(0))
    settings = dict(max_steps=3, learning_rate=3e-3, optim_args="embedding_lr_ratio=2", use_cpu=True, report_to=[])
    arguments = TrainingArguments(str(tmp_path), **settings, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.optimizer = make_muon(model, trainer)
    guards = RegressionCallback()
    trainer.add_callback(guards)
    trainer.train()
    assert guards.failure is None and [f.id for f in guards.findings if f.severity != "info"] == []
    with pytest.raises(ValueError, match="make_muon"):
        Muon(model.parameters(), lr=1e-3)
