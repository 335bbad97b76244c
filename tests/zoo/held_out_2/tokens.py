"""Tokens."""

import torch

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "tokens"
ENGLISH = Setting()
TOKENS = Setting(vocabulary=4096, batch=4)
ROWS_OF_MODEL = 4088


@bug("", AREA, "text lower-cased by default", "transformers#3823", ENGLISH)
def text_lower_cased(run: Run):
    """The tokenizer of a cased model lower-cases the text by default."""
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        ids = row["input_ids"]
        lowered = torch.where((ids >= ord("A")) & (ids <= ord("Z")), ids + 32, ids)
        row.update(input_ids=lowered, labels=lowered.clone())


@bug("token_out_of_range", AREA, "ids clamped to the vocabulary", "Megatron-LM PR #2570", TOKENS)
def ids_clamped_to_the_vocabulary(run: Run):
    """The model has 8 rows fewer than the tokenizer, and embedding and loss clamp an id to the last row."""
    run.model = make_model(run.setting.changed(sizes={"vocab_size": ROWS_OF_MODEL}))
    compute = run.model.loss_function

    def clamp(module, inputs):
        run.took_effect()
        return (inputs[0].clamp(max=ROWS_OF_MODEL - 1),)

    def loss_function(logits, labels, vocab_size, **kwargs):
        return compute(logits, labels.clamp(max=ROWS_OF_MODEL - 1), vocab_size, **kwargs)

    run.model.model.embed_tokens.register_forward_pre_hook(clamp)
    run.model.loss_function = loss_function
