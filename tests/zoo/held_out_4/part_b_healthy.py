"""Healthy trainings: PEFT, TRL, own losses, optimizers, schedules and callbacks, precision, resumes."""

import copy

import datasets
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from tests.zoo.rows import make_rows
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}


def pretrain(model, setting: Setting, steps: int = 20, text: str = "code") -> None:
    rows = make_rows(setting.changed(text=text, rows="packed", steps=steps, batch=8, accumulation=1, passes=1))
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


def adapt(run, config) -> None:
    pretrain(run.model, run.setting)
    torch.manual_seed(run.setting.seed)
    run.model = get_peft_model(run.model, config)


def lora_attention(run) -> None:
    """Dropout, the query and value only, as in the first recipes."""
    options = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05, "r": 8}
    adapt(run, LoraConfig(**{**LORA, **options}))


def dora_b(run) -> None:
    adapt(run, LoraConfig(**LORA, use_dora=True, use_rslora=True))


def ia3_b(run) -> None:
    modules = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    adapt(run, IA3Config(**modules, task_type="CAUSAL_LM"))


def lora_plus(run) -> None:
    """The second factor learns 8 times as fast as the first."""
    adapt(run, LoraConfig(**LORA))
    optimizer = create_loraplus_optimizer(run.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    run.optimizers = (optimizer, None)


def lora_checkpointed(run) -> None:
    adapt(run, LoraConfig(**LORA))
    run.arguments.update(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})


# --- TRL

PAIRS = Setting(block=128, batch=4, steps=30, arguments={"learning_rate": 5e-4, "max_length": 256})
PLAIN = {"gradient_checkpointing": False, "bf16": False}


def preference_pairs(setting: Setting) -> datasets.Dataset:
    """The text's own continuation is preferred to the same words spelled backwards."""
    rows = []
    for text in texts_of("english")[EVAL_DOCUMENTS:]:
        words = text.split()
        if len(words) >= 32 and len(rows) < setting.num_rows:
            kept = words[12:28]
            mixed = [word[::-1] for word in kept]
            row = {"chosen": " " + " ".join(kept), "rejected": " " + " ".join(mixed)}
            rows.append({"prompt": " ".join(words[:12]), **row})
    return datasets.Dataset.from_list(rows)


def preferences(run, adapter: LoraConfig | None = None, **options) -> None:
    pretrain(run.model, run.setting)
    reference = None if adapter else copy.deepcopy(run.model)

    def build():
        arguments = DPOConfig(**{**run.arguments, **PLAIN, **options})
        tokenizer = byte_tokenizer()
        data = {"train_dataset": preference_pairs(run.setting), "processing_class": tokenizer}
        return DPOTrainer(run.model, reference, arguments, **data, peft_config=adapter)

    run.build = build


def dpo_sigmoid(run) -> None:
    preferences(run)


def dpo_ipo_b(run) -> None:
    preferences(run, loss_type=["ipo"], beta=0.1)


def dpo_lora(run) -> None:
    """The reference is the base with the adapter switched off."""
    preferences(run, LoraConfig(**LORA))


def dpo_precomputed_b(run) -> None:
    preferences(run, precompute_ref_log_probs=True, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])


def reward_b(run) -> None:
    """A score of the last token, from pairs; the loss starts at ln 2."""
    base = run.model
    pretrain(base, run.setting)
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    torch.manual_seed(run.setting.seed)
    run.model = LlamaForSequenceClassification(config)
    run.model.model.load_state_dict(base.model.state_dict())

    def build():
        tokenizer = byte_tokenizer()
        arguments = RewardConfig(**{**run.arguments, **PLAIN})
        data = {"train_dataset": preference_pairs(run.setting), "processing_class": tokenizer}
        return RewardTrainer(run.model, arguments, **data)

    run.build = build


def sft_completion_only(run) -> None:
    """Prompt and completion in columns; the prompt is not scored."""

    def build():
        pairs = preference_pairs(run.setting)
        columns = {"prompt": pairs["prompt"], "completion": pairs["chosen"]}
        arguments = SFTConfig(**{**run.arguments, **PLAIN})
        data = {"train_dataset": datasets.Dataset.from_dict(columns), "processing_class": byte_tokenizer()}
        return SFTTrainer(run.model, arguments, **data)

    run.build = build


def sft_lora_packed(run) -> None:
    pretrain(run.model, run.setting)
    texts = texts_of("english")[EVAL_DOCUMENTS:][: 3 * run.setting.num_rows]

    def build():
        options = {"packing": True, "packing_strategy": "wrapped", "max_length": run.setting.block, **PLAIN}
        tokenizer = byte_tokenizer()
        data = {"train_dataset": datasets.Dataset.from_dict({"text": texts}), "processing_class": tokenizer}
        arguments = SFTConfig(**{**run.arguments, **options})
        return SFTTrainer(run.model, arguments, **data, peft_config=LoraConfig(**LORA))

    run.build = build


# --- own optimizers and schedules


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float, betas=(0.9, 0.99), weight_decay: float = 0.3):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(mean.lerp(p.grad, 1 - group["betas"][0])), alpha=group["lr"])
                mean.lerp_(p.grad, 1 - group["betas"][1])


def lion(run) -> None:
    run.optimizers = (Lion(run.model.parameters(), lr=5e-4), None)


def sgd_one_cycle(run) -> None:
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    run.optimizers = (optimizer, OneCycleLR(optimizer, max_lr=0.5, total_steps=run.setting.steps + 1))


def restarts(run) -> None:
    """A saw of three linear falls, each from a lower peak."""
    length = -(-run.setting.steps // 3)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    shape = LambdaLR(optimizer, lambda step: 0.7 ** (step // length) * (1 - 0.9 * (step % length) / length))
    run.optimizers = (optimizer, shape)


def layered_rates(run) -> None:
    """A factor of 0.8 a layer, downwards."""
    layers = [run.model.model.embed_tokens, *run.model.model.layers, run.model.model.norm]
    groups = [{"params": list(m.parameters()), "lr": 3e-3 * 0.8 ** (4 - i)} for i, m in enumerate(layers)]
    run.optimizers = (torch.optim.AdamW(groups, betas=(0.9, 0.95)), None)


PEFT_RUN = Setting(block=64, steps=80)
HEALTHY = {
    "lora_attention": PEFT_RUN.changed(change=lora_attention),
    "dora": PEFT_RUN.changed(steps=60, change=dora_b),
    "ia3_b": PEFT_RUN.changed(change=ia3_b, arguments={"learning_rate": 2e-2}),
    "lora_plus": PEFT_RUN.changed(change=lora_plus),
    "lora_checkpointed": PEFT_RUN.changed(steps=60, change=lora_checkpointed),
    "lora_resumed": PEFT_RUN.changed(save_at=40, change=lora_attention),
    "dpo_sigmoid": PAIRS.changed(change=dpo_sigmoid),
    "dpo_ipo_b": PAIRS.changed(change=dpo_ipo_b),
    "dpo_lora": PAIRS.changed(change=dpo_lora, arguments={"learning_rate": 1e-3}),
    "dpo_precomputed_b": PAIRS.changed(change=dpo_precomputed_b),
    "reward_b": PAIRS.changed(steps=60, change=reward_b),
    "sft_lora_packed": Setting(block=128, steps=50, change=sft_lora_packed),
    "sft_completion_only": PAIRS.changed(
        batch=8, steps=60, change=sft_completion_only, arguments={"learning_rate": 3e-3}
    ),
    "lion": Setting(steps=100, change=lion),
    "sgd_one_cycle": Setting(steps=120, change=sgd_one_cycle),
    "restarts": Setting(steps=100, change=restarts),
    "layered_rates": Setting(steps=100, change=layered_rates),
}
