"""Attention and positions."""

import torch
from torch.nn import functional as F

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "attention and positions"
ENGLISH = Setting()
PADDED = Setting(rows="padded")


@bug("non_causal_attention", AREA, "tokens rolled over the end of the row", "LongLoRA#90", ENGLISH)
def shifted_groups_wrap_around(run: Run):
    """Half of the heads attend in groups shifted by a roll: the row's first tokens come after its last ones."""
    attend, num_groups = F.scaled_dot_product_attention, 4

    def in_groups(query, key, value, attn_mask=None, **kwargs):
        length, half = query.shape[2], query.shape[1] // 2
        if not run.model.training or length % (2 * num_groups) or key.shape[2] != length:
            return attend(query, key, value, attn_mask=attn_mask, **kwargs)
        run.took_effect()
        kwargs.pop("enable_gqa", None)
        group = length // num_groups

        def roll(x, size):
            return torch.cat([x[:, :half], x[:, half:].roll(size, dims=2)], dim=1)

        def split(x):
            x = roll(x.repeat_interleave(query.shape[1] // x.shape[1], dim=1), -group // 2)
            return x.unflatten(2, (num_groups, group))

        attended = attend(split(query), split(key), split(value), **{**kwargs, "is_causal": True})
        return roll(attended.flatten(2, 3), group // 2)

    run.patch(F, "scaled_dot_product_attention", in_groups)


@bug("reference_mismatch", AREA, "rotation and frequencies of two layouts", "Megatron-LM#3900", ENGLISH)
def rotary_layouts_mixed(run: Run):
    """Frequencies are laid out for neighbouring pairs, and the rotation pairs the first half with the second."""

    def interleave(module, inputs, output):
        run.took_effect()
        return tuple(x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in output)

    run.model.model.rotary_emb.register_forward_hook(interleave)


@bug("padding_attended", AREA, "padding on the left is attended", "NeMo-Automodel PR #3704", PADDED)
def left_padding_attended(run: Run):
    """Rows are padded on the left, the mask is made from padding on the right and is all ones: tokens see padding."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        padding = int((row["attention_mask"] == 0).sum())
        row.update(input_ids=row["input_ids"].roll(padding), labels=row["labels"].roll(padding))
        row["attention_mask"] = torch.ones_like(row["attention_mask"])
