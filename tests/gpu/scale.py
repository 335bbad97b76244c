"""Full size or tiny; and runs of the recipe, as a user's config makes them, on the repo's token ids."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.arguments import Config, parse_config
from recipe.model import CAUSAL_SDPA, hardware_defaults, load_model_config
from recipe.train import Assembled, assemble, open_run
from tests.gpu.tokens import ROOT, load_ids, write_source

FLAGSHIP = ROOT / "recipe" / "configs" / "llama_180m.json"
MODEL = ROOT / "recipe" / "configs" / "llama_180m_model.json"
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2}
GIB = 1 << 30
# Micro-batches of the 180M by the device's memory: at bf16, 16 rows of 1,024 keep about 25 GiB of activations in
# eager mode (estimated: 15,000 saved elements a token and layer, and four copies of the logits).
ROWS_BY_MEMORY = ((70, 16), (40, 8), (0, 4))


@dataclass(frozen=True)
class Scale:
    """`device`: cuda or cpu. Tiny sizes show that the code runs; their figures mean nothing."""

    device: str
    is_tiny: bool

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def compile_backend(self) -> str:
        """Without code generation where it would take most of a test's minute."""
        return "eager" if self.is_tiny and not self.is_cuda else "inductor"

    @property
    def block_size(self) -> int:
        return 64 if self.is_tiny else 1024

    @property
    def rows_per_step(self) -> int:
        return 4 if self.is_tiny else 48

    @property
    def micro_batch(self) -> int:
        if self.is_tiny:
            return 2
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return next(rows for least, rows in ROWS_BY_MEMORY if memory >= least)

    @property
    def accumulation(self) -> int:
        return self.rows_per_step // self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.block_size

    def model_config(self, **sizes) -> LlamaConfig:
        config = load_model_config(str(MODEL))
        for name, value in {**(TINY if self.is_tiny else {}), **sizes}.items():
            setattr(config, name, value)
        if self.is_tiny:
            config.head_dim = config.hidden_size // config.num_attention_heads
        return config


def build_model(scale: Scale, attention: str = CAUSAL_SDPA, **sizes) -> LlamaForCausalLM:
    """Weights are drawn on the CPU, in fp32, and are the same on every device."""
    torch.manual_seed(0)
    config = scale.model_config(**sizes)
    config._attn_implementation = attention
    model = LlamaForCausalLM(config)
    model.config.use_cache = False  # as Trainer sets it
    return model.to(scale.device)


def batch_of(scale: Scale, rows: int, length: int, first: int = 0) -> torch.Tensor:
    """int64 `[rows, length]` of the repo's token ids, from token `first` on, on the device."""
    ids = load_ids()[first : first + rows * length].astype(np.int64)
    return torch.from_numpy(ids.reshape(rows, length)).to(scale.device)


def build_run(scale: Scale, folder: Path, sizes: dict | None = None, **keys) -> Assembled:
    """What `python -m recipe train recipe/configs/llama_180m.json` assembles, with the changes of `parse_run`."""
    config = parse_run(scale, folder, sizes, **keys)
    return assemble(config, open_run(config))


def parse_run(scale: Scale, folder: Path, sizes: dict | None = None, **keys) -> Config:
    """The config `recipe/configs/llama_180m.json` with another source and `keys`.

    `sizes` are of the model. `folder` gets the source, the model's JSON and the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = scale.model_config(**(sizes or {}))
    kept = json.loads(MODEL.read_text(encoding="utf-8"))
    model = folder / "model.json"
    model.write_text(json.dumps({name: getattr(config, name) for name in kept if name != "architectures"}))
    values = {
        "model_config": model,
        "source": write_source(folder),
        "eval_skip": 0,
        "eval_documents": 20,
        "block_size": scale.block_size,
        "per_device_train_batch_size": scale.micro_batch,
        "gradient_accumulation_steps": scale.accumulation,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "output_dir": folder / "run",
        "torch_compile": "false",
    }
    if str(keys.get("torch_compile")) == "true" and scale.compile_backend != "inductor":
        values["torch_compile_backend"] = scale.compile_backend
    if scale.is_tiny:
        values["dataloader_num_workers"] = 0
    if not scale.is_cuda:
        values["use_cpu"] = "true"
    words = [word for name, value in {**values, **keys}.items() for word in (f"--{name}", str(value))]
    return parse_config(FLAGSHIP, words, hardware_defaults() if scale.is_cuda else {"use_cpu": True})


def let_go(model: torch.nn.Module) -> None:
    """Free the memory of weights and gradients that others still name."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.data = torch.empty(0, device=parameter.device)


def synchronize(scale: Scale) -> None:
    if scale.is_cuda:
        torch.cuda.synchronize()


def autocast(scale: Scale, is_on: bool = True):
    return torch.autocast(scale.device, dtype=torch.bfloat16, enabled=is_on)


def use_tf32(scale: Scale, is_on: bool) -> None:
    """Both of torch's settings at once. `transformers.utils.import_utils.enable_tf32` cannot switch back and forth:
    it is cached."""
    if scale.is_cuda:
        torch.set_float32_matmul_precision("high" if is_on else "highest")
