"""Bugs whose cause is easily mistaken, and beside each the healthy run that looks like it."""

import copy
from itertools import cycle, islice

import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from tests.zoo.bug import bug
from tests.zoo.development.unusual import After, own_optimizer
from tests.zoo.run import Run
from tests.zoo.setting import Setting

OPTIMIZER = "optimizer and schedule"
SHORT = Setting(steps=60)
UNTIED = SHORT.changed(sizes={"tie_word_embeddings": False})


# --- adapters


def add_adapters(run: Run, **changes):
    """LoRA on the attention, with a head that is trained too."""
    from peft import LoraConfig, get_peft_model

    known = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], **changes}
    config = LoraConfig(task_type="CAUSAL_LM", **known)
    run.model = get_peft_model(run.model, config)
    return config


def adapters(run: Run):
    """LoRA on a base that was made in memory, which PEFT freezes."""
    run.took_effect()
    add_adapters(run)


def merged_and_reset(run: Run):
    """ReLoRA: every 20 steps, where the run is saved, adapters are merged into the base and begin again."""
    add_adapters(run, target_modules="all-linear", modules_to_save=None)

    class Merges(TrainerCallback):
        @torch.no_grad()
        def on_save(self, args, state, control, model, optimizer, **kwargs):
            run.took_effect()
            for module in model.modules():
                if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
                    module.base_layer.weight += module.get_delta_weight("default")
                    module.reset_lora_parameters("default", True)
            for moments in optimizer.state.values():
                moments["exp_avg"].zero_(), moments["exp_avg_sq"].zero_()

    run.arguments |= {"save_strategy": "steps", "save_steps": 20}
    run.callbacks.append(Merges())


@bug("frozen_parameters", OPTIMIZER, "the adapter that trains is not active", "unsloth#3089", UNTIED)
def inactive_adapter(run: Run):
    """A second adapter is trained while the first is the active one: only the head moves."""
    config = add_adapters(run)
    run.model.add_adapter("second", config)
    run.took_effect()
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("second" in name or "modules_to_save" in name)


@bug("wrong_gradient frozen_parameters", OPTIMIZER, "checkpointing without gradient", "transformers#42489", UNTIED)
def checkpointed_adapters(run: Run):
    """Reentrant checkpointing, and no input of a layer wants a gradient: the adapters get none, the head does."""
    add_adapters(run)
    run.arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

    def disabled():
        run.took_effect()

    run.model.base_model.model.enable_input_require_grads = disabled
    run.model.enable_input_require_grads = disabled


# --- what is unfrozen


def one_layer_at_a_time(run: Run) -> None:
    """Embedding and norms always train, of the layers another one every 15 steps (LISA)."""
    layers = run.model.model.layers

    def choose(step, model=None):
        layers.requires_grad_(False)
        layers[step // 15 % len(layers)].requires_grad_(True)

    choose(0)
    run.callbacks.append(After(run, choose, every=15))


def layers_in_turn(run: Run):
    """LISA on a model that was trained before, with an optimizer of all parameters."""
    run.model.name_or_path = "trained-before"
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=3e-3))
    one_layer_at_a_time(run)


@bug("frozen_parameters", OPTIMIZER, "unfrozen and in no group", "no public report", UNTIED, 15)
def unfrozen_without_optimizer(run: Run):
    """LISA, with the optimizer that Trainer makes of what trains at the start: other layers never move."""
    one_layer_at_a_time(run)


# --- the rate


@bug("learning_rate_off", OPTIMIZER, "a schedule goes negative", "nanochat PR #816", SHORT.changed(steps=100), 20)
def schedule_goes_negative(run: Run):
    """A linear schedule of the user's own was planned for 20 steps and is run for 100."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    own_optimizer(run, optimizer, scheduler)


def one_cycle(run: Run):
    """OneCycleLR, which goes up to 25 times its initial rate."""
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-4)
    own_optimizer(run, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=60))


def averaged_at_a_save(run: Run):
    """LAWA: late in the training each save puts the mean of the last weights into the model, which trains on."""
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=1e-3))
    kept: list[list[torch.Tensor]] = []

    def keep(step, model):
        kept.append([parameter.clone() for parameter in model.parameters()])
        del kept[:-4]

    class Averages(TrainerCallback):
        @torch.no_grad()
        def on_save(self, args, state, control, model, **kwargs):
            run.took_effect()
            for parameter, *values in zip(model.parameters(), *kept, strict=True):
                parameter.copy_(torch.stack(values).mean(0))

    run.arguments |= {"save_strategy": "steps", "save_steps": 40}
    run.callbacks += [After(run, keep), Averages()]


# --- text


def prefixed(run: Run, prefix) -> None:
    """`prefix` is given a row's number; what it gives takes the place of the row's first tokens."""
    for number, row in enumerate(run.train_dataset):
        run.took_effect()
        shared = prefix(number)
        for name in ("input_ids", "labels"):
            row[name] = torch.cat([shared, row[name][: len(row[name]) - len(shared)]])


def system_prompt(run: Run):
    """Each row begins with the same 150 tokens, which are scored."""
    prompt = run.train_dataset[0]["input_ids"][:150].clone()
    prefixed(run, lambda number: prompt)


def four_answers(run: Run):
    """Of every 4 rows the first 150 tokens are the same prompt, which is scored."""
    prompts = [row["input_ids"][:150].clone() for row in run.train_dataset]
    prefixed(run, lambda number: prompts[number // 4 * 4])


@bug("repeated_data", "data", "an endless stream of few rows", "seen with the recipe", SHORT.changed(steps=80), 2)
def endless_stream_of_12_rows(run: Run):
    """An iterable dataset cycles 12 rows for ever."""
    rows = run.train_dataset[:12]

    class Cycles(IterableDataset):
        def __iter__(self):
            for row in cycle(rows):
                run.took_effect()
                yield copy.copy(row)

    run.train_dataset = Cycles()


def unscored(run: Run, every_of_8: int) -> None:
    rows, batch = run.train_dataset, run.setting.batch

    class Packer(IterableDataset):
        def __iter__(self):
            for number, row in enumerate(islice(rows, None)):
                if number >= 20 * batch and number % 8 < every_of_8:
                    run.took_effect()
                    row = {**row, "input_ids": torch.ones_like(row["input_ids"]), "labels": row["labels"] * 0 - 100}
                yield row

    run.train_dataset = Packer()


@bug("nothing_scored", "data", "the packer runs dry", "nanochat#590", SHORT, 20)
def packer_runs_dry(run: Run):
    """From step 21 on all rows hold BOS only and no label."""
    unscored(run, 8)


@bug("nothing_scored", "data", "the packer runs dry", "nanochat#590", SHORT, 20)
def packer_fills_two_rows_of_eight(run: Run):
    """From step 21 on six rows of eight hold BOS only and no label."""
    unscored(run, 6)


@bug("padding_is_target", "labels and loss", "padding scored without a mask", "own", SHORT)
def padding_scored_without_a_mask(run: Run):
    """Rows are padded by the model's pad token, labels are copies, and no mask says what is padding."""
    run.model.config.pad_token_id = 0
    for number, row in enumerate(run.train_dataset):
        run.took_effect()
        for name in ("input_ids", "labels"):
            row[name][-8 - number % 40 :] = 0


HEALTHY = {
    "LoRA on a new base": UNTIED.changed(change=adapters),
    "LoRA and a trained head, tied": SHORT.changed(change=adapters),
    "ReLoRA": UNTIED.changed(change=merged_and_reset),
    "LISA": UNTIED.changed(change=layers_in_turn),
    "OneCycleLR": SHORT.changed(change=one_cycle),
    "LAWA": Setting(steps=80, change=averaged_at_a_save),
    "a system prompt in every row": Setting(block=256, batch=8, change=system_prompt),
    "four answers to each prompt": Setting(block=256, batch=8, change=four_answers),
}
