"""What is uploaded to the hub: the files of a model, its tokenizer and its card.

Trainer would upload the run directory, which has paths, texts and findings in it, and training_args.bin, a pickle.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from recipe.data.files import first_line
from recipe.errors import UserError

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


def check_login(token: str | None) -> None:
    """Raise `UserError` unless the hub can be reached and knows the user: Trainer would ask with all data open."""
    without = "--push_to_hub false trains without it"
    try:
        HfApi().whoami(token)
    except LocalTokenNotFoundError:
        raise UserError(f"push_to_hub: not logged in; set HF_TOKEN, or run hf auth login; {without}") from None
    except Exception as error:  # the hub client raises a different class for each way a network can fail
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"push_to_hub: the hub cannot be reached, or refuses ({reason}); {without}") from error
