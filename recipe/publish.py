"""What is uploaded to the hub: the files of a model, its tokenizer and its card.

Trainer would upload the run directory, which has paths, texts and findings in it, and training_args.bin, a pickle.
"""

from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer

PUBLISHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "chat_template*", "README.md",
)  # fmt: skip


def upload(trainer: Trainer, folder: str | Path, message: str | None, blocking: bool):
    """The commit, or its future unless `blocking`; None on other ranks than the main process."""
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    if not trainer.is_world_process_zero():
        return None
    return HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=message,
        revision=trainer.args.hub_revision,
        allow_patterns=list(PUBLISHED),
        run_as_future=not blocking,
    )
