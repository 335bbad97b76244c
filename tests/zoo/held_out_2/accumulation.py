"""Accumulation of gradients."""

from tests.zoo.bug import bug
from tests.zoo.rows import IGNORED
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "accumulation"
ACCUMULATED = Setting(rows="padded", batch=2, accumulation=4)


@bug("repeated_data", AREA, "one micro-batch for the whole window", "baaivision/URSA#10", ACCUMULATED)
def one_micro_batch_for_the_window(run: Run):
    """Data is fetched once a step: the micro-batches of a window are all the same."""

    class Reuses(run.trainer_class):
        def get_batch_samples(self, *args, **kwargs):
            batches, count = super().get_batch_samples(*args, **kwargs)
            run.took_effect()
            if count is not None:
                count = count.new_tensor(len(batches) * int((batches[0]["labels"][:, 1:] != IGNORED).sum()))
            return [dict(batches[0]) for _ in batches], count

    run.trainer_class = Reuses


@bug(
    "accumulation_mismatch", AREA, "only the first micro-batch of some weights", "AMD-AGI/Primus PR #1046", ACCUMULATED
)
def first_micro_batch_of_linear_weights(run: Run):
    """The weights of the layers' linear modules keep the gradient of a window's first micro-batch; others add up."""
    weights = [p for name, p in run.model.model.layers.named_parameters() if name.endswith("proj.weight")]

    class Gated(run.trainer_class):
        def training_step(self, *args, **kwargs):
            first = [None if weight.grad is None else weight.grad.clone() for weight in weights]
            loss = super().training_step(*args, **kwargs)
            for weight, grad in zip(weights, first, strict=True):
                if grad is not None:
                    run.took_effect()
                    weight.grad.copy_(grad)
            return loss

    run.trainer_class = Gated
