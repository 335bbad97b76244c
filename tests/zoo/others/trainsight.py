"""trainsight-preflight: the rows of the first batch against what the loss is declared to score."""

from collections.abc import Callable
from pathlib import Path

from trainsight import LossContract, SFTReconciler

from tests.zoo.others.tool import Tool

TOKENIZER = Path(__file__).resolve().parents[3] / "tokenizer" / "llama-4k"


class Trainsight(Tool):
    """`SFTReconciler.audit_batch` on the first batch, which is all that `TrainSightCallback` audits. The callback
    reads it from a second loader before training, which moves the random state; here the same batch is heard as it
    goes by. Its default contract is for answers in ChatML. Here the contract declares what the run is: no template,
    and answers only where `prompt_lengths` says how many tokens of each row of a batch are the prompt. Without a
    tokenizer, which it would refuse, ids are their own text.
    """

    def __init__(self, trainer, hear, prompt_lengths: Callable[[dict], list[int]] | None = None):
        super().__init__(trainer, hear)
        self._prompt_lengths, self._is_over = prompt_lengths, False

    def on_micro_batch(self, inputs):
        if self._is_over or self.step > 0 or "labels" not in inputs or "input_ids" not in inputs:
            return
        self._is_over = True
        lengths = self._prompt_lengths(inputs) if self._prompt_lengths else [0] * len(inputs["input_ids"])
        contract = LossContract(
            answer_only_loss=self._prompt_lengths is not None,
            expected_template_prefix="",
            expected_template_suffix="",
            strict=False,  # True raises at the first fault
        )
        report = SFTReconciler(Decoder(self.trainer), contract).audit_batch(inputs, prompt_lengths=lengths)
        for fault in report.diagnoses:
            self.hear(0, fault.error_code, f"{fault.row_id}: {fault.error_message}")


class Decoder:
    """What `SFTReconciler` asks of a tokenizer. It loads `name_or_path` from a disk, for raw samples only: the
    trainer's tokenizer need not be on one."""

    name_or_path = str(TOKENIZER)

    def __init__(self, trainer):
        self._tokenizer = trainer.processing_class
        self.eos_token_id = getattr(self._tokenizer or trainer.model.config, "eos_token_id", None)
        self.pad_token_id = getattr(self._tokenizer, "pad_token_id", None)

    def decode(self, ids: list[int], **options) -> str:
        return self._tokenizer.decode(ids, **options) if self._tokenizer else " ".join(map(str, ids))
