"""transformers' Trainer as it comes, which the recipe is compared with: the same model on the same rows."""

from collections.abc import Iterable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback


class Rows(torch.utils.data.IterableDataset):
    """Token ids of `batches`, row by row; labels are the same ids, unshifted, as LlamaForCausalLM expects them."""

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]]):
        self.batches = batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches:
            for ids in batch["input_ids"]:
                yield {"input_ids": ids, "labels": ids}


def build_stock(model_config: str, batches: Iterable[dict], folder: str, seed: int = 42, **arguments) -> Trainer:
    """`arguments`: of TrainingArguments. No guards, no evaluation, no checkpoints."""
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_json_file(model_config))
    settings = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": seed}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=f"{folder}/stock", **settings | arguments),
        train_dataset=Rows(batches),
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
