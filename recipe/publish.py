"""What is uploaded to the hub: the files of a model, its tokenizer and its card.

Trainer would upload the run directory, which has paths, texts and findings in it, and training_args.bin, a pickle.
"""

from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

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


def upload_checkpoint(trainer: Trainer, folder: Path) -> None:
    """In the background, where `hub_strategy` asks for it and no other upload is under way."""
    is_busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if trainer.args.hub_strategy != HubStrategy.END and (trainer.args.hub_always_push or not is_busy):
        job = upload(trainer, folder, f"Training in progress, step {trainer.state.global_step}", blocking=False)
        trainer.push_in_progress = PushInProgress([job]) if job else trainer.push_in_progress
