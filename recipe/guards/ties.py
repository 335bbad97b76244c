"""Input and output embedding that should share their weights."""

from collections.abc import Iterator

import torch

from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, Verdict
from recipe.guards.updates import is_partial


class UntiedWeights(Guard):
    """Embedding and head should share their weights and do not.

    When: before step 1, after a resume too.
    Measured: where the config says `tie_word_embeddings`, both must be one memory. A copy of the head, or of both,
        that PEFT trains (`modules_to_save`) is information; of the embedding alone, a warning: the head stays.
    Try: `ensure_weight_tying` in the config of PEFT's adapter (`modules_to_save`). Else `model.tie_weights()` before
        the optimizer is built, or `tie_word_embeddings: false`.
    Cannot see: sharded weights, a head of another shape.
    """

    ids = {"untied_weights": "Embedding and head should share their weights and do not."}

    def inspect(self, run) -> Iterator[Verdict]:
        yield self.judge(run.model) or self.clear(check=PROBE)

    @classmethod
    def judge(cls, model: torch.nn.Module) -> Finding | None:
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise CannotJudge("the model has no config of transformers that says whether to tie them")
        if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            return None
        head = model.get_output_embeddings()
        if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
            raise CannotJudge("the model has no output embedding with a weight")
        # A table of which PEFT trains some rows has a weight that is made each time: `trainable_token_indices`
        both = [m.original_module if hasattr(m, "token_adapter") else m for m in (model.get_input_embeddings(), head)]
        embedding, output = (module.weight for module in both)
        if is_partial(embedding) or is_partial(output):
            raise CannotJudge("the embeddings are sharded or have no memory")
        if embedding.shape != output.shape:
            raise CannotJudge(f"the embedding is {tuple(embedding.shape)} and the head {tuple(output.shape)}")
        if embedding.data_ptr() == output.data_ptr():
            return None
        is_equal = torch.equal(embedding, output.to(embedding))
        severity = "warning"
        causes = (
            "the model changed after tying (moved, emptied or wrapped)",
            "a checkpoint without the head was loaded",
        )
        action = "model.tie_weights() before the optimizer is built, or tie_word_embeddings false"
        copied = [hasattr(module, "modules_to_save") for module in (model.get_input_embeddings(), head)]
        if any(copied):
            causes = ("PEFT trains a copy of the embedding alone (modules_to_save): the head keeps the old weights",)
            if copied[1] or any(p.requires_grad for p in head.parameters()):
                severity = "info"  # what is trained is saved and merged; it is trained so on purpose, too
                causes = ("PEFT trains a copy (modules_to_save): the two are tied no longer",)
            action = "ensure_weight_tying=True in the adapter's config, or tie_word_embeddings false before it is made"
        return cls.finding(
            severity,
            found=f"embedding and head are two tensors ({'equal so far' if is_equal else 'not equal'})",
            expected="one: tie_word_embeddings",
            causes=causes,
            action=action,
            evidence={"shape": list(embedding.shape), "is_equal": is_equal},
            check=PROBE,
        )
