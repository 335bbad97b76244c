"""One run of the zoo: a setting, with or without a bug, watched by the guards and by what others offer."""

import copy
import json
import logging
import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from recipe.arguments import parse_config
from recipe.guards import RegressionCallback
from recipe.train import assemble
from tests.zoo.models import make_model
from tests.zoo.rows import IGNORED, RowStream, make_collator, make_rows, prompt_lengths
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tokenizer" / "llama-4k"  # of the kinds `recipe` and `sft`


class Run:
    """What a bug may change before the Trainer is made, from outside.

    `model`, `train_dataset`, `eval_dataset` (lists of rows, or a `RowStream`), `collator`, `arguments` (of
    TrainingArguments, or the configuration of the kind `recipe`), `trainer_class`, `callbacks`, `optimizers`.
    `build`: makes the whole Trainer from all of these instead (TRL's DPOTrainer, a Trainer of a PEFT model).
    `on_trainer`: called with the Trainer when it is made. `on_checkpoint`: called with the checkpoint's path when the
    run has been saved and ended. `patch` replaces an attribute of anything until the run is over; `took_effect` is to
    be called wherever the bug's own code runs. A run with `save_at` is made twice, and so the bug is applied twice:
    `is_resumed` is true the second time.
    """

    def __init__(self, setting: Setting, folder: Path, rank: int = 0, is_resumed: bool = False):
        self.setting, self.folder, self.rank, self.is_resumed = setting, folder, rank, is_resumed
        self.model = make_model(setting) if setting.kind != "recipe" else None
        self.collator = make_collator(setting)
        self.train_dataset, self.eval_dataset = _datasets(setting)
        self.arguments = _arguments(setting, folder)
        self.trainer_class: type[Trainer] = Trainer
        self.callbacks: list[TrainerCallback] = []
        self.optimizers = (None, None)
        self.build: Callable[[], Trainer] | None = None
        self.on_trainer: list[Callable[[Trainer], Any]] = []
        self.on_checkpoint: list[Callable[[Path], Any]] = []
        self._effects = multiprocessing.RawValue("i", 0)  # shared: a bug may act in data workers
        self._patches = ExitStack()

    @property
    def effects(self) -> int:
        return self._effects.value

    def took_effect(self) -> None:
        self._effects.value += 1

    def patch(self, owner, name: str, value) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, value))

    def make_trainer(self) -> tuple[Trainer, RegressionCallback]:
        make = {"trainer": self._stock, "recipe": self._recipe, "sft": self._sft}[self.setting.kind]
        trainer, guards = _guarded(self.build()) if self.build else make()
        trainer.remove_callback(PrinterCallback)
        for act in self.on_trainer:
            act(trainer)
        return trainer, guards

    def _stock(self) -> tuple[Trainer, RegressionCallback]:
        trainer = self.trainer_class(
            model=self.model,
            args=TrainingArguments(**self.arguments),
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            data_collator=self.collator,
            callbacks=self.callbacks,
            optimizers=self.optimizers,
        )
        return _guarded(trainer)

    def _sft(self) -> tuple[Trainer, RegressionCallback]:
        import trl

        trainer = trl.SFTTrainer(
            model=self.model,
            args=trl.SFTConfig(**self.arguments),
            train_dataset=self.train_dataset,
            # it appends the string of EOS to the text, which this tokenizer spells out unless told otherwise
            processing_class=AutoTokenizer.from_pretrained(TOKENIZER, split_special_tokens=False),
            callbacks=self.callbacks,
        )
        return _guarded(trainer)

    def _recipe(self) -> tuple[Trainer, RegressionCallback]:
        resume = {"resume_from_checkpoint": "latest"} if self.is_resumed else {}
        path = self.folder / "config.json"
        path.write_text(json.dumps({**self.arguments, **resume}))
        config = parse_config(path, [])
        config.training.max_steps = config.max_steps
        assembled = assemble(config, Path(config.training.output_dir))
        for callback in self.callbacks:
            assembled.trainer.add_callback(callback)
        return assembled.trainer, assembled.guards

    def undo(self) -> None:
        self._patches.close()


def _guarded(trainer: Trainer) -> tuple[Trainer, RegressionCallback]:
    guards = RegressionCallback()
    trainer.add_callback(guards)
    return trainer, guards


def _datasets(setting: Setting):
    if setting.kind == "recipe":
        return None, None
    if setting.kind == "sft":
        texts = [text[:600] for text in texts_of(setting.text)[EVAL_DOCUMENTS:][: setting.num_rows]]
        if setting.rows == "prompts":
            cut = [max(1, len(text) // 3) for text in texts]
            columns = {"prompt": [t[:c] for t, c in zip(texts, cut, strict=True)]}
            columns["completion"] = [t[c:] for t, c in zip(texts, cut, strict=True)]
            return datasets.Dataset.from_dict(columns), None
        return datasets.Dataset.from_dict({"text": texts}), None
    rows = make_rows(setting)
    return RowStream(rows) if setting.stream else rows, make_rows(setting, is_eval=True)


def _arguments(setting: Setting, folder: Path) -> dict[str, Any]:
    values = {
        "output_dir": str(folder / "run"),
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": setting.accumulation,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": 1,
        "eval_strategy": "steps" if setting.evaluate_every else "no",
        "eval_steps": setting.evaluate_every or None,
        "save_strategy": "no",
        "dataloader_num_workers": setting.workers,
        "seed": setting.seed,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    if setting.kind == "recipe":
        values |= _recipe_arguments(setting, folder)
    if setting.kind == "sft":
        values |= {"max_length": setting.block, "bf16": False, "eos_token": None}
    return {**values, **setting.arguments}


def _recipe_arguments(setting: Setting, folder: Path) -> dict[str, Any]:
    """A source of its own, a model file and the keys that are the recipe's."""
    texts = texts_of(setting.text)[:1500]
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet", row_group_size=24)
    config = make_model(setting).config.to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept += ("model_type", "tie_word_embeddings", "rms_norm_eps", "initializer_range")
    model = {name: config[name] for name in kept} | {"vocab_size": setting.vocabulary}
    (folder / "model.json").write_text(json.dumps({**model, "max_position_embeddings": 2 * setting.block}))
    ours = {"model_config": str(folder / "model.json"), "tokenizer": str(TOKENIZER), "block_size": setting.block}
    ours |= {"source": str(folder / "corpus.parquet"), "eval_skip": 1400, "eval_documents": 20, "trajectory": "none"}
    ours |= {"document_masking": setting.rows == "documents"}
    return ours if setting.evaluate_every else {**ours, "eval_strategy": "steps", "eval_steps": setting.steps}


class StopAt(TrainerCallback):
    """Saves after step `step` and ends the training there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


# --- a run from its beginning to its record


def execute(
    setting: Setting,
    bug: Callable[[Run], Any] | None = None,
    rank: int = 0,
    folder: str | None = None,
    with_others: bool = True,
) -> dict:
    """Returns the record: plain values, JSON-able. `with_others`: other tools watch too.

    `findings`: id, severity, step, tokens_seen, found. `losses`: as Trainer logs them, one a step. `learned_loss`:
    nats a token on held-out rows of the weights at the end, put into a healthy model. `eval_losses`: as Trainer
    reports them. `effects`: how often the bug's own code ran. `others`: the alarms of each other tool.
    `crashes`: their errors.
    """
    _quiet()
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a user's run; `pool` sets forkserver
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo-", dir=folder) as own:
        record, trainer = _phases(setting, bug, rank, Path(folder or own), with_others)
        record["learned_loss"] = learned_loss(trainer.model, setting)
    record["seconds"] = time.perf_counter() - start
    return record


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)


def _phases(setting: Setting, bug, rank: int, folder: Path, with_others: bool) -> tuple[dict, Trainer]:
    record = {"findings": [], "losses": [], "eval_losses": [], "effects": 0, "judged_steps": Counter(), "steps": 0}
    record |= {"cannot_judge": {}, "not_applicable": {}, "others": {}, "crashes": []}
    checkpoint = None
    for phase in range(2 if setting.save_at else 1):
        run = Run(setting, folder, rank, is_resumed=phase == 1)
        try:
            if setting.save_at and phase == 0:
                run.callbacks.append(StopAt(setting.save_at))
            for change in filter(None, (setting.change, bug)):
                change(run)
            trainer, guards = run.make_trainer()
            others = _watched_by_others(trainer, setting) if with_others else None
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if setting.save_at and phase == 0:
                checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{setting.save_at}"
                for act in run.on_checkpoint:
                    act(checkpoint)
        finally:
            run.undo()
        _add(record, run, trainer, guards, others, setting.save_at if phase else 0)
    return record, trainer


def _watched_by_others(trainer: Trainer, setting: Setting):
    from tests.zoo.others import Others  # a GPU machine need not have these tools

    others = Others()
    has_prompts = setting.rows == "prompts" and setting.kind == "trainer"
    others.watch(trainer, trainsight={"prompt_lengths": prompt_lengths if has_prompts else None})
    return others


def _add(record: dict, run: Run, trainer: Trainer, guards: RegressionCallback, others, first: int) -> None:
    names = ("id", "severity", "step", "tokens_seen", "found")
    # A resumed run's guards know what was found before
    record["findings"] = [{name: asdict(finding)[name] for name in names} for finding in guards.findings]
    log = [entry for entry in trainer.state.log_history if entry["step"] > first]
    record["losses"] += [entry["loss"] for entry in log if "loss" in entry]
    record["eval_losses"] += [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    record["effects"] += run.effects
    record["judged_steps"] += guards.judged_steps
    reasons = (("cannot_judge", guards.cannot_judge), ("not_applicable", guards.not_applicable))
    for kind, found in reasons:  # a resumed run: where neither part judged
        kept = record[kind] if first else found
        record[kind] = {name: reason for name, reason in kept.items() if name in found}
    record["steps"] = trainer.state.global_step
    record["tokens"] = guards.tokens_seen
    for tool, alarms in (others.alarms() if others else {}).items():
        record["others"].setdefault(tool, []).extend(alarms)
    record["crashes"] += others.errors if others else []


def learned_loss(model, setting: Setting) -> float | None:
    """Mean next-token loss on held-out rows of these weights in a healthy model; None where they do not fit it."""
    if setting.kind == "sft" or setting.rows == "flattened":
        return None
    if hasattr(model, "merge_and_unload"):  # of PEFT
        model = copy.deepcopy(model).merge_and_unload()
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    healthy = make_model(setting)
    try:
        healthy.load_state_dict(weights)
    except RuntimeError:
        return None
    total, count = 0.0, 0
    with torch.no_grad():
        for row in make_rows(setting, is_eval=True):
            inputs = {name: value[None] for name, value in row.items() if name != "labels"}
            logits = healthy.eval()(**inputs).logits[0, :-1].float()
            targets = row["labels"][1:]
            total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
            count += int((targets != IGNORED).sum())
    return total / count if math.isfinite(total) else math.inf


# --- several ranks


def execute_rank(setting: Setting, bug, rank: int, folder: str, with_others: bool = True) -> dict:
    """One of several gloo processes, which meet in a file."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.ranks, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_PORT="29500")
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=setting.ranks)
    np.random.seed(0)
    try:
        return execute(setting, bug, rank, folder, with_others)
    finally:
        torch.distributed.destroy_process_group()
