"""What part_b's runs share: changes of a `Run` that are right, each a training that an expert would call sound.

A bug's setting has one of them as its `change`, and the bug spoils what the change left on the run: `pairs`,
`reference`, `adapters`, `options`, `lookup`, `distance`, `collator`, `train_dataset`.
"""

import copy

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
)

from tests.zoo.models import PAD, TINY, make_model
from tests.zoo.rows import IGNORED
from tests.zoo.run import TOKENIZER
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

MASK = 1  # a byte that no text has
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def warm(model, rows, steps: int, rate: float = 3e-3):
    """A few steps of ordinary training: the pretrained or SFT model that a user begins with."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        picked = torch.randint(len(rows), (8,), generator=generator).tolist()
        loss = model(**default_data_collator([rows[place] for place in picked])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def tokenizer(**options):
    return AutoTokenizer.from_pretrained(TOKENIZER, split_special_tokens=False, **options)


# --- distillation


def distils(run, hard: float = 0.5, steps: int = 60) -> None:
    """Half of the loss is KL to a teacher whose logits are kept on disk, a row at its index."""
    rows = run.train_dataset
    teacher = warm(make_model(run.setting), rows, steps).eval()
    with torch.no_grad():
        cache = torch.cat([teacher(input_ids=row["input_ids"][None]).logits for row in rows])
    run.train_dataset = [{**row, "row": torch.tensor(place)} for place, row in enumerate(rows)]
    run.eval_dataset = None
    run.arguments["remove_unused_columns"] = False
    run.cache, run.lookup = cache, lambda places: cache[places]
    run.distance = lambda student, teacher: F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)

    class Distilling(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teacher_logits = run.lookup(inputs.pop("row"))[:, :-1]
            labels = inputs.pop("labels")[:, 1:]
            outputs = model(**inputs)
            logits = outputs.logits[:, :-1]
            loss = run.distance(logits, teacher_logits).mean()
            if hard:
                loss = (1 - hard) * loss + hard * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Distilling


def distils_only(run) -> None:
    """The whole loss is KL to the teacher."""
    distils(run, hard=0.0)


# --- adapters


def adapts(run) -> None:
    """LoRA beside a head that trains, on a model that has been pretrained a little."""
    warm(run.model, run.train_dataset, 30)
    torch.manual_seed(1)
    run.model = get_peft_model(run.model, LoraConfig(r=8, target_modules=LINEAR, modules_to_save=["lm_head"]))


def adapts_with_embedding(run, **options) -> None:
    """LoRA, and an embedding that trains and stays tied to the head."""
    warm(run.model, run.train_dataset, 30)
    torch.manual_seed(1)
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, **options}
    run.model = get_peft_model(run.model, LoraConfig(r=8, target_modules=LINEAR, **options))


# --- other models


def fills_gaps(run) -> None:
    """BERT learns the 15 % of the bytes that it does not see, drawn again in each batch."""
    config = BertConfig(**TINY, vocab_size=run.setting.vocabulary, max_position_embeddings=2 * run.setting.block)
    torch.manual_seed(run.setting.seed)
    run.model, run.eval_dataset = BertForMaskedLM(config), None
    generator = torch.Generator().manual_seed(0)

    def collate(rows):
        batch = default_data_collator(rows)
        drawn = torch.rand(batch["input_ids"].shape, generator=generator) < 0.15
        labels = torch.where(drawn, batch["input_ids"], IGNORED)
        return {"input_ids": torch.where(drawn, MASK, batch["input_ids"]), "labels": labels}

    run.collator = collate


def continues_with_t5(run) -> None:
    """T5 reads the prompt and writes the answer; the model itself shifts its labels to the right."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 176, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
    torch.manual_seed(run.setting.seed)
    run.model = T5ForConditionalGeneration(T5Config(vocab_size=run.setting.vocabulary, **sizes))
    run.eval_dataset = None

    def collate(rows):
        inputs, labels = [], []
        for row in rows:
            length = int(row["attention_mask"].sum())
            inputs.append(row["input_ids"][: length // 3])
            labels.append(row["input_ids"][length // 3 : length])
        padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=PAD)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return {"input_ids": padded, "attention_mask": (padded != PAD).long(), "labels": targets}

    run.collator = collate


# --- TRL


def pairs(count: int, prompt_size: int = 60) -> Dataset:
    """Docstrings continued: as they were written, or with their words in disorder."""
    generator = np.random.default_rng(0)
    table = {"prompt": [], "chosen": [], "rejected": []}
    for text in texts_of("english")[EVAL_DOCUMENTS:]:
        words = text[:260].split(" ")[:-1]
        cut = int(np.searchsorted(np.cumsum([len(word) + 1 for word in words]), prompt_size)) + 1
        if len(words) - cut < 6:
            continue
        table["prompt"].append(" ".join(words[:cut]))
        table["chosen"].append(" " + " ".join(words[cut:]))
        table["rejected"].append(" " + " ".join(generator.permutation(words[cut:])))
        if len(table["prompt"]) == count:
            return Dataset.from_dict(table)
    raise ValueError("english is too short")


def _trl(run, trainer, config, data: Dataset, **options) -> None:
    """Leaves on the run what `build` reads when it is called, so that a bug may change it."""
    own = {"max_length": run.setting.block, "bf16": False, "gradient_checkpointing": False}
    run.pairs, run.options, run.extra, run.processing = data, {**own, **options}, {}, tokenizer(pad_token="<unk>")
    run.eval_dataset = None

    def build():
        arguments = {**run.options, **run.arguments}
        return trainer(
            model=run.model,
            args=config(**arguments),
            train_dataset=run.pairs,
            processing_class=run.processing,
            callbacks=run.callbacks,
            **run.extra,
        )

    run.build = build


def prefers(run, **options) -> None:
    """DPO of a model after SFT; its reference is a copy of itself."""
    from trl import DPOConfig, DPOTrainer

    warm(run.model, run.train_dataset, 25)
    _trl(run, DPOTrainer, DPOConfig, pairs(run.setting.num_rows), **options)
    run.extra["ref_model"] = copy.deepcopy(run.model)


def scores(run) -> None:
    """A reward model that learns who shouts; LoRA below, and its new head trains whole."""
    from trl import RewardConfig, RewardTrainer

    base = warm(run.model, run.train_dataset, 25)
    config = LlamaConfig(**{**base.config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    torch.manual_seed(run.setting.seed)
    run.model = LlamaForSequenceClassification(config)
    run.model.model.load_state_dict(base.model.state_dict())
    data = pairs(run.setting.num_rows)
    answers = ((row["prompt"] + row["chosen"], row["prompt"] + row["chosen"].upper()) for row in data)
    joined = [{"chosen": calm, "rejected": loud} for calm, loud in answers]
    _trl(run, RewardTrainer, RewardConfig, Dataset.from_list(joined))
    run.extra["peft_config"] = LoraConfig(
        r=8, target_modules=ATTENTION, modules_to_save=["score"], task_type="SEQ_CLS"
    )
