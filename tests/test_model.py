"""Models from JSON, the flagship's numbers, and what the hardware decides."""

import itertools
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments, masking_utils
from transformers import modeling_flash_attention_utils as flash
from transformers.masking_utils import create_causal_mask

from recipe import model as model_module
from recipe.data.collator import DataCollatorForPackedRows
from recipe.data.fitting import HOLD_OUT_DOCUMENTS, HOLD_OUT_START
from recipe.data.packing import LaneState, Row
from recipe.errors import UserError
from recipe.keys import model_keys
from recipe.model import agree_on_tf32, build_model, check_fit, count_flops_per_token, load_model_config
from recipe.resolve import resolve
from recipe.trainer import SampleCallback

CONFIGS = Path(model_module.__file__).parent / "configs"


def count_parameters(name: str) -> int:
    with torch.device("meta"):
        return LlamaForCausalLM(load_model_config(str(CONFIGS / name))).num_parameters()


def test_the_flagship_has_180m_parameters_and_the_original_batch():
    assert count_parameters("llama_180m_model.json") == pytest.approx(180e6, rel=0.01)
    config = load_model_config(str(CONFIGS / "llama_180m_model.json"))
    assert config.vocab_size == 32_000 and config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    values = json.loads((CONFIGS / "llama_180m.json").read_text())
    assert values["block_size"] == 1024
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (4, 12)
    assert (values["train_skip"], values["train_seed"]) == (0, 42)
    assert values["eval_seed"] == 42 + 999 and "eval_skip" not in values
    assert (HOLD_OUT_START, HOLD_OUT_DOCUMENTS) == (100_000, 1000)


def test_the_flagship_is_judged_by_the_original_table():
    from recipe.guards.trajectory import find_reference

    facts = {
        "parameters": count_parameters("llama_180m_model.json"),
        "vocab_size": 32_000,
        "block_size": 1024,
        "tokens_per_step": 49_152,
        "is_new_model": True,
    }
    assert find_reference("auto", facts)[0].name == "original_180m"
    assert find_reference("auto", {**facts, "tokens_per_step": 8 * 49_152})[0] is None


def test_build_model_is_the_same_for_the_same_seed(tmp_path, tiny_config, tokenizer):
    (tmp_path / "model.json").write_text(json.dumps(tiny_config))
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(
            build_model(
                model_config=str(tmp_path / "model.json"), model_name_or_path=None, tokenizer=tokenizer, block_size=16
            )
        )
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert models[0].lm_head.weight.data_ptr() == models[0].model.embed_tokens.weight.data_ptr()
    assert models[0].dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_document_masking_isolates_documents(tiny_config, tokenizer, tmp_path, attention):
    """Trap 10 of the stack: only position_ids without an attention mask do it."""
    from recipe.data.collator import restarting_positions

    (tmp_path / "model.json").write_text(json.dumps(tiny_config))
    model = build_model(
        model_config=str(tmp_path / "model.json"),
        model_name_or_path=None,
        tokenizer=tokenizer,
        block_size=16,
        attn_implementation=attention,
    ).eval()
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    ids[0, 7] = 256
    other = ids.clone()
    other[0, :7] = (ids[0, :7] + 1) % 256
    with torch.no_grad():
        positions = restarting_positions(ids, 256)
        masked = [model(input_ids=x, position_ids=positions, use_cache=False).logits[0, 8:] for x in (ids, other)]
        unmasked = [model(input_ids=x, use_cache=False).logits[0, 8:] for x in (ids, other)]
    assert torch.equal(masked[0], masked[1])
    assert not torch.allclose(unmasked[0], unmasked[1]), "without masking the next document does see this one"


def attention_calls(model, **inputs) -> list[tuple]:
    """`(mask, is_causal)` of each attention in the graph that torch.compile makes of the model."""
    calls = []

    def note(graph, example_inputs):
        nodes = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        calls.extend((node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")) for node in nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=note)(**inputs, use_cache=False)
    return calls


def test_packed_rows_need_no_mask_when_compiled(tiny_config, tokenizer, tmp_path):
    """With a mask CUDA has no flash kernel. transformers' own `sdpa` makes one while torch.compile traces: when this
    fails for it, `causal_sdpa_mask` can go."""
    (tmp_path / "model.json").write_text(json.dumps(tiny_config))
    path = str(tmp_path / "model.json")
    model = build_model(model_config=path, model_name_or_path=None, tokenizer=tokenizer, block_size=16)
    ids = torch.arange(32).view(2, 16)
    assert attention_calls(model, input_ids=ids) == [(None, True)] * tiny_config["num_hidden_layers"]
    logits, mask = model(input_ids=ids, use_cache=False).logits, torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits, model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(padded, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    assert attention_calls(model, input_ids=ids)[0] != (None, True)


def test_documents_that_are_kept_apart_have_their_mask(tiny_config, tokenizer, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(tiny_config))
    arguments = {"model_config": str(tmp_path / "model.json"), "model_name_or_path": None, "tokenizer": tokenizer}
    model = build_model(**arguments, block_size=16, document_masking=True)
    assert model.config._attn_implementation == "sdpa"


def test_both_settings_of_tf32_agree():
    """transformers sets the newer one alone; torch.compile of torch 2.9 and 2.10 raises where the older differs."""
    try:
        for is_on in (True, False, True):
            torch.backends.fp32_precision = "tf32" if is_on else "ieee"
            agree_on_tf32()
            assert torch.backends.cuda.matmul.allow_tf32 is is_on
            assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if is_on else "ieee")
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = "none"


def packed_batch(flash_attention: bool) -> dict:
    """Two rows of three and two documents."""
    ids = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    ids[0, [4, 9]], ids[1, 11] = 256, 256
    rows = [Row(row, (), LaneState({"pass": 0})) for row in ids]
    batch = DataCollatorForPackedRows(256, document_masking=True, flash_attention=flash_attention)(rows)
    return {name: value for name, value in batch.items() if name != "labels"}


def test_documents_are_apart_for_flash_attention_too(tiny_model, monkeypatch):
    """Its varlen kernel needs a GPU, so a plain one stands in for it behind transformers' own call: what the kernel is
    told must isolate documents, with several rows in a batch, where transformers would not derive it by itself."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale=None, **kwargs):
        calls.append(cu_seqlens_q.tolist())
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and kwargs["max_seqlen_q"] >= 10
        pieces = []
        for first, stop in itertools.pairwise(cu_seqlens_q.tolist()):
            query, key, value = (x[first:stop].transpose(0, 1)[None] for x in (q, k, v))
            scores = {"is_causal": True, "enable_gqa": True, "scale": softmax_scale}
            pieces.append(F.scaled_dot_product_attention(query, key, value, **scores)[0].transpose(0, 1))
        return torch.cat(pieces)

    supported = defaultdict(bool, dropout_p=True, max_seqlen_q=True, max_seqlen_k=True)
    process = partial(flash._process_flash_attention_kwargs, supports_mapping=supported)
    kernels = (None, varlen, None, None, None), (process, process)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *arguments, **kwargs: kernels)
    model = tiny_model.eval()
    with torch.no_grad():
        expected = model(**packed_batch(flash_attention=False), use_cache=False).logits
        model.config._attn_implementation = "flash_attention_2"
        found = model(**packed_batch(flash_attention=True), use_cache=False).logits
    assert calls == [[0, 5, 10, 16, 28, 32]] * model.config.num_hidden_layers
    # fp32 sums in another order
    assert torch.allclose(found, expected, atol=1e-5)


def test_documents_are_apart_for_flex_attention_too(tiny_model, monkeypatch):
    """Flex has no backward on a CPU; the mask that it would be given is looked at. transformers compiles what makes
    it: half a minute, for the same mask."""
    make = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **keys: make(**{**keys, "_compile": False}))
    batch = packed_batch(flash_attention=False)
    model, positions = tiny_model, batch["position_ids"]
    model.config._attn_implementation = "flex_attention"
    embedded = model.get_input_embeddings()(batch["input_ids"])
    mask = create_causal_mask(model.config, embedded, None, None, positions).mask_mod
    documents = (positions == 0).cumsum(1)
    row, query, key = torch.meshgrid(torch.arange(2), torch.arange(16), torch.arange(16), indexing="ij")
    is_seen = (key <= query) & (documents[row, query] == documents[row, key])
    assert torch.equal(mask(row, torch.tensor(0), query, key), is_seen)


def test_flops_per_token(tiny_model):
    weights = tiny_model.num_parameters()
    assert count_flops_per_token(tiny_model, 64) == 6 * weights + 12 * 2 * 32 * 64


def test_the_loss_of_the_built_model_is_shifted_once(tiny_model):
    ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(0))
    output = tiny_model(input_ids=ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "model.json"),
        ("[1]", "not an object"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2'"),
        ('{"hidden_sise": 5}', "no key hidden_sise .did you mean hidden_size"),
        (
            '{"hidden_sise": 5, "is_llama": true}',
            "no key hidden_sise .did you mean hidden_size.., is_llama .remove it",
        ),
        ("{}", "holds no key; .* 6.7B"),
        ('{"attention_dropout": 2}', "attention_dropout must be from 0 to 1, got 2"),
        ('{"rms_norm_eps": -1}', "rms_norm_eps must be 0 or above, got -1"),
        ('{"hidden_size": 99, "num_attention_heads": 3}', "a head has 33 dimensions; they must be even"),
        ('{"rope_parameters": {"rope_type": "default", "rope_theta": null}}', "rope_theta must be a number above 0"),
        ('{"rope_theta": null}', "model.json: rope_theta must be above 0, got null"),
        ('{"rope_theta": -1}', "model.json: rope_theta must be above 0, got -1"),
        ('{"rope_scaling": "linear"}', 'rope_scaling: expected an object or null, got "linear"'),
        ('{"rope_scaling": {"rope_type": ["linear"]}}', "rope_scaling: rope_type: expected text, got a list"),
        ('{"torch_dtype": 5}', "torch_dtype: expected"),
        ('{"rope_scaling": {"rope_type": "linear", "factor": -2}}', "rope_scaling: factor must be a number above 0"),
        ('{"hidden_size": "64"}', 'model.json: hidden_size: expected .*, got "64": remove the quotes'),
        ('{"hidden_size": 64, "num_attention_heads": 5}', "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ('{"num_attention_heads": 4, "num_key_value_heads": 3}', "not a multiple of num_key_value_heads 3"),
        ('{"num_hidden_layers": 0}', "num_hidden_layers must be at least 1"),
        ('{"num_key_value_heads": 0}', "not a multiple of num_key_value_heads 0"),
        ('{"initializer_range": 2.0}', "initializer_range must be from 0 to 1, got 2.0"),
        ('{"hidden_size": 1.5}', "model.json: hidden_size: expected .*, got 1.5"),
        ('{"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}', "rope_type 'foo' .* one of default, linear"),
        ('{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}', "Missing required keys .*factor"),
        ('{"rope_parameters": {"rope_theta": "1e4"}}', 'rope_parameters: rope_theta: expected a number, got "1e4"'),
        ('{"rope_parameters": {"rope_theta": -1}}', "rope_theta must be a number above 0, got -1"),
        ('{"rope_parameters": {"theta": 1e4}}', "rope_type default has no theta, only rope_type, rope_theta"),
        ('{"hidden_act": "foo"}', "hidden_act 'foo' is unknown"),
    ],
)
def test_a_bad_model_json_is_one_message(tmp_path, content, message):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_model_config(str(tmp_path / "model.json"))


def test_comments_in_a_model_json(tmp_path, tiny_config):
    values = json.loads(json.dumps(tiny_config))
    config = load_model_config(write(tmp_path, {"_comment": "of whoever wrote it", **values}))
    assert not hasattr(config, "_comment") and config.hidden_size == tiny_config["hidden_size"]


def test_the_json_of_a_published_llama_is_read(tmp_path, tiny_config):
    """As transformers 4 wrote it, with a byte order mark, and numbers of the other kind."""
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    values = {**tiny_config, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "hidden_size": 32.0, "rms_norm_eps": 0}
    values["rope_scaling"] = {**scaling, "original_max_position_embeddings": 32}
    (tmp_path / "model.json").write_text(json.dumps(values), encoding="utf-8-sig")
    config = load_model_config(str(tmp_path / "model.json"))
    assert config.rope_parameters == {**values["rope_scaling"], "rope_theta": 500000.0}
    assert type(config.hidden_size) is int and type(config.rms_norm_eps) is float


def test_a_model_that_cannot_be_made_is_one_message(tmp_path, tiny_config, tokenizer):
    factors = {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    path = write(tmp_path, {**tiny_config, "rope_parameters": rope})
    with pytest.raises(UserError, match="model.json: no model can be made of it: "):
        build_model(model_config=path, model_name_or_path=None, tokenizer=tokenizer, block_size=16)


def test_the_keys_of_a_model_json_are_those_of_llama_config():
    """Read from its source, without importing it."""
    expected = {name: value for name, value in LlamaConfig().to_dict().items() if not name.startswith("_")}
    of_transformers_4 = {"rope_theta", "rope_scaling", "torch_dtype"}
    assert model_keys().keys() == expected.keys() | {"unk_token_id"} | of_transformers_4
    # `to_dict` has more than was declared where __post_init__ fills in what is None
    declared = {name: key.default for name, key in model_keys().items() if key.default is not None}
    assert declared == {name: expected[name] for name in declared}


def test_what_does_not_fit_is_refused(tmp_path, tiny_config, tokenizer):
    (tmp_path / "model.json").write_text(json.dumps({**tiny_config, "vocab_size": 200}))
    config = load_model_config(str(tmp_path / "model.json"))
    with pytest.raises(UserError, match=r"vocab_size 200 is smaller than the tokenizer's 257"):
        check_fit(config, tokenizer, 16, "model.json")
    with pytest.raises(UserError, match="max_position_embeddings 64"):
        check_fit(load_model_config(write(tmp_path, tiny_config)), tokenizer, 65, "model.json")


def write(tmp_path, values) -> str:
    (tmp_path / "model.json").write_text(json.dumps(values))
    return str(tmp_path / "model.json")


def test_a_pretrained_model_that_is_not_there(tokenizer, tmp_path):
    with pytest.raises(UserError, match="none': no such folder; name a folder"):
        build_model(model_config=None, model_name_or_path=str(tmp_path / "none"), tokenizer=tokenizer, block_size=16)


def test_hardware_defaults_on_a_cpu_and_on_an_ampere_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert model_module.hardware_defaults() == {"use_cpu": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert model_module.hardware_defaults() == {"bf16": True, "tf32": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert model_module.hardware_defaults()["tf32"] is False


@pytest.mark.parametrize(
    ("has_units", "hidden_size", "words", "is_bf16"),
    [
        (True, 384, [], True),
        (True, 384, ["--bf16", "false"], False),
        (True, 192, [], True),
        (True, 96, [], False),
        (False, 384, [], False),
    ],
)
def test_a_cpu_trains_in_bf16_where_that_pays(
    write_config, tmp_path, monkeypatch, has_units, hidden_size, words, is_bf16
):
    monkeypatch.setattr(model_module, "has_fast_bf16_cpu", lambda: has_units)
    path = write_config()
    shape = json.loads((tmp_path / "model.json").read_text()) | {"hidden_size": hidden_size}
    (tmp_path / "model.json").write_text(json.dumps(shape))
    assert resolve(path, ["--use_cpu", "true", *words]).training.bf16 is is_bf16


def test_no_compiler_is_said_in_words(monkeypatch):
    monkeypatch.setattr(model_module.shutil, "which", lambda name: None)
    assert "apt install g++" in model_module.why_not_compile()


def test_kernels_in_force_are_said_in_one_line(tiny_model, tmp_path):
    line = model_module.describe_kernels(tiny_model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert line == "attention sdpa | precision fp32 | eager | device cpu"


def test_a_sample_is_no_longer_than_learned_positions(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("recipe.trainer.words_of_sources", lambda *_: set())
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    callback = SampleCallback([list(range(12))], tokenizer, [], SimpleNamespace(tokens_seen=0))
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback.on_evaluate(SimpleNamespace(seed=0, output_dir=str(tmp_path)), state, None, model=model)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1
