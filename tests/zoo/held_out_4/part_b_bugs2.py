"""Bugs of PEFT and TRL trainings."""

import copy

import datasets
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from trl import DPOConfig, DPOTrainer

from tests.zoo.bug import bug
from tests.zoo.models import make_model
from tests.zoo.rows import make_rows
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of


def pretrain(model, setting: Setting, steps: int = 20) -> None:
    """Trains on source code, so that what follows starts from a model that can do something."""
    rows = make_rows(setting.changed(text="code", rows="packed", steps=steps, batch=8, accumulation=1, passes=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, len(rows), 8):
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token ids are those of the zoo: bytes, EOS 256, padding 0."""
    model = BPE({letter: byte for byte, letter in bytes_to_unicode().items()} | {"</s>": 256}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token=bytes_to_unicode()[0])


# --- PEFT

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 64, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}


def add_lora(run, **options) -> None:
    torch.manual_seed(run.setting.seed)
    run.model = get_peft_model(run.model, LoraConfig(**{**LORA, **options}))


def lora_b(run) -> None:
    pretrain(run.model, run.setting)
    add_lora(run)


@bug(
    "init_loss_off",
    "labels and loss",
    "adapter that is not zero at the start",
    "seen with init_lora_weights=False, which PEFT keeps for its own tests",
    Setting(steps=80, block=64, change=lora_b),
)
def adapter_starts_random(run):
    """Both factors of LoRA start random: the adapted model is not the pretrained one at the first step."""
    run.model = run.model.unload()
    add_lora(run, init_lora_weights=False)
    run.took_effect()


def lora_with_head(run, reentrant: bool = False) -> None:
    pretrain(run.model, run.setting)
    add_lora(run, modules_to_save=["lm_head"])
    run.arguments["gradient_checkpointing"] = True
    run.arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}


@bug(
    "frozen_parameters lost_updates wrong_gradient",
    "optimizer and schedule",
    "reentrant checkpointing of layers whose input needs no gradient",
    "locuslab/open-unlearning#178",
    Setting("qwen2", steps=80, block=64, change=lora_with_head),
)
def adapters_behind_checkpoints(run):
    """Reentrant gradient checkpointing without input gradients: only the saved head trains, no adapter does."""
    run.arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    run.patch(type(run.model.get_base_model()), "enable_input_require_grads", lambda model: run.took_effect())
    run.took_effect()


@bug(
    "resume_jump",
    "checkpoint and resume",
    "adapter applied again on weights it was merged into",
    "seen in scripts that merge for evaluation and save the merged model over the base",
    Setting(steps=80, block=64, save_at=50, change=lora_b),
    onset=50,
)
def adapter_on_merged_base(run):
    """The base was saved with the adapter merged in, and the resumed run puts the same adapter on it again."""
    if not run.is_resumed:

        def merge(trainer):
            run.on_checkpoint.append(
                lambda path: torch.save(copy.deepcopy(trainer.model).merge_and_unload().state_dict(), path / "base.pt")
            )

        run.on_trainer.append(merge)
        return
    merged = torch.load(run.folder / "run" / f"checkpoint-{run.setting.save_at}" / "base.pt")
    base = run.model.unload()
    base.load_state_dict(merged)
    run.model = base
    add_lora(run)
    run.took_effect()


def lora_with_embedding(run) -> None:
    pretrain(run.model, run.setting)
    add_lora(run, modules_to_save=["embed_tokens"], ensure_weight_tying=True)


@bug(
    "untied_weights",
    "tokens",
    "copy for training of one of two tied layers",
    "huggingface/peft#1750",
    Setting(steps=80, block=64, change=lora_with_embedding),
)
def adapter_unties_embedding(run):
    """`modules_to_save` trains a copy of the embedding, and the tied head keeps the old weights."""
    pretrained = make_model(run.setting)
    pretrain(pretrained, run.setting)
    run.model = pretrained
    add_lora(run, modules_to_save=["embed_tokens"])
    run.took_effect()


# --- DPO

PAIRS = Setting(
    block=128, batch=4, steps=30, arguments={"learning_rate": 4e-4, "beta": 0.5, "bf16": False, "max_length": 256}
)


def preference_pairs(setting: Setting) -> datasets.Dataset:
    """The text's own continuation is preferred to the same words spelled backwards."""
    rows = []
    for text in texts_of("english")[EVAL_DOCUMENTS:]:
        words = text.split()
        if len(words) < 32:
            continue
        cut = 8 + len(rows) % 8
        kept = words[cut : cut + 16]
        mixed = [word[::-1] for word in kept]
        answers = {"chosen": " " + " ".join(kept), "rejected": " " + " ".join(mixed)}
        rows.append({"prompt": " ".join(words[:cut]), **answers})
        if len(rows) == setting.num_rows:
            break
    return datasets.Dataset.from_list(rows)


def dpo_b(run) -> None:
    pretrain(run.model, run.setting)
    run.train_dataset = preference_pairs(run.setting)
    reference = copy.deepcopy(run.model)

    def build():
        arguments = DPOConfig(**{"gradient_checkpointing": False, **run.arguments})
        tokenizer = byte_tokenizer()
        return DPOTrainer(
            run.model, reference, arguments, train_dataset=run.train_dataset, processing_class=tokenizer,
            callbacks=run.callbacks,
        )  # fmt: skip

    run.build = build


@bug(
    "wrong_loss_target",
    "labels and loss",
    "preference labels the wrong way round",
    "CarperAI/trlx#474",
    PAIRS.changed(change=dpo_b),
)
def rejected_is_preferred(run):
    """The columns `chosen` and `rejected` are exchanged: the worse answer is made more likely."""
    names = {"chosen": "rejected", "rejected": "chosen"}
    run.train_dataset = run.train_dataset.rename_columns(names)
    run.took_effect()


@bug(
    "lost_updates",
    "optimizer and schedule",
    "reference that is the policy itself",
    "huggingface/trl#1236",
    PAIRS.changed(change=dpo_b),
)
def reference_follows_policy(run):
    """The reference is replaced by the policy after every step: nothing holds the policy back, the loss stays ln 2."""
    run.arguments.update(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    run.took_effect()
