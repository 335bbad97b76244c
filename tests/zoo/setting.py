"""What a run is made of before any bug: a healthy run is a setting, and a bug's healthy twin is its setting."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """`family`, `sizes`: of the model, see `models.py`. `text`, `vocabulary`: see `texts.py`. `rows`:

    - `packed`: documents one after another with EOS between them, cut to `block` tokens; every token is a label.
    - `documents`: the same, with positions that restart at each document, from which the model isolates documents.
    - `padded`: a document a row, cut or padded to `block`; padding is masked and scored nowhere.
    - `prompts`: padded, and the first third of each row is a prompt that is not scored.
    - `flattened`: documents of a micro-batch in one row without padding (DataCollatorWithFlattening).

    `kind`: `trainer` is a stock Trainer on those rows, `recipe` is `recipe.train.assemble` on its own stream, `sft` is
    TRL's SFTTrainer. `passes`: how often the corpus is read, declared by a sized dataset. `stream`: an iterable
    dataset. `save_at`: the run is saved and ended there, and another process's worth of objects resumes it. `ranks`:
    gloo processes. `arguments`: of TrainingArguments (`recipe`: of the configuration; `sft`: of SFTConfig). `change`:
    a module's function that changes the `Run` as a bug's does, and is no bug: what a user does on purpose.
    """

    family: str = "llama"
    sizes: dict[str, Any] = field(default_factory=dict)
    text: str = "english"
    vocabulary: int = 257
    rows: str = "packed"
    kind: str = "trainer"
    block: int = 128
    batch: int = 8
    accumulation: int = 1
    steps: int = 100
    passes: int = 1
    stream: bool = False
    workers: int = 0
    evaluate_every: int = 0
    save_at: int = 0
    ranks: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    change: Callable[..., None] | None = None

    def changed(self, **changes) -> "Setting":
        """A copy; `sizes` and `arguments` are added to those there are."""
        for name in ("sizes", "arguments"):
            changes[name] = {**getattr(self, name), **changes.get(name, {})}
        return replace(self, **changes)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=lambda c: f"{c.__module__}.{c.__qualname__}")

    @property
    def rows_a_step(self) -> int:
        return self.batch * self.accumulation * self.ranks

    @property
    def num_rows(self) -> int:
        """Of the training data: what the steps need, or a part of it that is read several times."""
        return -(-self.steps * self.rows_a_step // self.passes)

    def describe(self) -> str:
        """What differs from the default, in words."""
        default = Setting()
        differs = {name: value for name, value in asdict(self).items() if value != getattr(default, name)}
        flat = {**differs, **differs.pop("sizes", {}), **differs.pop("arguments", {})}
        flat.pop("sizes", None), flat.pop("arguments", None)
        if self.change:
            flat["change"] = self.change.__name__
        return ", ".join(f"{name} {value}" for name, value in flat.items()) or "the default"
