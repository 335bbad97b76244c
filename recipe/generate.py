"""`generate`: continue a prompt with a trained model. Also the samples that a training takes."""

import logging
import sys
import time
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from recipe.errors import UserError
from recipe.trained import Trained, load_model, longest_input

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0: always the most likely one. `top_p`: among the most likely tokens
    whose probabilities add up to it. `seed`: of torch's generator; the next sample takes the next one."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 42


def generate_samples(
    trained: Trained, prompt: str, sampling: Sampling, num_samples: int, is_streamed: bool = True
) -> dict:
    """Continues `prompt` `num_samples` times, with the seeds from `sampling.seed` on; returns the texts, JSON-able.

    `is_streamed`: prints each token as it comes. An empty prompt begins as a document of the training does, after EOS.
    Raises `UserError` for a prompt that is too long and for broken weights.
    """
    if num_samples > 1 and sampling.temperature == 0:
        raise UserError("at temperature 0 all samples are the same; set --temperature above 0, or --num_samples 1")
    model, tokenizer = load_model(trained)
    prompt_ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    if (limit := longest_input(trained, model.config)) is not None:
        if len(prompt_ids) >= limit:
            raise UserError(f"the prompt has {len(prompt_ids):,} tokens, the model reads {limit:,}; shorten it")
        sampling = _within(sampling, limit - len(prompt_ids), limit)
    if not has_finite_logits(model, prompt_ids):
        raise UserError(f"{trained.folder}: the model's logits are not finite; take an earlier checkpoint")
    samples = []
    for number in range(num_samples):
        each = replace(sampling, seed=sampling.seed + number)
        if is_streamed and num_samples > 1:
            print(f"--- sample {number + 1} of {num_samples}, seed {each.seed}")
        streamer = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed else None
        start = time.perf_counter()
        new_ids = sample_tokens(model, tokenizer, prompt_ids, each, streamer)
        seconds = time.perf_counter() - start
        sys.stdout.flush()
        end = "ended by the model" if new_ids[-1:] == [tokenizer.eos_token_id] else "cut at --max_new_tokens"
        logger.info(f"seed {each.seed} | {len(new_ids)} tokens, {end} | {len(new_ids) / seconds:.0f} tokens/s")
        text = tokenizer.decode(new_ids, skip_special_tokens=True)
        samples.append({"seed": each.seed, "text": text, "num_tokens": len(new_ids), "seconds": round(seconds, 3)})
    return {"model": str(trained.folder), "prompt": prompt, **vars(sampling), "samples": samples}


def _within(sampling: Sampling, room: int, limit: int) -> Sampling:
    if sampling.max_new_tokens <= room:
        return sampling
    logger.warning("the model was trained on texts of %s tokens: %s new ones at most, after the prompt", limit, room)
    return replace(sampling, max_new_tokens=room)


def has_finite_logits(model: PreTrainedModel, prompt_ids: list[int]) -> bool:
    """Can the model be sampled from? Leaves its mode as it was."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt_ids], device=model.device)).logits
    model.train(was_training)
    return bool(logits.isfinite().all())


def sample_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> list[int]:
    """The ids that follow `prompt_ids`, EOS included, keeping the generators and the model's mode unchanged."""
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    is_random = sampling.temperature > 0
    choice = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if is_random else {}
    model.eval()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        input_ids = torch.tensor([prompt_ids], device=model.device)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=is_random,
            **choice,
            use_cache=True,
            remove_invalid_values=True,  # NaN at a later position would end the run in an error of the sampling
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
        )
    model.train(was_training)
    return output[0, len(prompt_ids) :].tolist()
