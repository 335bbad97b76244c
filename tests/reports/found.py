"""Reports that were looked for when the guards were frozen: no guard was changed for them."""

import torch
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, get_constant_schedule
from transformers.loss.loss_utils import ForCausalLMLoss

from tests.reports.report import SHORT, UNTIED, Report
from tests.zoo.development import causes, objectives
from tests.zoo.development.unusual import own_optimizer
from tests.zoo.models import EOS
from tests.zoo.rows import IGNORED, RowStream
from tests.zoo.run import TOKENIZER, Run
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

PROMPTS = SHORT.changed(rows="prompts")
ACCUMULATED = Setting(steps=40, batch=4, accumulation=4)
RESUMED = Setting(steps=60, save_at=30)


# --- labels


def prompts_of(run: Run, shortest: int, longest: int) -> None:
    """Rows that `max_length` cuts, each with a prompt of a drawn length that is not scored."""
    generator = torch.Generator().manual_seed(0)
    for row in run.train_dataset:
        run.took_effect()
        row["labels"][: int(torch.randint(shortest, longest, (), generator=generator))] = IGNORED


def prompts_fill_rows(run: Run):
    """Prompts of 64 to 192 tokens, rows cut at 128: half of them hold no answer."""
    prompts_of(run, 64, 192)


def prompts_fit(run: Run):
    """Prompts of 32 to 96 tokens in rows of 128."""
    prompts_of(run, 32, 96)


TURN = "<|{{ message['role'] }}|>"
TURN += "{% if message['role'] == 'assistant' %}ANSWER{% else %}{{ message['content'] }}{% endif %}"
MARKED = "{% generation %}{{ message['content'] }}{% endgeneration %}"


def chats(run: Run, answer: str) -> None:
    """Rows of one question and its answer, scored where `apply_chat_template` says that the assistant speaks."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    template = "{% for message in messages %}" + TURN.replace("ANSWER", answer) + "{% endfor %}"
    length = run.setting.block
    for row, text in zip(run.train_dataset, texts_of("english")[EVAL_DOCUMENTS:], strict=False):
        run.took_effect()
        turns = [{"role": "user", "content": text[:80]}, {"role": "assistant", "content": text[80:1000]}]
        how = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
        how |= {"padding": "max_length", "truncation": True, "max_length": length}
        chat = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=True, **how)
        row["input_ids"], row["attention_mask"] = chat["input_ids"][0], chat["attention_mask"][0]
        row["labels"] = row["input_ids"].masked_fill(torch.as_tensor(chat["assistant_masks"])[0] == 0, IGNORED)


def template_without_generation(run: Run):
    """Labels come from `return_assistant_tokens_mask`, and the chat template has no `{% generation %}`."""
    chats(run, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def template_with_generation(run: Run):
    """The same template with `{% generation %}`."""
    chats(run, MARKED)


def padded_with_eos(run: Run, mask_by_value: bool) -> None:
    for row in run.train_dataset:
        run.took_effect()
        padding = row["attention_mask"] == 0
        row["input_ids"] = row["input_ids"].masked_fill(padding, EOS)
        hidden = row["input_ids"] == EOS if mask_by_value else padding
        row["labels"] = row["input_ids"].masked_fill(hidden, IGNORED)


def eos_masked_as_padding(run: Run):
    """The pad token is EOS, and labels equal to it are masked, the EOS that ends a text among them."""
    padded_with_eos(run, mask_by_value=True)


def padding_masked_by_place(run: Run):
    """The pad token is EOS, and padding is masked by its place."""
    padded_with_eos(run, mask_by_value=False)


def prompts_scored(run: Run):
    """The mask of prompts is dropped in a rewrite, and every token but padding is scored."""
    for row in run.train_dataset:
        run.took_effect()
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, IGNORED)


def prompts_masked(run: Run):
    """Only answers are scored."""
    run.took_effect()


# --- accumulation


def mean_of_each_micro_batch(run: Run):
    """The model's loss takes `num_items_in_batch` and ignores it, so nothing divides by 4 micro-batches."""

    def mean_loss(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        run.took_effect()
        return ForCausalLMLoss(logits, labels, vocab_size)

    run.model.loss_function = mean_loss


def sum_over_the_step(run: Run):
    """The loss of transformers, which divides by the targets of the step."""
    run.took_effect()


def distillation_not_divided(run: Run):
    """Half cross entropy, half divergence; `compute_loss` ignores `num_items_in_batch` over 4 micro-batches."""
    objectives.distilled_and_trained(run)


def distillation_divided(run: Run):
    """The same, with `model_accepts_loss_kwargs = False` as in the fix: Trainer divides."""
    objectives.distilled_and_trained(run)
    run.on_trainer.append(lambda trainer: setattr(trainer, "model_accepts_loss_kwargs", False))


# --- what is trained


def adapters_frozen(run: Run):
    """The model comes with its adapters and is then prepared for k-bit training, which freezes all of it."""
    adapters_trained(run)
    run.model.requires_grad_(False)


def adapters_trained(run: Run):
    """The model is prepared first and is given its adapters afterwards."""
    run.took_effect()
    run.model.enable_input_require_grads()
    causes.add_adapters(run, modules_to_save=None)


def lora_checkpointed(run: Run, are_inputs_enabled: bool) -> None:
    run.took_effect()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    causes.add_adapters(run, target_modules=names, modules_to_save=None)
    run.arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    if not are_inputs_enabled:
        run.model.enable_input_require_grads = run.model.base_model.model.enable_input_require_grads = lambda: None


def lora_checkpointed_without_inputs(run: Run):
    """LoRA on all layers and the head, reentrant checkpointing, no `enable_input_require_grads`."""
    lora_checkpointed(run, are_inputs_enabled=False)


def lora_checkpointed_with_inputs(run: Run):
    """The same with `enable_input_require_grads`."""
    lora_checkpointed(run, are_inputs_enabled=True)


def resize(run: Run) -> None:
    """As `resize_token_embeddings` was when it was reported: a new parameter. Today it keeps the one there was."""
    old = run.model.get_input_embeddings().weight
    new = torch.nn.Embedding(len(old) + 7, old.shape[1])
    new.weight.data[: len(old)] = old.data
    run.model.set_input_embeddings(new)


def optimizer_before_resize(run: Run):
    """The optimizer is made, then the embedding is replaced by a larger one, as transformers once did."""
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=3e-3))
    resize(run)


def optimizer_after_resize(run: Run):
    """The embedding is replaced first."""
    resize(run)
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=3e-3))


def rates(run: Run, of_embedding: float) -> None:
    embedding = run.model.get_input_embeddings().weight
    others = [parameter for parameter in run.model.parameters() if parameter is not embedding]
    groups = [{"params": others}, {"params": [embedding], "lr": of_embedding}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    own_optimizer(run, optimizer, get_constant_schedule(optimizer))


def embedding_rate_dropped(run: Run):
    """The lower rate that the user asked for the embedding is dropped: it trains at the rate of the rest."""
    rates(run, 3e-3)


def embedding_rate_used(run: Run):
    """The embedding trains at a tenth of the rate."""
    rates(run, 3e-4)


# --- data


class Unsharded(IterableDataset):
    """Yields all rows in every worker."""

    def __init__(self, run: Run):
        self.run, self.rows = run, run.train_dataset

    def __iter__(self):
        self.run.took_effect()
        return iter(self.rows)


def workers_repeat(run: Run):
    """A stream without sharding, read by 2 workers: each yields every row."""
    run.train_dataset = Unsharded(run)


def workers_share(run: Run):
    """The stream deals its rows to the 2 workers."""
    run.took_effect()
    run.train_dataset = RowStream(run.train_dataset)


# --- resume


def resumed_in_another_order(run: Run):
    """Resumed at step 30: the skip drops 30 batches of another permutation, and rows come a second time."""
    run.took_effect()
    if run.is_resumed:
        order = torch.randperm(len(run.train_dataset), generator=torch.Generator().manual_seed(1))
        run.train_dataset = [run.train_dataset[place] for place in order]


def resumed_in_order(run: Run):
    """Resumed at step 30 in the order of the run that was saved."""
    run.took_effect()


def resumed_from_the_beginning(run: Run):
    """Resumed at step 30 with `ignore_data_skip`: the same shuffle begins at its first row."""
    run.took_effect()
    if run.is_resumed:
        run.arguments["ignore_data_skip"] = True


REPORTS = [
    Report(
        "prompts_fill_rows",
        ("huggingface/trl#6668", "bytedance/UniVR#13"),
        "`max_length` cuts off the answers, all labels of a row are masked, and SFTTrainer reports a loss of 0.",
        prompts_fill_rows,
        prompts_fit,
        ("nothing_scored",),
    ),
    Report(
        "template_without_generation",
        ("marin-community/marin#7237", "Liquid4All/liquid-finetune#37"),
        "A chat template without `{% generation %}` gives an assistant mask of zeros: nothing is trained.",
        template_without_generation,
        template_with_generation,
        ("nothing_scored",),
        Setting(steps=20, vocabulary=4096),
    ),
    Report(
        "eos_masked_as_padding",
        ("huggingface/trl#6357", "NVIDIA-NeMo/Megatron-Bridge#4660"),
        "Padding is masked by its id, which is that of EOS: the model never learns to stop.",
        eos_masked_as_padding,
        padding_masked_by_place,
        ("eos_never_target",),
        SHORT.changed(rows="padded"),
    ),
    Report(
        "prompts_scored",
        ("karpathy/nanochat#582", "karpathy/nanochat#570"),
        "A rewrite of the loader drops the mask of prompts, and all tokens are scored.",
        prompts_scored,
        prompts_masked,
        (),
        PROMPTS,
        missed="a batch does not say which of its tokens were meant to be scored.",
    ),
    Report(
        "mean_of_each_micro_batch",
        ("huggingface/transformers#37766",),
        "The loss grows with `gradient_accumulation_steps`: the model ignores `num_items_in_batch`.",
        mean_of_each_micro_batch,
        sum_over_the_step,
        ("accumulation_mismatch",),
        ACCUMULATED,
    ),
    Report(
        "distillation_not_divided",
        ("MakazhanAlpamys/Soup#720", "huggingface/trl#6006"),
        "A distillation loss ignores `num_items_in_batch`: gradients grow with `gradient_accumulation_steps`.",
        distillation_not_divided,
        distillation_divided,
        ("accumulation_mismatch",),
        ACCUMULATED,
    ),
    Report(
        "adapters_frozen",
        ("huggingface/trl#3926", "huggingface/trl#6700"),
        "A PeftModel is given to the trainer, which freezes its adapters: nothing is trained.",
        adapters_frozen,
        adapters_trained,
        ("frozen_parameters",),
        UNTIED,
    ),
    Report(
        "lora_checkpointed",
        ("locuslab/open-unlearning#178",),
        "`enable_input_require_grads` is missing: LoRA in the layers stays at zero, LoRA on the head trains.",
        lora_checkpointed_without_inputs,
        lora_checkpointed_with_inputs,
        ("wrong_gradient", "frozen_parameters"),
        UNTIED,
    ),
    Report(
        "optimizer_before_resize",
        ("huggingface/transformers#3532",),
        "The embedding is resized after the optimizer was made, and is never updated.",
        optimizer_before_resize,
        optimizer_after_resize,
        ("frozen_parameters",),
        UNTIED,
    ),
    Report(
        "embedding_rate_dropped",
        ("unslothai/unsloth#4492",),
        "`embedding_learning_rate` is dropped without a message.",
        embedding_rate_dropped,
        embedding_rate_used,
        (),
        UNTIED,
        missed="nothing in a run says which rate was meant.",
    ),
    Report(
        "workers_repeat",
        ("huggingface/datasets#3423", "huggingface/finetrainers#394"),
        "A streamed dataset is repeated by every worker.",
        workers_repeat,
        workers_share,
        ("repeated_data",),
        SHORT.changed(workers=2),
    ),
    Report(
        "resumed_in_another_order",
        ("huggingface/accelerate#2823", "wyim-pgl/transgenic#59"),
        "A resumed run shuffles in another order, and the skip drops the wrong rows.",
        resumed_in_another_order,
        resumed_in_order,
        ("resume_replay", "repeated_data"),
        RESUMED,
    ),
    Report(
        "resumed_from_the_beginning",
        ("kyutai-labs/pocket-tts#287",),
        "Every relaunch replays the same permutation from its beginning.",
        resumed_from_the_beginning,
        resumed_in_order,
        ("resume_replay", "repeated_data"),
        RESUMED,
    ),
]
