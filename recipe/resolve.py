"""The configuration of a command, with what is best on this machine where it leaves that open."""

import os.path

from recipe.arguments import Config, parse_config
from recipe.model import bf16_pays_on_cpu, hardware_defaults, read_model_config
from recipe.plan import compiling_pays_on_cpu


def resolve(path: str, overrides: list[str]) -> Config:
    """`overrides`: words of the command line. Raises `UserError`."""
    config = parse_config(path, overrides, hardware_defaults())
    sources = config.model.model_config, config.model.model_name_or_path
    is_here = any(map(os.path.exists, filter(None, sources)))  # asks no hub
    if config.training.use_cpu and is_here and bf16_pays_on_cpu(model := read_model_config(*sources)):
        fast = hardware_defaults() | {"bf16": True}
        config = parse_config(path, overrides, fast)
        if config.training.bf16 and not config.training.full_determinism and compiling_pays_on_cpu(config, model):
            config = parse_config(path, overrides, fast | {"torch_compile": True})
    return config
