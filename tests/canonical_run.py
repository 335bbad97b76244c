"""Real ranks and workers, for tests/test_canonical.py: what each rank trained on, what each process read.

    python -m torch.distributed.run ... tests/canonical_run.py CONFIG OUT_DIR WORKERSxROWSxACCUMULATION ...

Trains a few steps for each combination through the recipe's Trainer. Each rank writes the rows of each micro-batch to
`OUT_DIR/rows-COMBINATION-RANK.json`; each process appends a line for every row group that it opened, with the bytes
that it read of the file, to `OUT_DIR/reads-COMBINATION-PID.jsonl`.
"""

import io
import json
import os
import sys
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


def log_reads(out_dir: Path, combination: str) -> None:
    """From here on, write down every row group that a process opens; workers inherit it."""
    formats.close_parquet()
    formats.is_remote = lambda path: True  # so that parquet is read through `open_file`
    formats.open_file = lambda path: CountingFile(path)
    Source.read_chunk = logged_read(out_dir, combination)


def logged_read(out_dir: Path, combination: str):
    def read_chunk(source, chunk):
        before = CountingFile.num_bytes
        contents = ORIGINAL_READ(source, chunk)
        record = {"path": chunk.path, "row_group": chunk.position, "bytes": CountingFile.num_bytes - before}
        with (out_dir / f"reads-{combination}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return contents

    return read_chunk


ORIGINAL_READ = Source.read_chunk


def train(config_path: str, out_dir: Path, combination: str, model_config: dict) -> None:
    workers, rows, accumulation = combination.split("x")
    words = ["--dataloader_num_workers", workers, "--per_device_train_batch_size", rows]
    words += ["--gradient_accumulation_steps", accumulation, "--max_steps", str(STEPS), "--save_strategy", "no"]
    config = parse_config(config_path, words, hardware_defaults())
    Source.read_chunk = ORIGINAL_READ
    data = build_data(config)
    log_reads(out_dir, combination)  # after the hold-out has been read, which is every rank's
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
