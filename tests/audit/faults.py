"""The faults that are listed: what the audit measures, which script confirms it, where it is known."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parent / "confirm"
CONFIRMED = re.compile(r"^CONFIRMED (\w+): (.*)$", re.MULTILINE)
ISSUES = "https://github.com/huggingface/transformers/"


@dataclass(frozen=True)
class Fault:
    """`name`: of the script in `confirm/`. `short`: in README. `check`, `pattern`: the result that a class must have
    in the audit. `upstream`: a public thread that describes it. `report`: the text to file where there is none."""

    name: str
    short: str
    title: str
    check: str
    pattern: str
    effect: str
    upstream: str = ""
    related: str = ""
    report: str = ""

    def evidence(self, results: dict) -> str | None:
        """Of a class's results: the first that has it."""
        for implementation, settings in results.items():
            for setting, checks in settings.items():
                status, detail = checks.get(self.check, ("", ""))
                if status == "fault" and re.search(self.pattern, detail):
                    return f"{implementation}, {setting}: {detail}"
        return None


FAULTS = (
    Fault(
        "labels_not_shifted",
        "labels not shifted",
        "Labels that equal the input are scored on the token that is seen",
        "loss",
        "at shift 0",
        "Every other class of AutoModelForCausalLM shifts the labels. With `labels = input_ids`, as "
        "`DataCollatorForLanguageModeling(mlm=False)` makes them, these learn to copy: the loss falls fast and means "
        "nothing. The decoders of encoder-decoders are meant for labels that a wrapper has shifted; the docstring of "
        "XLMWithLMHeadModel says that labels are shifted inside.",
        upstream=ISSUES + "issues/27517",
        related="the same in " + ISSUES + "issues/30105 and " + ISSUES + "issues/10480",
    ),
    Fault(
        "num_items_ignored",
        "loss times accumulation steps",
        "The loss is multiplied by gradient_accumulation_steps under Trainer",
        "num_items",
        "4 times the scored labels",
        "`forward` takes `**kwargs`, so Trainer leaves the division to the model and does not divide by the number of "
        "micro-batches; the model drops `num_items_in_batch` and returns a mean. Loss and gradient are too large by "
        "the number of accumulation steps, and tokens of short micro-batches count more.",
        upstream=ISSUES + "issues/47688",
    ),
    Fault(
        "labels_counted_unshifted",
        "one label too many counted in each row",
        "Trainer divides by one label too many in each row",
        "trainer",
        r"counted 58 labels, 57 are scored",
        "The class name matches no loss type, so `Trainer._loss_shifts_labels` is False, though the loss is "
        "`ForCausalLMLoss`, the fallback. Loss and gradient are low by (n - 1) / n for rows of n labels; losses do "
        "not compare with other classes'.",
        related="the same count for known loss types was fixed in " + ISSUES + "pull/46204",
        report="""**`num_items_in_batch` still counts position 0 for causal LM classes without a `loss_type`**

`Trainer._loss_shifts_labels` looks up `model.loss_type`. For classes whose name matches no key of `LOSS_MAPPING` (all
`*LMHeadModel`, `BertGenerationDecoder`), `loss_type` is None, while `PreTrainedModel.loss_function` falls back to
`ForCausalLMLoss`, which shifts. So #46204 does not reach them: `num_items_in_batch` is too large by one per row, and
the loss and the gradient are too small by the same factor (63/64 for rows of 64 tokens).

Expected: the Trainer asks for the loss that is used, `model.loss_function is ForCausalLMLoss`.""",
    ),
    Fault(
        "generation_positions",
        "other positions in `generate`",
        "generate uses other positions than the forward pass",
        "cache",
        "from new token 0 on",
        "Without `position_ids` the forward pass numbers positions from `pad_token_id + 1`; `generate` passes 0, 1, "
        "2, ... Each token gets the position embedding of another place, position `pad_token_id` an embedding that "
        "is never trained. A decoder that was trained well generates worse, without a message.",
        related="the same offset in another library: https://github.com/huggingface/sentence-transformers/pull/3879",
        report="""**`generate` numbers positions from 0 for RoBERTa-style decoders, which begin at pad_token_id + 1**

`RobertaForCausalLM` and the classes modelled on it (RobertaPreLayerNorm, Camembert, Data2VecText, XLMRoberta,
XLMRobertaXL, Xmod) make `position_ids` with `create_position_ids_from_input_ids` when none are given: the first token
has position `padding_idx + 1`. `GenerationMixin.prepare_inputs_for_generation` sees `position_ids` in the signature of
`forward` and passes `attention_mask.cumsum(-1) - 1`, so the first token has position 0. The first generated logits
differ from those of `model(input_ids)`, and are equal to those of `model(input_ids, position_ids=[[0, 1, 2, ...]])`.

Expected: generation uses the positions of training, `padding_idx + 1 + n`.""",
    ),
    Fault(
        "compressed_keys_of_other_documents",
        "packed documents see another's keys",
        "Packed documents see the compressed keys of another document",
        "documents",
        "masks are told",
        "With `position_ids` that start again, the sliding-window mask keeps documents apart. The compressed keys are "
        "built over the whole row, and a query at place p of its document may see the first (p + 1) // rate of them: "
        "those are the first document's. Later documents attend to the first and never to their own.",
        related="the compressor and padding: " + ISSUES + "issues/45938",
        report="""**DeepSeek V4: packed sequences attend to the compressed keys of the first document**

With `position_ids` that restart, `create_sliding_window_causal_mask` isolates the documents. The compressors (CSA and
HCA) pool keys over the whole row, and `causal_threshold = (position_ids + 1) // compress_rate` compares an index into
the row with a position inside the document. A token at place p of the second document therefore sees the first
`(p + 1) // compress_rate` entries of the row, which belong to the first document, and none of its own document.
Changing tokens of the first document changes the logits of the second.

Expected: entries of other documents are masked and thresholds count from the document's start, or packed
`position_ids` are refused.""",
    ),
    Fault(
        "window_only_in_generation",
        "a sliding window in `generate` only",
        "The forward pass ignores the sliding window that generation applies",
        "cache",
        "from new token 1 on",
        "The model asks for a full causal mask, whatever `sliding_window` says, and the cache that `generate` makes "
        "drops keys beyond it. Rows longer than the window are trained with another attention than they are "
        "generated with.",
        report="""**Moshi: `sliding_window` is ignored in the forward pass and applied by the cache**

`MoshiModel.forward` calls `create_causal_mask`, so each token attends to all earlier ones.
`DynamicCache(config=config)` sees `config.sliding_window` and makes sliding-window layers, which drop older keys.
Beyond the window, the logits of `generate` differ from those of one forward pass over the same tokens.

Expected: `create_sliding_window_causal_mask`, or a cache without a window.""",
    ),
    Fault(
        "buckets_of_later_positions",
        "logits depend on later tokens",
        "The predicting streams read relative positions computed from later tokens",
        "causal",
        "logits move with later tokens",
        "The bucket scores of the predicting streams are laid out by position, stream, head and read as stream, head, "
        "position, so that a position uses scores of others, later ones among them. From the second layer on the "
        "logits of a position depend on tokens that it is to predict, and on the length of the row.",
        report="""**ProphetNet: logits depend on later tokens (layout of `get_predict_relative_pos_embeddings`)**

`rel_pos_embeddings` is `[batch, ngram, sequence, buckets, heads]` (see the comment above it). `permute(0, 2, 1, 4, 3)`
makes `[batch, sequence, ngram, heads, buckets]`; it is then flattened, gathered with an index that was repeated as
`[ngram, batch, heads * sequence]`, and viewed as `[batch, ngram, heads, sequence, ...]`. The orders do not agree, so
the scores of a position come from another one. With two layers or more, changing tokens from place 5 on changes the
logits of places 0 to 4, in `ProphetNetForCausalLM` and in the decoder of `ProphetNetForConditionalGeneration`.

Expected: scores, index and view in one order, `[batch, ngram, heads, sequence]`.""",
    ),
    Fault(
        "sdpa_without_mask_not_causal",
        "sdpa not causal where eager is",
        "Text without token types is bidirectional under sdpa and causal under eager",
        "causal",
        "logits move with later tokens",
        "The text model is set to `use_bidirectional_attention`, so its attention is not causal by itself. Without "
        "`token_type_ids` a causal mask is meant; where no token is padded, mask creation for sdpa leaves it out in "
        "the belief that the kernel is causal. Eager gets the mask. Full and padded rows are treated differently.",
        related="that a prefix is bidirectional by design: " + ISSUES + "issues/30993",
        report="""**PaliGemma without token_type_ids: eager attention is causal, sdpa is bidirectional**

`PaliGemmaConfig` sets `text_config.use_bidirectional_attention = True`, so `GemmaAttention.is_causal` is False.
`create_causal_mask` with sdpa and no padding returns None, as `is_causal` of the kernel is meant to do the rest; with
`is_causal = False` nothing masks. With eager attention the mask is built, and the model is causal. The same text gives
other logits with another `attn_implementation`, or with one row of padding in the batch.

Expected: the same attention in all implementations (`allow_is_causal_skip=False`, or bidirectional on purpose).""",
    ),
    Fault(
        "rows_mixed_in_single_steps",
        "rows mixed in `generate`",
        "Generation in batches mixes the rows",
        "cache",
        "from new token 1 on",
        "In a step of one token with a state, the shifted state `[rows, hidden]` is broadcast against `[rows, 1, "
        "hidden]`: each row gets a copy for each row's state, and the last row's state is read. Batches of one row "
        "are right.",
        report="""**RWKV: one-token steps broadcast the rows of a batch against each other**

In `RwkvSelfAttention.extract_key_value` and `RwkvFeedForward.forward`, for steps of one token with a state,
`shifted = state[1][:, :, self.layer_id]` has shape `[batch, hidden]`; it is combined with `hidden`, which is
`[batch, 1, hidden]`. With a batch of 2, a step returns logits of shape `[2, 2, vocabulary]`, and `generate` reads the
last: row 0 continues with the state of row 1.

Expected: `shifted = state[1][:, :, self.layer_id].unsqueeze(1)`.""",
    ),
    Fault(
        "decoder_input_from_source",
        "a decoder that reads the source",
        "Called with labels alone, the decoder reads the source",
        "label_leak",
        "no teacher forcing",
        "Other encoder-decoders shift the labels to make `decoder_input_ids`. This one shifts `input_ids`: where "
        "source and labels have the same length, training runs without teacher forcing.",
        report="""**FSMTForConditionalGeneration builds decoder_input_ids from input_ids instead of labels**

`_prepare_fsmt_decoder_inputs` calls `shift_tokens_right(input_ids, pad_token_id)` when `decoder_input_ids` is None,
also when `labels` are given. The logits do not depend on the labels at all. `DataCollatorForSeq2Seq(model=model)`
hides it, as it adds `decoder_input_ids` from `prepare_decoder_input_ids_from_labels`; a plain collator does not.

Expected: with `labels` and no `decoder_input_ids`, use `prepare_decoder_input_ids_from_labels(labels)`.""",
    ),
)


def confirm(reports: list[dict]) -> dict[str, dict[str, str]]:
    """Runs the scripts of the faults that were measured. By fault, what its script printed of each class."""
    measured = [each for each in FAULTS if any(each.evidence(report["results"]) for report in reports)]
    return {each.name: run_script(SCRIPTS / f"{each.name}.py") for each in measured}


def run_script(path: Path) -> dict[str, str]:
    """By class, what confirms it. The script knows nothing of the audit and runs in an empty folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(path)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{path.name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return dict(CONFIRMED.findall(done.stdout))
