"""Labels and loss."""

from tests.zoo.bug import bug
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "labels and loss"
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
RECOMPUTED = Setting(family="gpt2", steps=60, sizes=DROPOUT, arguments={"gradient_checkpointing": True})
CAPPED = Setting(family="gemma2")


@bug("wrong_gradient", AREA, "recomputation draws other dropout masks", "OLMo-core PR #828", RECOMPUTED)
def dropout_drawn_again_in_backward(run: Run):
    """Gradient checkpointing does not restore the generator: the gradient is of other dropout masks than the loss."""
    run.took_effect()
    run.arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "preserve_rng_state": False}


@bug("reference_mismatch", AREA, "logits not capped in the fused loss", "apple/ml-cross-entropy#48", CAPPED)
def logits_not_capped_in_the_loss(run: Run):
    """The patched forward of Gemma-2 computes the loss from logits that are not soft-capped."""
    cap = run.model.config.final_logit_softcapping

    def choose(module, args, kwargs):
        has_labels = kwargs.get("labels") is not None
        run.took_effect() if has_labels else None
        module.config.final_logit_softcapping = None if has_labels else cap

    run.model.register_forward_pre_hook(choose, with_kwargs=True)
