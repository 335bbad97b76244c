"""Attention, documents, positions and rows."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.gemma2 import modeling_gemma2

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "attention and positions"
ENGLISH = Setting()
EIGHT_LAYERS = Setting(sizes={"num_hidden_layers": 8})
DROPOUT = Setting(sizes={"attention_dropout": 0.1})
DOCUMENTS = Setting(rows="documents", vocabulary=4096, block=256, batch=4)
LONG = Setting(block=512, batch=2)
CAPPED = Setting(family="gemma2", sizes={"attn_logit_softcapping": 2.0}, steps=60)
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"factor": 8.0, "original_max_position_embeddings": 64}
SCALED = Setting(sizes={"rope_parameters": LLAMA_3}, steps=60)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
UNMASKED = {"is_causal": False, "attention_mask": None}


def change_input(run: Run, modules: Iterable[torch.nn.Module], change: Callable[[Any, dict], dict]) -> None:
    """`change` is given a module and the keywords that it is called with; returns those to replace."""

    def hook(module, args, kwargs):
        run.took_effect()
        return args, {**kwargs, **change(module, kwargs)}

    for module in modules:
        module.register_forward_pre_hook(hook, with_kwargs=True)


def change_output(run: Run, module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def hook(module, inputs, output):
        run.took_effect()
        return change(output)

    module.register_forward_hook(hook)


def attention_of(run: Run) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in run.model.model.layers]


def square(kwargs: dict) -> torch.Tensor:
    """Ones `[position, position]`, for a mask: True may be attended to."""
    length = kwargs["hidden_states"].shape[1]
    return torch.ones(length, length, dtype=torch.bool)


# --- the future


@bug("non_causal_attention", AREA, "no causal mask", "nanotron#303", ENGLISH)
def causal_mask_dropped(run: Run):
    """Every layer is called without a mask and without `is_causal`."""
    change_input(run, attention_of(run), lambda module, kwargs: UNMASKED)


@bug("non_causal_attention", AREA, "no causal mask in one layer", "GCYZSL/MoLA#21", EIGHT_LAYERS)
def one_layer_sees_future(run: Run):
    """One layer of eight, with an attention of its own, ignores `is_causal`."""
    change_input(run, attention_of(run)[4:5], lambda module, kwargs: UNMASKED)


@bug("non_causal_attention", AREA, "mask off by one", "OLMo-core 08340f94e", ENGLISH)
def mask_off_by_one(run: Run):
    """The mask's diagonal is one too high: each position attends to the next as well."""
    masked = {"is_causal": False}
    change_input(run, attention_of(run), lambda m, kwargs: {**masked, "attention_mask": square(kwargs).tril(1)})


@bug("non_causal_attention", AREA, "mask inverted", "rasbt/LLMs-from-scratch#1062", ENGLISH)
def mask_inverted(run: Run):
    """A boolean mask that is True where attention is forbidden goes to SDPA, which means the opposite by it."""
    masked = {"is_causal": False}
    change_input(run, attention_of(run), lambda m, kwargs: {**masked, "attention_mask": square(kwargs).triu(1)})


@bug("non_causal_attention", AREA, "causal mask lost with dropout", "keras#23038", DROPOUT)
def leak_with_dropout_only(run: Run):
    """The path that is taken while dropout is active forgets the causal mask; evaluation is causal."""
    change_input(run, attention_of(run), lambda module, kwargs: UNMASKED if module.training else {})


@bug("non_causal_attention", AREA, "statistic over the sequence", "Shwai-He/MEO#2", ENGLISH)
def mean_over_sequence(run: Run):
    """The hidden states are centred by their mean over the whole row, the future included."""
    change_output(run, run.model.model.layers[1].mlp, lambda hidden: hidden - hidden.mean(1, keepdim=True))


@bug("non_causal_attention", AREA, "detached feature of the next token", "thuml/iTransformer#26", ENGLISH)
def detached_next_embedding(run: Run):
    """A little of the next token's embedding is added to each token's, without a gradient."""
    change_output(run, run.model.model.embed_tokens, lambda x: x + 0.03 * F.pad(x[:, 1:], (0, 0, 0, 1)).detach())


# --- kernels


@bug("", AREA, "context manager called as a statement", "the original run", ENGLISH)
def original_sdp_kernel(run: Run):
    """`sdp_kernel`, a context manager, is called as a statement, as in the original run: fast attention stays off."""

    def call(trainer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has deprecated it
            torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False)
        run.took_effect()

    run.on_trainer.append(call)


# --- documents and rows


@bug("cross_document_attention", AREA, "mask of ones disables isolation", "transformers PR #46634", DOCUMENTS)
def ones_beside_positions(run: Run):
    """The collator adds a mask of ones, beside which the model does not look for documents in `position_ids`."""
    collate = run.collator

    def with_mask(rows):
        run.took_effect()
        batch = collate(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    run.collator = with_mask


@bug("cross_document_attention", AREA, "position ids ignored", "huggingface/nanoVLM#204", DOCUMENTS)
def positions_ignored(run: Run):
    """The model drops the batch's `position_ids`: positions run on and documents see each other."""
    change_input(run, [run.model.model], lambda module, kwargs: {"position_ids": None})


@bug("row_leak", AREA, "statistic over the batch", "Kyubyong/transformer#40", ENGLISH)
def mean_over_batch(run: Run):
    """The hidden states are centred by their mean over the rows of the batch."""
    change_output(run, run.model.model.layers[1].mlp, lambda hidden: hidden - hidden.mean(0, keepdim=True))


# --- positions


@bug("reference_mismatch", AREA, "positions wrap", "torchtitan#2849", ENGLISH)
def positions_wrap(run: Run):
    """Positions go on from the last row's chunk and wrap at the block's length, in the middle of the text."""

    def wrapped(module, kwargs):
        positions = kwargs["position_ids"]
        length = positions.shape[-1]
        return {"position_ids": (positions + length // 2) % length}

    change_input(run, [run.model.model.rotary_emb], wrapped)


@bug("reference_mismatch", "precision", "rotary embedding in bf16", "transformers#25681", LONG)
def rotary_in_bf16(run: Run):
    """Rotary frequencies and positions are rounded to bf16: from 256 on, neighbours share a position."""
    rotary = run.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    change_input(run, [rotary], lambda module, kwargs: {"position_ids": kwargs["position_ids"].bfloat16()})


# --- another model than the config's


@bug("reference_mismatch", AREA, "scaling of the frequencies ignored", "felafax#59", SCALED)
def rotary_scaling_ignored(run: Run):
    """The config asks for Llama 3.1's scaling of the rotary frequencies, and the model turns by the plain ones."""
    run.took_effect()
    rotary = run.model.model.rotary_emb
    rotary.inv_freq.copy_(1e4 ** (-torch.arange(0, 16, 2) / 16))


@bug("reference_mismatch", AREA, "scores not soft-capped", "mistral.rs PR #1928", CAPPED)
def attention_not_capped(run: Run):
    """The attention function of Gemma-2 is replaced by one that knows no soft cap."""
    attend = modeling_gemma2.eager_attention_forward

    def without_cap(*args, softcap=None, **kwargs):
        run.took_effect()
        return attend(*args, **kwargs)

    run.patch(modeling_gemma2, "eager_attention_forward", without_cap)


HEALTHY = {
    "Llama with YaRN, bf16": Setting(sizes={"rope_parameters": YARN}, steps=60, arguments={"bf16": True}),
    "Llama 3.1's frequencies, padded": SCALED.changed(rows="padded"),
    "Qwen-3, windows in two layers, documents": Setting(
        family="qwen3",
        rows="documents",
        steps=60,
        sizes={"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "Gemma-2, low caps, bf16 weights": CAPPED.changed(sizes={"dtype": "bfloat16"}, arguments={"learning_rate": 1e-2}),
}
