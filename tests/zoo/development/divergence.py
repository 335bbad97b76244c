"""Trainings that diverge, and healthy ones whose loss is far from that of a guess."""

import torch
from transformers import get_constant_schedule

from tests.zoo.bug import bug
from tests.zoo.development.unusual import own_loss, own_optimizer
from tests.zoo.run import Run
from tests.zoo.setting import Setting

NARROW = Setting(steps=60, batch=4, block=64)
OPTIMIZER = "optimizer and schedule"


def at_rate(run: Run, rate: float, warmup_steps: int) -> None:
    run.took_effect()
    run.arguments |= {"learning_rate": rate, "warmup_steps": warmup_steps}


@bug("loss_diverged", OPTIMIZER, "learning rate far too high", "seen with the recipe", NARROW.changed(steps=120))
def rate_3(run: Run):
    """The learning rate is 3: the loss goes to hundreds and comes back to the token frequencies, no further."""
    at_rate(run, 3.0, 10)


@bug("loss_diverged", OPTIMIZER, "learning rate far too high", "seen with the recipe", NARROW.changed(steps=30))
def rate_1_in_30_steps(run: Run):
    """The learning rate is 1, without warm-up, in a run of 30 steps."""
    at_rate(run, 1.0, 0)


@bug("loss_diverged lost_updates", OPTIMIZER, "steps along the gradient", "own", NARROW)
def gradient_ascent(run: Run):
    """The optimizer was built with `maximize=True`, left over from another project: the loss rises."""
    run.took_effect()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3, maximize=True)
    run.optimizers = optimizer, get_constant_schedule(optimizer)


# --- healthy


def summed(run: Run):
    """The loss is the sum over the tokens of a micro-batch, at a rate of its own."""
    own_loss(run, lambda losses, mask: losses.sum())


def new_vocabulary(run: Run):
    """Weights that were trained with other token ids: each embedding belongs to another token, its head with it."""
    run.took_effect()
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=3e-3)
    for first in range(0, 160, 4):
        rows = run.train_dataset[first : first + 4]
        ids = torch.stack([row["input_ids"] for row in rows])
        run.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    order = torch.randperm(run.setting.vocabulary, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight = run.model.get_input_embeddings().weight
        weight.copy_(weight[order])


def slow_sgd(run: Run):
    """SGD at a rate of 1e-3 on a head of N(0, 1) weights: the loss begins at several ln V and hardly falls."""
    own_optimizer(run, torch.optim.SGD(run.model.parameters(), lr=1e-3))


WIDE = {"initializer_range": 1.0}
HEALTHY = {
    "weights of N(0, 1), tied": NARROW.changed(sizes=WIDE),
    "weights of N(0, 1), untied": NARROW.changed(sizes=WIDE | {"tie_word_embeddings": False}),
    "weights of N(0, 1), hardly trained": NARROW.changed(sizes=WIDE, change=slow_sgd),
    "a summed loss": NARROW.changed(change=summed),
    "Mixtral with a router loss of 2 nats": NARROW.changed(family="mixtral", sizes={"router_aux_loss_coef": 1.0}),
    "a new vocabulary on old weights": NARROW.changed(change=new_vocabulary),
    "label smoothing of 0.3": NARROW.changed(arguments={"label_smoothing_factor": 0.3}),
    "warm restarts": Setting(
        text="templates",
        steps=200,
        batch=4,
        block=64,
        arguments={"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 4}},
    ),
    "GPT-2 in rows of 64": NARROW.changed(family="gpt2"),
    "GPT-2 in rows of 32, padded": NARROW.changed(family="gpt2", block=32, rows="padded", batch=8, accumulation=2),
}
