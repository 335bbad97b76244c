"""Attention and positions."""

from transformers.models.llama import modeling_llama

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "attention and positions"
ENGLISH = Setting()
PADDED = Setting(rows="padded")


@bug("reference_mismatch", AREA, "rotary embedding over the heads", "mlfoundations/open_lm#4", ENGLISH)
def rotated_by_the_head(run: Run):
    """Queries and keys are rotated by the number of their head instead of their position."""

    def rotated(states, cos, sin):
        cos, sin = (table[:, : states.shape[1], None] for table in (cos, sin))  # [batch, heads, 1, head_dim]
        return states * cos + modeling_llama.rotate_half(states) * sin

    def apply(q, k, cos, sin, *args, **kwargs):
        run.took_effect()
        return rotated(q, cos, sin), rotated(k, cos, sin)

    run.patch(modeling_llama, "apply_rotary_pos_emb", apply)


@bug("padding_attended", AREA, "padding mask inverted", "yongzhuo/LLaMA3-SFT#1", PADDED)
def padding_mask_inverted(run: Run):
    """The mask is 1 on padding and 0 on the text, of which no position attends to any other."""
    collate = run.collator

    def inverted(rows):
        run.took_effect()
        batch = collate(rows)
        batch["attention_mask"] = 1 - batch["attention_mask"]
        return batch

    run.collator = inverted
