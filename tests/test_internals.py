"""Each private name that the recipe needs is there and does what it is used for: a failure names the upgrade."""

import ast
import ctypes
import random
import re
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from tokenizers import Tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainingArguments

from recipe import internals

RECIPE = Path(internals.__file__).parent
# Of Python itself, methods that the recipe overrides or that are documented in spite of their name, and buffers and
# parameters of modules, which torch documents for `Module.__setattr__`.
DOCUMENTED = {"_getframe", "_exit", "_run_exitfuncs", "_save_checkpoint", "_replace", "_fields", "_asdict", "_C"}
DOCUMENTED |= {"_buffers", "_parameters", "_python_dispatch"}
DOCUMENTED |= {"_get_output_dir", "_finalize_training", "_get_grad_norm", "_load_optimizer_and_scheduler"}


def make_trainer(tiny_model, tmp_path, **arguments) -> Trainer:
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    values = dict(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, report_to=[])
    return Trainer(tiny_model, TrainingArguments(**{**values, **arguments}), train_dataset=rows)


def test_transformers_created_scheduler(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path)
    assert not internals.created_scheduler(trainer)
    trainer.train()
    assert internals.created_scheduler(trainer)


def test_transformers_causal_class_and_loss_function(tiny_model):
    assert internals.causal_class_of(tiny_model.config) is type(tiny_model)
    assert not internals.has_own_loss_function(tiny_model)
    tiny_model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    assert internals.has_own_loss_function(tiny_model)


def test_transformers_prepare_inputs(tiny_model, tmp_path):
    inputs = {"input_ids": torch.arange(4)[None], "nested": {"labels": torch.arange(4)[None]}}
    prepared = internals.prepare_inputs(make_trainer(tiny_model, tmp_path), inputs)
    assert torch.equal(prepared["nested"]["labels"], inputs["nested"]["labels"])


def test_transformers_load_weights(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    internals.load_weights(trainer, str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("is_seedable", [True, False])
def test_accelerate_samplers_of_a_loader(tiny_model, tmp_path, is_seedable):
    """The user's own is the last, at a resume too; whether it draws with replacement is known."""
    sampler = WeightedRandomSampler(torch.ones(4), 4)

    class Weighted(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler

    trainer = make_trainer(tiny_model, tmp_path, accelerator_config={"use_seedable_sampler": is_seedable})
    assert internals.samplers_of(trainer.get_train_dataloader())[-1].replacement is False
    trainer.__class__ = Weighted
    loader = trainer.get_train_dataloader()
    for each in (loader, skip_first_batches(loader, 1), DataLoader(range(4), sampler=sampler)):
        assert internals.samplers_of(each)[-1] is sampler and sampler.replacement
    assert internals.samplers_of(None) == internals.samplers_of([1]) == []


def test_transformers_saves_a_model_for_from_pretrained(tiny_model, tmp_path):
    """tests/test_ranks.py has sharded ones."""
    trainer = make_trainer(tiny_model, tmp_path)
    internals.save_whole_model(trainer, str(tmp_path / "final"))
    saved = type(tiny_model).from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in tiny_model.state_dict().items())


def test_transformers_saves_through_the_method_that_the_recipe_overrides(tiny_model, tmp_path):
    called = []

    class Saving(Trainer):
        def _save_checkpoint(self, model, trial):
            called.append(self.state.global_step)
            super()._save_checkpoint(model, trial)

    trainer = make_trainer(tiny_model, tmp_path, save_strategy="steps", save_steps=1)
    trainer.__class__ = Saving
    trainer.train()
    assert called == [1] and (tmp_path / "checkpoint-1").is_dir()


def test_transformers_reset_logged_loss(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, logging_steps=5)
    trainer.train()
    trainer._tr_loss.fill_(float("nan"))
    internals.reset_logged_loss(trainer)
    assert trainer._tr_loss.item() == 0.0


def test_torch_takes_found_inf_and_set_last_rates():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    assert internals.takes_found_inf(optimizer)
    assert not internals.takes_found_inf(torch.optim.AdamW([parameter], foreach=False))
    parameter.grad, optimizer.found_inf = torch.ones(2), torch.ones(())
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0] and optimizer.state[parameter]["step"] == 0
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    internals.set_last_rates(scheduler, [0.5])
    assert scheduler.get_last_lr() == [0.5]


def test_tokenizers_cache_no_texts(tokenizer):
    """The bundled tokenizers do not split texts into words."""

    class Mallinfo2(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("needs glibc 2.33 or newer")
    mallinfo2.restype = Mallinfo2

    def mebibytes_in_use() -> float:
        info = mallinfo2()
        return (info.uordblks + info.hblkhd) / 2**20

    def mebibytes_kept(backend) -> float:
        before = mebibytes_in_use()
        for _ in range(20):
            texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(100)]
            backend.encode_batch_fast(texts, add_special_tokens=False)
        return mebibytes_in_use() - before

    rng = random.Random(0)
    backends = [Tokenizer.from_file(str(RECIPE.parent / "tokenizer/llama-4k/tokenizer.json")) for _ in range(2)]
    internals.cache_no_texts(backends[0])
    mebibytes_kept(backends[0])  # what the first texts take stays
    assert mebibytes_kept(backends[0]) < 4 < mebibytes_kept(backends[1])  # 0 and 11 were seen


def test_transformers_attention_of(tiny_model):
    assert internals.attention_of(tiny_model) in ("sdpa", "eager")


def test_accelerate_original_forward(tiny_model, tmp_path):
    assert internals.original_forward(tiny_model) is None
    trainer = make_trainer(tiny_model, tmp_path, bf16=True)
    trainer.train()
    assert callable(internals.original_forward(trainer.model))


@pytest.mark.parametrize(
    ("capability", "has_avx512_bf16", "has_amx", "is_fast"),
    [
        ("AVX512", True, False, True),
        ("AVX512", False, True, True),
        ("AVX512", False, False, False),
        ("AVX2", True, False, False),  # held to it by ATEN_CPU_CAPABILITY
    ],
)
def test_torch_has_fast_bf16_cpu(monkeypatch, capability, has_avx512_bf16, has_amx, is_fast):
    assert internals.has_fast_bf16_cpu() in (True, False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert internals.has_fast_bf16_cpu() is is_fast


def test_torch_is_compiled_module():
    plain = torch.nn.Linear(2, 2)
    assert not internals.is_compiled_module(plain)
    assert internals.is_compiled_module(torch.compile(plain, backend="eager"))
    plain.compile(backend="eager")
    assert internals.is_compiled_module(plain)


def test_torch_forward_hooks():
    module = torch.nn.Linear(2, 2)
    assert internals.forward_hooks_of(module) == []
    hooks = [lambda *arguments: None for _ in range(2)]
    module.register_forward_hook(hooks[1])
    module.register_forward_pre_hook(hooks[0])
    assert internals.forward_hooks_of(module) == hooks


def test_torch_has_step_post_hooks():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert not internals.has_step_post_hooks(optimizer)
    optimizer.register_step_post_hook(lambda *arguments: None)
    assert internals.has_step_post_hooks(optimizer)


def test_torch_counts_graphs_and_breaks():
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    before = internals.count_graphs(), internals.count_graph_breaks()
    torch.compile(broken, backend="eager")(torch.zeros(3))
    assert internals.count_graphs() == before[0] + 2 and internals.count_graph_breaks() == before[1] + 1


def test_torch_is_grad_switch():
    switched = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if internals.is_grad_switch(func):
                switched.append(args[0])
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        pass
    assert switched == [False, True]


def test_private_names_are_used_there_only():
    """Attributes of other objects than the recipe's own, and of modules, that begin with an underscore."""
    found = []
    for path in sorted(RECIPE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        own = set(re.findall(r"(?:self|cls)\.(_\w+)|def (_\w+)|^    (_\w+)[:,]? ", source, flags=re.M))
        own = {name for names in own for name in names if name}
        for node in ast.walk(ast.parse(source)):
            is_private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
            if is_private and node.attr not in own | DOCUMENTED and path.name != "internals.py":
                found.append((path.relative_to(RECIPE).as_posix(), node.attr))
    assert found == []
