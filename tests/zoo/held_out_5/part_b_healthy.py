"""Healthy runs that are unusual and right: what a nervous guard may warn of."""

import copy

import numpy as np
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, default_data_collator

from tests.zoo.held_out_5.part_b_builds import (
    ATTENTION,
    LINEAR,
    _trl,
    adapts,
    adapts_with_embedding,
    continues_with_t5,
    distils,
    distils_only,
    fills_gaps,
    pairs,
    prefers,
    scores,
    warm,
)
from tests.zoo.models import PAD, TINY
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

# --- TRL


def prefers_by_two_losses(run) -> None:
    """IPO's loss and that of SFT on the chosen completions."""
    prefers(run, loss_type=["ipo", "sft"], loss_weights=[1.0, 0.5])


def prefers_with_adapters(run) -> None:
    """LoRA; the reference is the model without its adapters."""
    prefers(run, loss_type=["hinge"], precompute_ref_log_probs=True)
    run.extra = {"peft_config": LoraConfig(r=8, target_modules=ATTENTION, task_type="CAUSAL_LM")}


def judges_single_answers(run) -> None:
    """KTO: each completion is good or bad by itself, here for shouting."""
    from trl import KTOConfig, KTOTrainer

    warm(run.model, run.train_dataset, 25)
    rows = []
    for row in pairs(run.setting.num_rows):
        good, bad = row["chosen"], row["chosen"].upper()
        rows += [{"prompt": row["prompt"], "completion": good, "label": True}]
        rows += [{"prompt": row["prompt"], "completion": bad, "label": False}]
    order = np.random.default_rng(0).permutation(len(rows))
    _trl(run, KTOTrainer, KTOConfig, Dataset.from_list([rows[place] for place in order]))
    run.extra["ref_model"] = copy.deepcopy(run.model)


def prefers_by_odds(run) -> None:
    """ORPO: SFT and odds ratio in one, without a reference."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    _trl(run, ORPOTrainer, ORPOConfig, pairs(run.setting.num_rows))


def prefers_simply(run) -> None:
    """SimPO of CPOTrainer: lengths are taken out, a margin is asked for."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    warm(run.model, run.train_dataset, 25)
    _trl(run, CPOTrainer, CPOConfig, pairs(run.setting.num_rows), loss_type="simpo", cpo_alpha=0.0, beta=2.0)


# --- adapters


def adapts_by_vectors(run) -> None:
    """IA3: a few thousand numbers that scale keys, values and the inner layer."""
    warm(run.model, run.train_dataset, 30)
    places = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    run.model = get_peft_model(run.model, IA3Config(**places))


def adapts_by_prompts(run) -> None:
    """Prompt tuning: eight vectors before the text, all else frozen."""
    warm(run.model, run.train_dataset, 30)
    torch.manual_seed(1)
    run.model = get_peft_model(run.model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8))


def adapts_directions(run) -> None:
    """DoRA with rank-stabilized scale and dropout."""
    warm(run.model, run.train_dataset, 30)
    torch.manual_seed(1)
    config = LoraConfig(r=16, target_modules=LINEAR, use_dora=True, use_rslora=True, lora_dropout=0.05)
    run.model = get_peft_model(run.model, config)


# --- own losses


def _by_tokens(run, weigh) -> None:
    """The Trainer's loss becomes a mean over tokens of which each has the weight that `weigh(losses, rows)` gives."""

    class Weighing(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")[:, 1:]
            outputs = model(**inputs)
            logits = outputs.logits[:, :-1].transpose(1, 2)
            losses = F.cross_entropy(logits, inputs["input_ids"][:, 1:], reduction="none")
            weights = weigh(losses, labels) * (inputs["attention_mask"][:, 1:] if "attention_mask" in inputs else 1)
            loss = (losses * weights).sum() / weights.sum()
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Weighing


def focuses_on_hard_tokens(run) -> None:
    """Focal loss, a token at a time."""
    _by_tokens(run, lambda losses, labels: (1 - torch.exp(-losses.detach())) ** 1.0)


def weighs_prompts_little(run) -> None:
    """Prompt tokens count a tenth of those of the answer."""
    _by_tokens(run, lambda losses, labels: torch.where(labels == IGNORED, 0.1, 1.0))


# --- data


def sorts_by_length(run) -> None:
    """A curriculum: short rows first, read in order."""
    run.train_dataset = sorted(run.train_dataset, key=lambda row: int(row["attention_mask"].sum()))

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

    run.trainer_class = InOrder


def begins_with_a_system_prompt(run) -> None:
    """All rows begin with the same 53 bytes, which are part of the prompt and not scored."""
    prefix = torch.tensor(list(b"You are a helpful assistant.\nContinue the docstring.\n"))
    for row in run.train_dataset:
        size = len(row["input_ids"])
        row["input_ids"] = torch.cat([prefix, row["input_ids"]])[:size]
        row["attention_mask"] = torch.cat([torch.ones_like(prefix), row["attention_mask"]])[:size]
        row["labels"] = torch.cat([torch.full_like(prefix, IGNORED), row["labels"]])[:size]


def pads_on_the_left(run) -> None:
    """Left padding done right: positions are counted from the text's first token."""

    def collate(rows):
        batch = default_data_collator(rows)
        shifts = (batch["attention_mask"] == 0).sum(-1).tolist()
        rolled = ([v.roll(shift) for v, shift in zip(value, shifts, strict=True)] for value in batch.values())
        batch = dict(zip(batch, map(torch.stack, rolled), strict=True))
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    run.collator = collate


def mixes_code_and_logs(run) -> None:
    """Every second row is code, every fourth log lines."""
    code, logs = (make_rows(run.setting.changed(text=name)) for name in ("code", "templates"))
    for place in range(len(run.train_dataset)):
        if place % 4:
            run.train_dataset[place] = (code if place % 2 else logs)[place]


def tells_languages_apart(run) -> None:
    """Sequence classification: of which of two languages is the text?"""
    rows = []
    for label, language in enumerate(("german", "spanish")):
        text = "\n".join(texts_of(language)[EVAL_DOCUMENTS:]).encode()
        for start in range(0, len(text) - 60, 60):
            ids = torch.tensor(list(text[start : start + 40 + start % 21]))
            mask = F.pad(torch.ones_like(ids), (0, 64 - len(ids)))
            rows.append(
                {"input_ids": F.pad(ids, (0, 64 - len(ids)), value=PAD), "attention_mask": mask, "labels": label}
            )
    config = AutoConfig.for_model("qwen3", **TINY, vocab_size=run.setting.vocabulary, num_labels=2, pad_token_id=PAD)
    torch.manual_seed(run.setting.seed)
    run.model, run.train_dataset = AutoModelForSequenceClassification.from_config(config), rows
    run.eval_dataset = None


PREFERENCES = Setting(vocabulary=4096, steps=40, arguments={"learning_rate": 1e-3})
SFT = Setting(kind="sft", vocabulary=4096, steps=40, batch=4)

HEALTHY = {
    "dpo_after_sft": PREFERENCES.changed(change=prefers),
    "ipo_with_sft_loss": PREFERENCES.changed(change=prefers_by_two_losses),
    "dpo_hinge_on_adapters": PREFERENCES.changed(change=prefers_with_adapters, arguments={"learning_rate": 3e-3}),
    "kto_of_single_answers": PREFERENCES.changed(change=judges_single_answers),
    "orpo_from_scratch": PREFERENCES.changed(change=prefers_by_odds, arguments={"learning_rate": 2e-3}),
    "simpo_without_reference": PREFERENCES.changed(change=prefers_simply),
    "reward_model_on_adapters": PREFERENCES.changed(change=scores, arguments={"learning_rate": 3e-3}),
    "sft_of_completions": SFT.changed(rows="prompts"),
    "sft_packed_by_fit": SFT.changed(arguments={"packing": True, "packing_strategy": "bfd"}),
    "sft_packed_by_wrapping": SFT.changed(steps=30, arguments={"packing": True, "packing_strategy": "wrapped"}),
    "lora_beside_a_trained_head": Setting(family="qwen2", steps=60, change=adapts),
    "lora_with_tied_embedding": Setting(steps=60, vocabulary=1024, change=adapts_with_embedding),
    "ia3_vectors": Setting(steps=60, change=adapts_by_vectors),
    "prompt_vectors": Setting(steps=60, change=adapts_by_prompts),
    "dora_with_dropout": Setting(steps=60, family="mistral", change=adapts_directions),
    "distilled_beside_labels": Setting(steps=60, change=distils),
    "distilled_from_teacher_alone": Setting(steps=60, change=distils_only),
    "bert_fills_gaps": Setting(steps=100, change=fills_gaps),
    "t5_continues": Setting(steps=80, rows="prompts", change=continues_with_t5),
    "languages_told_apart": Setting(steps=60, change=tells_languages_apart),
    "focal_loss_by_tokens": Setting(steps=60, change=focuses_on_hard_tokens),
    "prompts_weigh_a_tenth": Setting(steps=60, rows="prompts", change=weighs_prompts_little),
    "curriculum_by_length": Setting(steps=60, rows="padded", change=sorts_by_length),
    "same_system_prompt": Setting(steps=60, rows="prompts", block=160, change=begins_with_a_system_prompt),
    "left_padding_with_positions": Setting(steps=60, rows="padded", family="gpt2", change=pads_on_the_left),
    "code_and_logs_mixed": Setting(steps=80, change=mixes_code_and_logs),
    "french_in_twelve_passes": Setting(steps=60, text="french", passes=12, evaluate_every=20),
    "logs_as_documents": Setting(steps=60, rows="documents", text="templates", vocabulary=1024),
    "code_stream_resumed": Setting(steps=60, text="code", vocabulary=2048, stream=True, save_at=30, workers=2),
    "smoothed_qwen3": Setting(steps=60, family="qwen3", arguments={"label_smoothing_factor": 0.1}),
    "olmo2_flattened": Setting(steps=60, rows="flattened", family="olmo2", accumulation=2, batch=4),
}
