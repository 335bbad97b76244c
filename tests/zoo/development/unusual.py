"""Runs without a bug in which somebody does on purpose what a bug may do: any warning or error is a false alarm."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import Adafactor, TrainerCallback, get_constant_schedule
from transformers.optimization import AdafactorSchedule

from tests.zoo.models import EOS
from tests.zoo.run import Run
from tests.zoo.setting import Setting

SHORT = Setting(steps=60)

# --- what a user may do to a training, and does on purpose


def own_optimizer(run: Run, optimizer: torch.optim.Optimizer, schedule=None) -> None:
    """With a constant rate, unless there is a schedule; counts its steps."""
    run.optimizers = optimizer, schedule or get_constant_schedule(optimizer)
    optimizer.register_step_post_hook(lambda *args: run.took_effect())


class After(TrainerCallback):
    """Calls `act(step, model)` without gradient after every `every`-th step."""

    def __init__(self, run: Run, act: Callable, every: int = 1):
        self.run, self.act, self.every = run, act, every

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            self.run.took_effect()
            self.act(state.global_step, model)


def own_loss(run: Run, reduce: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]) -> None:
    """`reduce` is given the loss of every target `[row, position]`, and which ones count if a column says so."""

    class Own(run.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            run.took_effect()
            inputs = dict(inputs)
            labels, mask = inputs.pop("labels")[:, 1:], inputs.pop("loss_mask", None)
            outputs = model(**inputs)
            losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none")
            loss = reduce(losses, None if mask is None else mask[:, 1:])
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Own


def added_to_the_loss(run: Run, term: Callable[..., torch.Tensor], **asked) -> None:
    """`term` is given the model's outputs; `asked` is what the model is called with besides."""

    class Adds(run.trainer_class):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            run.took_effect()
            loss, outputs = super().compute_loss(model, {**inputs, **asked}, return_outputs=True, **kwargs)
            loss = loss + term(outputs)
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Adds


def change_gradients(run: Run, change: Callable[[torch.nn.Parameter], None]) -> None:
    """`change` is given each parameter before the step, when what was accumulated has been clipped."""

    class Before(TrainerCallback):
        @torch.no_grad()
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            run.took_effect()
            for parameter in model.parameters():
                change(parameter)

    run.callbacks.append(Before())


# --- optimizers


def layerwise_rates(run: Run):
    """Each layer has 0.3 of the rate of the one above it, and the last norm's group comes first."""
    depth = len(run.model.model.layers) + 1

    def height(name: str) -> int:
        return 0 if "embed" in name else int(name.split(".")[2]) + 1 if ".layers." in name else depth

    named = reversed(list(run.model.named_parameters()))
    groups = [{"params": [value], "lr": 3e-3 * 0.3 ** (depth - height(name))} for name, value in named]
    own_optimizer(run, torch.optim.AdamW(groups))


def head_100_times_faster(run: Run):
    """The head learns at 1e-2, all else at 1e-4."""
    head = run.model.lm_head.weight
    others = [parameter for parameter in run.model.parameters() if parameter is not head]
    own_optimizer(run, torch.optim.AdamW([{"params": [head], "lr": 1e-2}, {"params": others, "lr": 1e-4}]))


def betas_of_its_own(run: Run):
    """AdamW with betas (0.9, 0.98), passed to the Trainer, whose arguments say (0.9, 0.95)."""
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01))


def coupled_decay(run: Run):
    """torch.optim.Adam, whose weight decay is an L2 penalty, on purpose."""
    own_optimizer(run, torch.optim.Adam(run.model.parameters(), lr=2e-3, weight_decay=1e-3))


def amsgrad(run: Run):
    """AdamW's AMSGrad with a long first moment and a strong decay."""
    parameters = run.model.parameters()
    own_optimizer(run, torch.optim.AdamW(parameters, 1e-3, betas=(0.99, 0.999), weight_decay=1.0, amsgrad=True))


def adafactor_without_rate(run: Run):
    """Adafactor with relative steps, which are its learning rate."""
    optimizer = Adafactor(run.model.parameters(), scale_parameter=True, relative_step=True)
    own_optimizer(run, optimizer, AdafactorSchedule(optimizer))


class CautiousAdamW(torch.optim.AdamW):
    """Of each update only what agrees with the gradient's sign, scaled up for the rest (Liang et al. 2024)."""

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter in parameters]
        result = super().step(closure)
        for parameter, old in zip(parameters, before, strict=True):
            agrees = (old - parameter) * parameter.grad > 0
            parameter.copy_(old + (parameter - old) * agrees / agrees.float().mean().clamp(min=1e-3))
        return result


def cautious_updates(run: Run):
    """A subclass of AdamW that leaves out updates against the gradient."""
    own_optimizer(run, CautiousAdamW(run.model.parameters(), lr=2e-3, weight_decay=0.0))


@torch.no_grad()
def normalise_rows(model) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.copy_(F.normalize(parameter, dim=1))


def weights_normalised(run: Run):
    """The rows of all matrices have norm 1 at the start and after each step, by a hook of the optimizer (nGPT)."""
    normalise_rows(run.model)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=2e-3, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *args: normalise_rows(run.model))
    own_optimizer(run, optimizer)


# --- weights


def slow_weights(run: Run):
    """Lookahead: every 20 steps the slow weights go 0.8 of the way to the fast ones, which go on from there."""
    slow = [parameter.detach().clone() for parameter in run.model.parameters()]

    def synchronise(step, model):
        for own, parameter in zip(slow, model.parameters(), strict=True):
            parameter.copy_(own.lerp_(parameter, 0.8))

    run.callbacks.append(After(run, synchronise, every=20))


def weights_clamped(run: Run):
    """Every 25 steps the weights are projected into a box, which holds all norms' weights close to 1."""

    def project(step, model):
        for parameter in model.parameters():
            parameter.clamp_(-1.01, 1.01)

    run.callbacks.append(After(run, project, every=25))


def sparse_weights(run: Run):
    """A mask keeps 70 % of each projection's weights at 0, after every step."""
    masks = {name: torch.rand_like(p) > 0.7 for name, p in run.model.named_parameters() if "proj" in name}

    @torch.no_grad()
    def prune(step, model):
        for name, parameter in model.named_parameters():
            parameter.mul_(masks.get(name, 1))

    prune(0, run.model)
    run.callbacks.append(After(run, prune))


def embedding_frozen_midway(run: Run):
    """From step 30 on the embedding, and the head with it, is trained no more."""

    def freeze(step, model):
        if step == 30:
            model.get_input_embeddings().weight.requires_grad_(False)

    run.callbacks.append(After(run, freeze))


def unfrozen_by_and_by(run: Run):
    """Of a model that was trained before, head and norms train first, the last layer from step 15 on, then all."""
    run.model.name_or_path = "trained-before"
    own_optimizer(run, torch.optim.AdamW(run.model.parameters(), lr=3e-3))  # Trainer's has what trains at the start
    layers = run.model.model.layers
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("lm_head" in name or "norm" in name)

    def unfreeze(step, model):
        if step in (15, 30):
            (layers[-1] if step == 15 else model).requires_grad_(True)

    run.callbacks.append(After(run, unfreeze))


def average_evaluated(run: Run):
    """Evaluation is of a moving average of the weights, which are put back after it."""
    average = [parameter.detach().clone() for parameter in run.model.parameters()]

    @torch.no_grad()
    def swap():
        for own, parameter in zip(average, run.model.parameters(), strict=True):
            kept = parameter.clone()
            parameter.copy_(own), own.copy_(kept)

    def follow(step, model):
        for own, parameter in zip(average, model.parameters(), strict=True):
            own.lerp_(parameter, 0.05)

    class Averages(run.trainer_class):
        def evaluate(self, *args, **kwargs):
            swap()
            metrics = super().evaluate(*args, **kwargs)
            swap()
            return metrics

    run.trainer_class = Averages
    run.callbacks.append(After(run, follow))


def zero_initialised(run: Run):
    """The layers' output projections and the head begin at zero (muP)."""
    run.took_effect()
    for name, parameter in run.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            torch.nn.init.zeros_(parameter)


def quantised_weights(run: Run):
    """The layers' linear weights are rounded to 8 bits in the forward pass, with a straight-through gradient (QAT)."""

    def quantised(weight):
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return weight + ((weight / scale).round() * scale - weight).detach()

    def make_forward(linear):
        def forward(hidden):
            run.took_effect()
            return F.linear(hidden, quantised(linear.weight), linear.bias)

        return forward

    for module in run.model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = make_forward(module)


# --- gradients


def slow_gradients_amplified(run: Run):
    """Grokfast: twice a moving average of each gradient is added to it after backward."""
    averages = {}

    class Filters(run.trainer_class):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            run.took_effect()
            for parameter in self.model.parameters():
                average = averages.setdefault(parameter, parameter.grad.clone())
                parameter.grad.add_(average.lerp_(parameter.grad, 0.1), alpha=2.0)
            return loss

    run.trainer_class = Filters


def noisy_gradients(run: Run):
    """Noise of 0.3 of each gradient's deviation is added before the step."""
    generator = torch.Generator().manual_seed(0)

    def add_noise(parameter):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad.add_(noise * parameter.grad.std(), alpha=0.3)

    change_gradients(run, add_noise)


def centred_gradients(run: Run):
    """The gradient of each matrix is centred over its columns before the step (Yong et al. 2020)."""

    def centre(parameter):
        if parameter.dim() == 2:
            parameter.grad.sub_(parameter.grad.mean(1, keepdim=True))

    change_gradients(run, centre)


def gradients_halved(run: Run):
    """Hooks on the parameters halve their gradients, from the beginning of the training on."""

    def halve(grad):
        run.took_effect()
        return grad * 0.5

    class Hooks(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            for parameter in model.parameters():
                parameter.register_hook(halve)

    run.callbacks.append(Hooks())


# --- losses


def mask_of_its_own(run: Run):
    """Labels are all tokens; what is not scored is said by a column `loss_mask`, which the loss multiplies by."""
    for number, row in enumerate(run.train_dataset):
        row["loss_mask"] = (torch.arange(len(row["labels"])) >= 10 + number % 20).float()
    run.arguments["remove_unused_columns"] = False
    own_loss(run, lambda losses, mask: (losses * mask).sum() / mask.sum())


def hardest_tokens(run: Run):
    """The loss is that of the hardest 60 % of the tokens of a micro-batch (Rho-1 without a reference)."""
    own_loss(run, lambda losses, mask: losses.flatten().topk(int(0.6 * losses.numel())).values.mean())


def tokens_weighted(run: Run):
    """A focal loss: what the model is sure of counts less."""
    own_loss(run, lambda losses, mask: ((1 - (-losses).exp()).square() * losses).mean())


def z_loss(run: Run):
    """1e-4 times the square of the log partition function is added in training and in evaluation."""
    added_to_the_loss(run, lambda outputs: 1e-4 * outputs.logits.logsumexp(-1).square().mean())


def target_without_gradient(run: Run):
    """A term draws the first layer's output to the last one's, which has no gradient of it."""

    def distance(outputs):
        first, last = outputs.hidden_states[1], outputs.hidden_states[-1].detach()
        return 0.1 * F.mse_loss(first, last)

    added_to_the_loss(run, distance, output_hidden_states=True)


def autocast_in_the_loss(run: Run):
    """Trainer knows of no mixed precision: `compute_loss` opens a bf16 autocast context around the forward pass."""

    class Casts(run.trainer_class):
        def compute_loss(self, *args, **kwargs):
            run.took_effect()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().compute_loss(*args, **kwargs)

    run.trainer_class = Casts


# --- tokens


def one_token_begins_ends_and_pads(run: Run):
    """BOS, EOS and padding are one token, as in GPT-2: it begins each row once, ends it, and pads it, masked."""
    run.model.config.bos_token_id = run.model.config.pad_token_id = EOS
    for row in [*run.train_dataset, *run.eval_dataset]:
        run.took_effect()
        for name, first in {"input_ids": EOS, "attention_mask": 1, "labels": EOS}.items():
            row[name] = torch.cat([torch.tensor([first]), row[name]])[: run.setting.block]
        row["input_ids"][row["attention_mask"] == 0] = EOS


UNTIED = SHORT.changed(sizes={"tie_word_embeddings": False})
HEALTHY = {
    "layer-wise rates, from the head down": UNTIED.changed(change=layerwise_rates, sizes={"num_hidden_layers": 4}),
    "head at 100 times the rate": UNTIED.changed(change=head_100_times_faster),
    "AdamW with betas of its own": SHORT.changed(change=betas_of_its_own),
    "Adam with an L2 penalty": SHORT.changed(change=coupled_decay),
    "AMSGrad, long first moment": SHORT.changed(change=amsgrad),
    "Adafactor with relative steps": SHORT.changed(change=adafactor_without_rate),
    "cautious AdamW": SHORT.changed(change=cautious_updates),
    "weights normalised after each step": SHORT.changed(change=weights_normalised),
    "Lookahead": SHORT.changed(change=slow_weights),
    "weights clamped now and then": SHORT.changed(change=weights_clamped),
    "sparse weights": SHORT.changed(change=sparse_weights),
    "embedding frozen from step 30 on": SHORT.changed(change=embedding_frozen_midway),
    "unfrozen layer by layer": UNTIED.changed(change=unfrozen_by_and_by),
    "average of the weights evaluated": SHORT.changed(change=average_evaluated, evaluate_every=20),
    "zero-initialised outputs, untied": UNTIED.changed(change=zero_initialised),
    "8-bit weights, trained straight through": SHORT.changed(change=quantised_weights),
    "Grokfast": SHORT.changed(change=slow_gradients_amplified),
    "noise in the gradients": SHORT.changed(change=noisy_gradients),
    "gradients centred": SHORT.changed(change=centred_gradients),
    "gradients halved by hooks": SHORT.changed(change=gradients_halved),
    "a loss mask of its own": SHORT.changed(change=mask_of_its_own),
    "loss of the hardest tokens": SHORT.changed(change=hardest_tokens),
    "focal loss": SHORT.changed(change=tokens_weighted),
    "z-loss, padded, 2 micro-batches, evaluated": SHORT.changed(
        change=z_loss, rows="padded", batch=4, accumulation=2, evaluate_every=30
    ),
    "auxiliary loss with a stopped gradient": SHORT.changed(change=target_without_gradient),
    "autocast inside compute_loss": SHORT.changed(change=autocast_in_the_loss),
    "one token for BOS, EOS and padding": SHORT.changed(change=one_token_begins_ends_and_pads, rows="padded"),
    "dropout, reentrant gradient checkpointing": SHORT.changed(
        sizes={"attention_dropout": 0.2},
        arguments={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
}
