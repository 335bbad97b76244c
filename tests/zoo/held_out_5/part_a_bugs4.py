"""Bugs of part A: attention, positions, norms, initialization, tokens, data."""

import torch
import transformers
from transformers import TrainerCallback, default_data_collator
from transformers.models.llama import modeling_llama

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

PLAIN = Setting(steps=60)


@bug(
    "non_causal_attention reference_mismatch",
    "attention and positions",
    "a norm over the whole sequence",
    "bkitano/llama-from-scratch#4",
    PLAIN,
)
def rms_norm_over_places_too(run: Run):
    """The own RMSNorm takes its mean square over places and channels: later tokens leak into earlier."""

    def forward(self, hidden):
        run.took_effect()
        square = hidden.pow(2).mean((-2, -1), keepdim=True)
        return self.weight * hidden * torch.rsqrt(square + self.variance_epsilon)

    run.patch(modeling_llama.LlamaRMSNorm, "forward", forward)


@bug(
    "",
    "attention and positions",
    "a list that repeats one layer",
    "zalandoresearch/pytorch-vq-vae#2",
    Setting(steps=80, rows="padded", sizes={"use_cache": False, "num_hidden_layers": 4}),
)
def every_layer_is_the_same_object(run: Run):
    """The layers are made as `[layer] * n`: one layer, whose weights all places share."""
    layers = run.model.model.layers
    run.model.model.layers = torch.nn.ModuleList([layers[0]] * len(layers))
    layers[0].register_forward_hook(lambda *_: run.took_effect())


@bug(
    "init_loss_off",
    "optimizer and schedule",
    "an embedding drawn with standard deviation 1",
    "pytorch/pytorch#3121",
    PLAIN,
)
def tied_embedding_drawn_with_std_one(run: Run):
    """The tied embedding keeps PyTorch's default N(0, 1), fifty times what the rest is made for."""
    weight = run.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(11))
    run.took_effect()


@bug(
    "token_out_of_range",
    "tokens",
    "token ids in bf16",
    "huu4ontocord/MDEL#44",
    Setting(steps=60, vocabulary=1025),
)
def token_ids_pass_through_bf16(run: Run):
    """The batch is cast to bf16, ids and labels included: those above 256 are rounded to a neighbour."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        return {name: value.bfloat16().long() for name, value in batch.items()}

    run.collator = collate


@bug(
    "train_eval_overlap repeated_data",
    "data",
    "overlapping windows split at random",
    "fchest/EEG-AAD#7",
    Setting(steps=100, text="german", passes=20, evaluate_every=20, arguments={"weight_decay": 0.0}),
)
def overlapping_windows_are_split_at_random(run: Run):
    """Windows that overlap by half are split at random, so half of each evaluated row is also trained on.

    The evaluation is too good; what is learned changes less.
    """
    block = run.setting.block
    stream = torch.cat([row["input_ids"] for row in run.train_dataset])
    starts = range(0, len(stream) - block + 1, block // 2)
    windows = [stream[start : start + block] for start in starts]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [{"input_ids": windows[i], "labels": windows[i].clone()} for i in order]
    run.train_dataset, run.eval_dataset = rows[16:], rows[:16]
    run.took_effect()


@bug(
    "",
    "evaluation",
    "a seed that is set in each step",
    "seen in callbacks that make sampled text repeatable",
    Setting(steps=100, family="gpt2", sizes={"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
)
def callback_seeds_before_each_step(run: Run):
    """A callback sets the seed before each step, so dropout drops the same units in each step."""

    class Seeds(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            transformers.set_seed(42)
            run.took_effect()

    run.callbacks.append(Seeds())
