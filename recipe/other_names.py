"""What people call the keys: names of other scripts and libraries -> the key, or the words that have the same effect.

A message proposes `KEY`, or `--key value ...`, or to remove the key; tests apply what it proposes.
"""

import difflib
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe.config_checks import REFUSED, nearest_choice
from recipe.conflicts import num_ranks
from recipe.keys import FieldType


def _by_name(table: str) -> dict[str, str]:
    """Of lines `what: name name ...`: the name -> what; a line without a colon goes on with the one before."""
    found, what = {}, ""
    for line in table.strip().splitlines():
        before, colon, names = line.rpartition(": ")
        what = before.strip() if colon else what
        found |= dict.fromkeys(names.split(), what)
    return found


# The key, and other names of it whose values mean the same.
NAMES = _by_name("""
learning_rate: lr peak_lr max_lr base_lr peak_learning_rate
per_device_train_batch_size: batch_size bs batch train_batch_size micro_batch_size mini_batch_size device_batch_size
    per_gpu_train_batch_size per_device_batch_size
per_device_eval_batch_size: eval_batch_size per_gpu_eval_batch_size val_batch_size
gradient_accumulation_steps: grad_accum gradient_accumulation grad_accumulation grad_accum_steps accumulation_steps
    accumulate_grad_batches grad_acc
block_size: seq_len seq_length sequence_length sequence_len max_length max_seq_length max_seq_len context_length
    context_size context_window context ctx_len n_ctx
max_steps: steps num_steps n_steps train_steps total_steps iters max_iters num_iterations iterations num_train_steps
train_tokens: tokens num_tokens max_tokens total_tokens token_budget num_train_tokens
warmup_steps: warmup warmup_iters num_warmup_steps lr_warmup_steps
weight_decay: wd decay l2
adam_beta1: beta1 b1
adam_beta2: beta2 b2
adam_epsilon: eps epsilon adam_eps
max_grad_norm: clip grad_clip gradient_clip clip_grad clip_grad_norm grad_clip_norm gradient_clipping
    gradient_clip_val
lr_scheduler_type: scheduler lr_scheduler lr_schedule schedule scheduler_type lr_decay_style
optim: optimizer optimizer_type opt
source: dataset data train_file train_files train_data data_path dataset_path dataset_name data_dir corpus
    text_file training_data dataset_id
text_column: text_field text_key text_column_name dataset_text_field content_column column
model_name_or_path: model model_name model_path base_model pretrained_model pretrained_model_name_or_path init_from
model_config: config_name model_config_path model_config_name arch
tokenizer: tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir
output_dir: out_dir output out save_dir checkpoint_dir ckpt_dir run_dir
save_steps: save_every save_interval checkpoint_every checkpointing_steps save_freq
logging_steps: log_every log_interval log_steps logging_interval print_every
eval_steps: eval_every eval_interval evaluate_every val_every val_interval
save_total_limit: keep_last max_checkpoints keep_checkpoints
dataloader_num_workers: num_workers workers n_workers preprocessing_num_workers
seed: random_seed rng_seed manual_seed
torch_compile: compile use_compile
attn_implementation: attention attn attention_implementation attn_impl
resume_from_checkpoint: resume resume_from checkpoint load_checkpoint
report_to: tracker logger trackers
num_lanes: lanes
document_masking: mask_documents intra_document_masking
use_liger_kernel: liger use_liger
""")
EPOCHS = ("epochs", "epoch", "num_epochs", "n_epochs", "max_epochs", "num_train_epochs", "train_epochs")
GLOBAL_BATCH = ("global_batch_size", "total_batch_size", "effective_batch_size")
SHARES = ("warmup_ratio", "warmup_fraction", "warmup_frac", "warmup_proportion")  # of the steps
# Names for which there is nothing to set.
NOTHING = _by_name("""
the hold-out is cut from source, eval_skip and eval_documents say where: validation_file eval_file test_file val_file
    eval_dataset validation_dataset eval_data val_data
the hold-out is the last 1 % of source, or eval_skip and eval_documents: validation_split val_split test_size
    validation_split_percentage eval_split split
documents are always packed into full rows: packing pack concatenate group_texts
every source is streamed: streaming stream
the train stream is always shuffled, by train_seed: shuffle shuffle_data shuffle_buffer_size buffer_size
run_clm.sh takes every GPU, or set CUDA_VISIBLE_DEVICES or NPROC: num_gpus n_gpu gpus n_gpus devices num_processes
    nproc_per_node world_size
it is the last part of source, hf://OWNER/NAME/CONFIG: dataset_config_name dataset_config subset
the shape of a new model is in the JSON that model_config names: vocab_size hidden_size n_embd d_model num_layers
    n_layer num_hidden_layers n_layers num_heads n_head num_attention_heads intermediate_size dim
rows are full, so nothing is padded or cut: padding padding_side truncation pad_to_multiple_of
the recipe never runs code of a repository: trust_remote_code
bf16 is the lowest precision that the recipe trains in: fp8 fp4 int8 load_in_8bit load_in_4bit quantization
nothing is preprocessed as a whole: preprocessing_batch_size overwrite_cache cache_dir
""")
OPTIONS = ("help", "json")  # of the commands
HALVES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16"}


def refusal(name: str, value: Any, known: Mapping[str, FieldType], values: Mapping[str, Any]) -> str:
    """What to say about a key that does not exist or is refused. `values`: of all other keys."""
    low = name.lower()
    if name in REFUSED and low not in EPOCHS and low not in SHARES:
        return f"is refused: {REFUSED[name]}"
    if low in EPOCHS:
        return epochs(value, values)
    if low in NOTHING:
        return f"unknown key: {NOTHING[low]}; remove it"
    if words := _words_for(low, value, values):
        return f"unknown key; did you mean {words}?"
    key = NAMES.get(low)
    if key is None:
        return _misspelt(name, value, known)
    if key == "source" and (hub := _hub_source(value)):
        return f"unknown key; did you mean --source {hub}?"
    if key == "per_device_train_batch_size" and type(value) is int:
        return f"unknown key; did you mean {key}? {_batch(value, values)}"
    return _renamed(key, value, known)


def _misspelt(name: str, value: Any, known: Mapping[str, FieldType]) -> str:
    near = difflib.get_close_matches(name.lower(), [*known, *NAMES, *OPTIONS], n=1)
    if near and near[0] in OPTIONS:
        return f"unknown key; did you mean --{near[0]}?"
    return _renamed(NAMES.get(near[0], near[0]), value, known) if near else "unknown key"


def _renamed(key: str, value: Any, known: Mapping[str, FieldType]) -> str:
    """With the nearest choice where the value is none of the key's."""
    choice = nearest_choice(key, value, known)
    return f"unknown key; did you mean {f'--{key} {choice}' if choice else key}?"


def _words_for(name: str, value: Any, values: Mapping[str, Any]) -> str | None:
    """The words of the command line that do what a name and its value do elsewhere."""
    if name in GLOBAL_BATCH and type(value) is int and value > 0:
        ranks, most = num_ranks(), values["per_device_train_batch_size"]
        rows = max(1, value // ranks)
        micro = max(each for each in range(1, min(most, rows) + 1) if rows % each == 0)
        return f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {rows // micro}"
    if name in ("precision", "mixed_precision", "dtype", "torch_dtype", "amp"):
        half = HALVES.get(str(value).lower().removesuffix("-mixed").removeprefix("torch."))
        return f"--{half} true" if half else "--bf16 false"
    if name in ("device", "accelerator", "cpu", "no_cuda"):
        return f"--use_cpu {'true' if str(value).lower() in ('cpu', 'true') else 'false'}"
    if name in ("use_flash_attn", "flash_attention", "flash_attn", "use_flash_attention_2", "use_flash_attention"):
        return "--attn_implementation auto"  # takes a flash kernel where there is one
    if name in ("embedding_lr_ratio", "embedding_lr_multiplier"):
        return f"--optim_args embedding_lr_ratio={value}"  # of muon
    if name in ("betas", "adam_betas") and isinstance(value, list) and len(value) == 2:
        return f"--adam_beta1 {value[0]} --adam_beta2 {value[1]}"
    if name in ("min_lr", "min_learning_rate", "lr_min", "final_lr"):
        kwargs = shlex.quote(json.dumps({"min_lr": value}))
        return f"--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {kwargs}"
    if name in SHARES:
        return f"--warmup_steps {value}"  # below 1 it is a share
    if name in ("wandb", "use_wandb", "trackio", "tensorboard"):
        return f"--report_to {name.removeprefix('use_') if value not in (False, 'false') else 'none'}"
    if name in ("wandb_project", "project_name"):
        return f"--project {shlex.quote(str(value))}"
    if NAMES.get(name) == "eval_steps" and values["eval_strategy"] == "no":
        return f"--eval_strategy steps --eval_steps {value}"
    if NAMES.get(name) == "resume_from_checkpoint" and str(value).lower() == "true":
        return "--resume_from_checkpoint latest"
    if NAMES.get(name) in ("model_config", "model_name_or_path") and isinstance(value, str):
        key = "model_config" if value.endswith(".json") else "model_name_or_path"
        return f"--{key} {shlex.quote(value)}" if key != NAMES[name] else None
    return None


def _batch(rows: int, values: Mapping[str, Any]) -> str:
    steps, block, ranks = values["gradient_accumulation_steps"], values["block_size"], num_ranks()
    total = rows * steps * ranks
    return (
        f"A step is {rows} x gradient_accumulation_steps {steps} x {ranks} process{'es' if ranks > 1 else ''} = "
        f"{total:,} rows, {total * block:,} tokens"
    )


def _hub_source(value: Any) -> str | None:
    """`owner/name` that is no file here, as a source."""
    is_name = isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value)
    return f"hf://{value}" if is_name and not Path(value).exists() and not Path(value).parent.exists() else None


def epochs(value: Any, values: Mapping[str, Any]) -> str:
    """How many tokens that many passes are, where the source is here to be measured."""
    says = "the stream has no epochs; set train_tokens or max_steps"
    from recipe.data.estimate import tokens_of_a_pass  # takes half a second

    count = tokens_of_a_pass(values["source"], values["text_column"], values["tokenizer"])
    if count is None or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        return f"{says} (a pass over English is about one token for every 4 bytes of text)"
    return f"{says}: a pass is about {count:,} tokens; did you mean --train_tokens {round(value * count)}?"
