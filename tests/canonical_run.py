"""Real ranks and workers, for tests/test_canonical.py: what each rank trained on, what each process read.

    python tests/canonical_run.py CONFIG OUT_DIR WORKERSxROWSxACCUMULATION ...

Trains a few steps for each combination through the recipe's Trainer. Each rank writes the rows of each micro-batch to
`OUT_DIR/rows-COMBINATION-RANK.json`; each process appends a line for every row group that it opened, with the bytes
that it read of the file, to `OUT_DIR/reads-COMBINATION-PID.jsonl`.
"""

import io
import json
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from recipe.arguments import parse_config
from recipe.data import formats
from recipe.data.pipeline import build_data
from recipe.data.source import Source
from recipe.model import hardware_defaults
from recipe.skipping import SkipCallback
from recipe.trainer import PretrainTrainer

STEPS = 3


class CountingFile(io.FileIO):
    """A file that counts the bytes read from it, over all files of the process."""

    num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        CountingFile.num_bytes += len(data)
        return data


@dataclass(frozen=True)
class LoggedSource(Source):
    """Writes down every row group that a process opens, also in a worker, which gets it by pickling."""

    out_dir: str = ""
    combination: str = ""

    def read_chunk(self, chunk):
        formats.is_remote = lambda path: True  # so that parquet is read through `open_file`
        formats.open_file = CountingFile
        before = CountingFile.num_bytes
        contents = super().read_chunk(chunk)
        record = {"path": chunk.path, "row_group": chunk.position, "bytes": CountingFile.num_bytes - before}
        with Path(self.out_dir, f"reads-{self.combination}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return contents


def logged_source(source: Source, **logged) -> LoggedSource:
    return LoggedSource(**{field.name: getattr(source, field.name) for field in fields(Source)}, **logged)


def train(config_path: str, out_dir: Path, combination: str, model_config: dict) -> None:
    workers, rows, accumulation = combination.split("x")
    words = ["--dataloader_num_workers", workers, "--per_device_train_batch_size", rows]
    words += ["--gradient_accumulation_steps", accumulation, "--max_steps", str(STEPS), "--save_strategy", "no"]
    config = parse_config(config_path, words, hardware_defaults())
    data = build_data(config)  # reads the hold-out, which is every rank's
    logged = {"out_dir": str(out_dir), "combination": combination}
    stream = data.loader.dataset
    stream.parts = [replace(part, source=logged_source(part.source, **logged)) for part in stream.parts]
    formats.close_parquet()
    config.training.max_steps = STEPS
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**model_config))
    known = {"guards": None, "stream": None, "callbacks": [SkipCallback()]}
    trainer = PretrainTrainer(model=model, args=config.training, train_loader=data.loader, **known)
    consumed, training_step = [], trainer.training_step

    def recorded_step(model, inputs, *more):
        consumed.append(inputs["input_ids"].tolist())
        return training_step(model, inputs, *more)

    trainer.training_step = recorded_step
    trainer.train()
    rank = config.training.process_index
    (out_dir / f"rows-{combination}-{rank}.json").write_text(json.dumps(consumed))


def main(config_path: str, out_dir: str, *combinations: str) -> None:
    model_config = json.loads(Path(json.loads(Path(config_path).read_text())["model_config"]).read_text())
    for combination in combinations:
        train(config_path, Path(out_dir), combination, model_config)
    sys.stdout.flush()
    os._exit(0)  # as the recipe's own command ends: reader threads may abort an interpreter that is shutting down


if __name__ == "__main__":
    main(*sys.argv[1:])
