"""Evaluation."""

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "evaluation"
EVALUATED = Setting(evaluate_every=50)


@bug("", AREA, "last partial batch left out", "thuml/Autoformer#104", EVALUATED)
def last_batch_left_out(run: Run):
    """Evaluation leaves out the last batch, which is not full: a third of its rows."""
    run.took_effect()
    run.arguments |= {"dataloader_drop_last": True, "per_device_eval_batch_size": 16}


@bug("eval_train_mismatch train_eval_gap", AREA, "softmax in eval mode", "wolny/pytorch-3dunet#45", EVALUATED)
def softmax_in_eval_mode(run: Run):
    """In eval mode the model returns probabilities, which the loss takes for logits."""

    def probabilities(module, inputs, logits):
        if not module.training:
            run.took_effect()
            return logits.softmax(-1)

    run.model.lm_head.register_forward_hook(probabilities)
