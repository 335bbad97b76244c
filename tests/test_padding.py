"""Padding before the text: known by its token or its mask, and whether the text attends to it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from recipe.guards.batches import IGNORE_INDEX, SHORTEST_PADDING, leading_padding
from recipe.guards.guard import PROBE
from recipe.guards.padding import PaddingIsTarget
from tests.test_tokens import seen

PAD, LENGTH = 0, 40


def left_padded(counts=(12, 20), pad=PAD, unscored=0, **tensors) -> dict[str, torch.Tensor]:
    """Rows with so much padding before their text, of whose text the first `unscored` tokens are a prompt."""
    place, ids = torch.arange(LENGTH), torch.randint(1, 200, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    padding = torch.stack([place < count for count in counts])
    prompt = torch.stack([place < count + unscored for count in counts])
    ids = ids.masked_fill(padding, pad)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(prompt, IGNORE_INDEX), "attention_mask": (~padding).long()}
    return {name: value for name, value in (inputs | tensors).items() if value is not None}


def verdict_on(model, inputs: dict, pad_token_id: int | None, given: dict | None = None):
    """None where no padding is seen. `given`: the model is called with."""
    leading = leading_padding(inputs, pad_token_id)
    if not leading.any():
        return None
    call = {name: value for name, value in (given or inputs).items() if name != "labels"}
    twin, run = SimpleNamespace(compute_loss_context_manager=nullcontext), SimpleNamespace(objective=None)
    batch = SimpleNamespace(model=model, inputs=inputs, run=run, twin=twin, recording=SimpleNamespace(calls=[call]))
    guard = PaddingIsTarget()
    return guard.judge_attended(*guard._gradient_at(batch, leading)) or guard.clear("padding_attended", PROBE)


ONES = torch.ones(2, LENGTH, dtype=torch.long)
ATTENDED, MASKED, NONE = "warning", "clear", None


@pytest.mark.parametrize(
    ("inputs", "pad_token_id", "expected"),
    [
        (left_padded(attention_mask=ONES), PAD, ATTENDED),
        (left_padded(attention_mask=None, unscored=5), PAD, ATTENDED),
        (left_padded(attention_mask=ONES), None, ATTENDED),  # seen by its form
        (left_padded(), PAD, MASKED),
        (left_padded(unscored=5), None, MASKED),
        (left_padded(attention_mask=ONES, unscored=5), None, NONE),  # images before a prompt, as far as is known
        (left_padded((12, 12), attention_mask=ONES), None, NONE),
        (left_padded(attention_mask=ONES, pad=7), PAD, NONE),
        (left_padded((1, 2), attention_mask=ONES), PAD, NONE),  # packed rows that begin with EOS
        (left_padded((SHORTEST_PADDING - 1,) * 2, attention_mask=ONES), PAD, NONE),
        ({name: value.flip(1) for name, value in left_padded(attention_mask=ONES).items()}, PAD, NONE),  # on the right
        (left_padded((0, LENGTH), attention_mask=ONES), PAD, NONE),  # a row of padding alone
    ],
)
def test_padding_before_the_text_is_attended(tiny_model, inputs, pad_token_id, expected):
    found = verdict_on(tiny_model, inputs, pad_token_id)
    assert (found and getattr(found, "severity", "clear")) == expected
    assert expected != ATTENDED or "attend to padding" in found.found


def test_a_mask_that_does_not_reach_the_model(tiny_model):
    inputs = left_padded()
    assert verdict_on(tiny_model, inputs, PAD, {"input_ids": inputs["input_ids"]}).severity == "warning"
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & inputs["attention_mask"].bool()[:, None, None]
    inputs["attention_mask"] = mask | torch.eye(LENGTH, dtype=torch.bool)  # one of the user's own, of four dimensions
    assert verdict_on(tiny_model, inputs, PAD) == PaddingIsTarget.clear("padding_attended", PROBE)


def test_a_mask_that_hides_the_text():
    def judge(ids, valid, scored):
        counts = PaddingIsTarget.count(seen(ids, valid=valid, scored=scored))
        return [verdict.id for verdict in PaddingIsTarget().verdicts(counts, PROBE) if hasattr(verdict, "severity")]

    text, place = left_padded()["input_ids"].flip(1).repeat(8, 1).numpy(), torch.arange(LENGTH).numpy()
    is_text = text != PAD
    scored = is_text & (place > 0)
    assert judge(text, ~is_text, scored) == ["padding_attended"]
    assert judge(text, is_text & False, scored) == ["padding_attended"]
    assert judge(text, is_text, scored) == []
    assert judge(text, is_text, place > 0) == ["padding_is_target"]
    assert judge(text, is_text & (place % 3 > 0), scored) == []  # a third of the tokens is hidden on purpose
