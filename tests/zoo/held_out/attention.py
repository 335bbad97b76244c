"""Attention and positions."""

import torch
from torch import nn
from transformers import TrainerCallback, masking_utils

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "attention and positions"
ENGLISH = Setting()
WINDOW = Setting(family="mistral")
EXPERTS = Setting(family="mixtral", steps=60)
DOCUMENTS = Setting(rows="documents", vocabulary=4096, block=256, batch=4)


@bug("non_causal_attention", AREA, "heads merged without transpose", "jsbaan/transformer-from-scratch#6", ENGLISH)
def heads_merged_without_transpose(run: Run):
    """[heads, tokens, size] is reshaped to [tokens, heads * size]: a token gets one head's output of four tokens."""

    def merge(module, inputs):
        run.took_effect()
        return inputs[0].unflatten(-1, (4, -1)).transpose(1, 2).reshape(inputs[0].shape)

    for layer in run.model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(merge)


@bug("non_causal_attention", AREA, "experts choose from the whole sequence", "piotrpiekos/MoSA#3", EXPERTS)
def experts_choose_tokens(run: Run):
    """Each expert takes the tokens of the row that fit it best, and so a token's place depends on later ones."""

    def routed(block):
        def forward(hidden):
            run.took_effect()
            logits, _, _ = block.gate(hidden)
            scores = logits.float().softmax(-1).view(*hidden.shape[:2], -1)
            num_experts = scores.shape[-1]
            chosen = scores.topk(hidden.shape[1] * block.top_k // num_experts, dim=1).indices
            weights = (scores * torch.zeros_like(scores).scatter(1, chosen, 1.0)).flatten(0, 1)
            places = torch.arange(num_experts).expand_as(weights)
            return block.experts(hidden.flatten(0, 1), places, weights.to(hidden.dtype)).view_as(hidden)

        return forward

    for layer in run.model.model.layers:
        layer.mlp.forward = routed(layer.mlp)


@bug("non_causal_attention", AREA, "convolution padded on both sides", "xi029/Qwen3-VL-MoeLORA#4", ENGLISH)
def adapter_mixes_neighbours(run: Run):
    """An adapter's output goes through a convolution with padding on both sides; it is zero at first."""

    def adapt(projection):
        adapter = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64, bias=False))
        nn.init.zeros_(adapter[1].weight)
        projection.adapter, projection.mixer = adapter, nn.Conv1d(64, 64, 3, padding=1, bias=False)

        def add(module, inputs, output):
            run.took_effect()
            return output + module.mixer(module.adapter(inputs[0]).mT).mT

        projection.register_forward_hook(add)

    for layer in run.model.model.layers:
        adapt(layer.self_attn.o_proj)


@bug("cross_document_attention", AREA, "boundaries of the first row", "axolotl#1375", DOCUMENTS)
def boundaries_of_the_first_row(run: Run):
    """The document boundaries of the first row of a batch are used for all of its rows."""

    def isolate(module, inputs, kwargs):
        run.took_effect()
        document = (kwargs["position_ids"][0] == 0).cumsum(0)
        mask = (document[:, None] == document).tril()
        return inputs, {**kwargs, "attention_mask": mask.expand(len(kwargs["position_ids"]), 1, -1, -1)}

    run.model.model.register_forward_pre_hook(isolate, with_kwargs=True)


@bug("reference_mismatch", AREA, "window off by one", "OLMo-core 08340f94e", WINDOW)
def window_off_by_one(run: Run):
    """The sliding window is one token too wide."""
    overlay = masking_utils.sliding_window_overlay

    def wider(sliding_window):
        run.took_effect()
        return overlay(sliding_window + 1)

    run.patch(masking_utils, "sliding_window_overlay", wider)


@bug("reference_mismatch", AREA, "scaled rotary frequencies stay", "transformers#25306", ENGLISH, onset=50)
def rotary_scaled_by_a_long_input(run: Run):
    """After step 50 one long input scales the rotary frequencies (dynamic NTK), and they stay scaled."""
    rotary, size, factor = run.model.model.rotary_emb, 16, 2.0

    class LongInput(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 50:
                run.took_effect()
                length = 8  # in units of the longest sequence of the configuration
                base = 1e4 * (factor * length - (factor - 1)) ** (size / (size - 2))
                rotary.inv_freq.copy_(base ** (-torch.arange(0, size, 2) / size))

    run.callbacks.append(LongInput())
