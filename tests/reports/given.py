"""Reports that the guards were fixed with: faults that they missed or misnamed, and healthy trainings that they
judged wrongly."""

import torch
from torch.nn import functional as F

from tests.reports.report import SHORT, UNTIED, Report
from tests.zoo.development import causes, objectives
from tests.zoo.development.unusual import own_optimizer
from tests.zoo.run import Run
from tests.zoo.setting import Setting


def own_rate(run: Run, planned: int) -> None:
    """A linear schedule of the user's own, which is negative after `planned` steps."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    own_optimizer(run, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / planned))


# --- healthy trainings: silence is right


def distilled(run: Run):
    """The loss is the divergence from a teacher alone."""
    objectives.distilled(run)


def distilled_at_a_negative_rate(run: Run):
    """The same, and a schedule of the user's own goes negative after step 20."""
    distilled(run)
    own_rate(run, 20)


def lists(run: Run):
    """A micro-batch is a list of rows, from which `compute_loss` makes the tensors, as in GRPOTrainer."""

    class Rows(run.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            run.took_effect()
            ids = torch.stack([row["input_ids"] for row in inputs])
            outputs = model(input_ids=ids, labels=ids)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    run.trainer_class, run.collator = Rows, lambda rows: rows


def lists_at_a_negative_rate(run: Run):
    """The same, and a schedule of the user's own goes negative after step 20."""
    lists(run)
    own_rate(run, 20)


def pairs(run: Run):
    """Of each two padded rows one is preferred by a score of its first token; there are no labels."""

    class Pairs(run.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            run.took_effect()
            score = model(**inputs).logits[:, 0, 0]
            return -F.logsigmoid(score[::2] - score[1::2]).mean()

    for row in run.train_dataset:
        del row["labels"]
    run.trainer_class = Pairs


def pairs_at_a_negative_rate(run: Run):
    """The same, and a schedule of the user's own goes negative after step 20."""
    pairs(run)
    own_rate(run, 20)


def merged(run: Run):
    """ReLoRA: adapters are merged into the base and reset every 20 steps, where the run is saved."""
    causes.merged_and_reset(run)


def merged_at_a_negative_rate(run: Run):
    """The same, and a schedule of the user's own goes negative after step 20."""
    merged(run)
    own_rate(run, 20)


# --- faults


def rate_goes_negative(run: Run):
    """A linear schedule of the user's own was planned for 20 steps and is run for 100."""
    own_rate(run, 20)


def rate_ends_at_zero(run: Run):
    """The same schedule, planned for 101 steps."""
    own_rate(run, 101)


def two_adapters(run: Run, active: str) -> None:
    """The second is trained, and a head; the base was trained before."""
    config = causes.add_adapters(run)
    run.model.add_adapter("second", config)
    run.model.set_adapter(active)
    base = run.model.get_base_model()
    base.name_or_path = base.config.name_or_path = "trained-before"
    run.took_effect()
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("second" in name or ("modules_to_save" in name and active in name))


def inactive_adapter(run: Run):
    """A second adapter and a head are trained on a base that has a name, while the first adapter is active."""
    two_adapters(run, "default")


def active_adapter(run: Run):
    """The same, and the second adapter is active."""
    two_adapters(run, "second")


def packer_runs_dry(run: Run):
    """From step 21 on all rows hold BOS only and no label."""
    causes.unscored(run, 8)


def packer_fills_two_rows_of_eight(run: Run):
    """From step 21 on six rows of eight hold BOS only and no label."""
    causes.unscored(run, 6)


def packer_goes_on(run: Run):
    """The same stream, and every row is filled."""
    run.took_effect()
    causes.unscored(run, 0)


def full_mask(run: Run):
    """`compute_loss` builds a 4-D mask that hides nothing."""
    objectives.full_mask_in_compute_loss.apply(run)


def causal_mask(run: Run):
    """`compute_loss` builds a 4-D mask that hides later tokens."""

    def loss_of(model, inputs):
        ids = inputs["input_ids"]
        hidden = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
        outputs = model(input_ids=ids, attention_mask=hidden.expand(len(ids), 1, -1, -1))
        return objectives.next_token(outputs.logits, inputs["labels"]), outputs

    objectives.compute(run, loss_of)


def checkpointed_without_gradient(run: Run):
    """LoRA and a head with reentrant checkpointing, and no input of a layer requires a gradient."""
    causes.checkpointed_adapters.apply(run)


def checkpointed(run: Run):
    """The same, and the inputs require a gradient."""
    run.took_effect()
    causes.add_adapters(run)
    run.arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


NEGATIVE = ("learning_rate_off",)
REPORTS = [
    Report(
        "distillation",
        ("huggingface/transformers#1181",),
        "Distillation by a divergence alone.",
        distilled,
        distilled_at_a_negative_rate,
        NEGATIVE,
        healthy=True,
    ),
    Report(
        "negative_rate",
        ("karpathy/nanochat#816",),
        "A schedule of the user's own goes negative, and the loss rises.",
        rate_goes_negative,
        rate_ends_at_zero,
        NEGATIVE,
        Setting(),
    ),
    Report(
        "batch_is_a_list",
        ("huggingface/trl#2703",),
        "GRPOTrainer's micro-batches are lists.",
        lists,
        lists_at_a_negative_rate,
        NEGATIVE,
        SHORT.changed(arguments={"remove_unused_columns": False}),
        healthy=True,
    ),
    Report(
        "batch_is_a_list_on_two_ranks",
        ("huggingface/trl#2703",),
        "The same, on two ranks.",
        lists,
        lists_at_a_negative_rate,
        NEGATIVE,
        SHORT.changed(arguments={"remove_unused_columns": False}, ranks=2, batch=4),
        healthy=True,
    ),
    Report(
        "pairs_without_labels",
        ("https://huggingface.co/docs/trl/dpo_trainer",),
        "Batches of preference and reward trainers have padding and no labels.",
        pairs,
        pairs_at_a_negative_rate,
        NEGATIVE,
        SHORT.changed(rows="padded"),
        healthy=True,
    ),
    Report(
        "inactive_adapter",
        ("unslothai/unsloth#3089",),
        "The adapter that is trained is not the active one.",
        inactive_adapter,
        active_adapter,
        ("frozen_parameters",),
        UNTIED,
    ),
    Report(
        "packer_runs_dry",
        ("karpathy/nanochat#590",),
        "The packer's buffer fills with texts that fit no row; then rows score nothing.",
        packer_runs_dry,
        packer_goes_on,
        ("nothing_scored",),
    ),
    Report(
        "packer_fills_two_rows_of_eight",
        ("karpathy/nanochat#590",),
        "The same, for six rows of eight.",
        packer_fills_two_rows_of_eight,
        packer_goes_on,
        ("nothing_scored",),
    ),
    Report(
        "own_mask_leaks",
        ("hiyouga/LlamaFactory#9135",),
        "An attention mask that is made inside `compute_loss` hides nothing.",
        full_mask,
        causal_mask,
        ("non_causal_attention",),
    ),
    Report(
        "checkpointing_cuts_the_gradient",
        ("huggingface/transformers#26334", "huggingface/transformers#42489"),
        "With PEFT and reentrant checkpointing the adapters get no gradient.",
        checkpointed_without_gradient,
        checkpointed,
        ("wrong_gradient", "frozen_parameters"),
        UNTIED,
    ),
    Report(
        "relora",
        ("axolotl-ai-cloud/axolotl#322", "axolotl-ai-cloud/axolotl#1680"),
        "ReLoRA merges adapters into the base at a save.",
        merged,
        merged_at_a_negative_rate,
        NEGATIVE,
        UNTIED,
        healthy=True,
    ),
]
