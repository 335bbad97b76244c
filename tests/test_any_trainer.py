"""RegressionCallback on Trainers that know nothing of it: it changes nothing, and healthy runs of any kind are silent
and judged."""

import copy
import gc
import multiprocessing
import random
import weakref

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from recipe.guards import RegressionCallback

VOCABULARY, EOS = 200, 3
ALARMS = ("warning", "error")


# --- data: text of a Markov chain, which a model can learn in a hundred steps


def markov_text(count: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """`[count, length]` token ids. The chain is always the same, `seed` draws the texts; the ids below 4 are kept for
    special tokens, of which EOS comes now and then."""
    chances = np.random.default_rng(0).dirichlet(np.full(vocabulary, 0.03), size=vocabulary)
    chances[:, :EOS] = 0
    chances[:, EOS] = 0.02
    steps = (chances / chances.sum(axis=1, keepdims=True)).cumsum(axis=1)
    generator = np.random.default_rng(seed + 1)
    ids = np.empty((count, length), dtype=np.int64)
    ids[:, 0] = generator.integers(EOS + 1, vocabulary, count)
    for position in range(1, length):
        drawn = generator.random((count, 1))
        ids[:, position] = (steps[ids[:, position - 1]] < drawn).sum(axis=1).clip(max=vocabulary - 1)
    return torch.from_numpy(ids)


def rows(count: int, length: int = 64, seed: int = 0) -> list[dict]:
    return [{"input_ids": row, "labels": row.clone()} for row in markov_text(count, length, seed)]


def uneven_rows(count: int, length: int = 64, seed: int = 0) -> list[dict]:
    """Texts of different lengths, without labels: the collator makes them."""
    lengths = np.random.default_rng(seed).integers(length // 3, length + 1, count)
    texts = markov_text(count, length, seed)
    return [{"input_ids": text[:end].tolist()} for text, end in zip(texts, lengths, strict=True)]


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        worker = get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers] if worker else self.rows)


# --- models: one tiny one of each family


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
OLD = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
GPT2 = OLD | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": TINY,
    "llama_tied": TINY | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gpt_neox": TINY | {"rotary_pct": 0.25},
    "mistral": TINY | {"sliding_window": 16},
    "mixtral": TINY | EXPERTS | {"output_router_logits": True},
    "qwen2": TINY,
    "qwen3_moe": TINY | EXPERTS,
    "gemma2": TINY | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": TINY | {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "bloom": OLD | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "opt": TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mpt": OLD | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "falcon": OLD | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "bert": TINY | {"is_decoder": True},
    "mamba": TINY | {"state_size": 8},
    "mamba2": TINY | {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "rwkv": TINY | {"attention_hidden_size": 64, "context_length": 128},
    "recurrent_gemma": TINY | {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
    "gpt_bigcode": GPT2,
    "phi": TINY,
}


def tiny(family: str = "llama", **changes):
    values = {"tie_word_embeddings": False} if family == "llama" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.removesuffix("_tied"), **{**values, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config)


# --- it changes nothing


class Recording(Trainer):
    """Keeps what the model is trained on, in its order."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, num_items_in_batch)


def train_watched(model, tmp_path, guards, data=None, resume=False, trainer_class=Trainer, steps=8, **values):
    """`values`: of TrainingArguments, or of the trainer."""
    given = {name: values.pop(name) for name in ("eval_dataset", "data_collator", "optimizers") if name in values}
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**arguments, **values})
    data = rows(8 * steps) if data is None else data
    trainer = trainer_class(model=model, args=args, train_dataset=data, callbacks=guards, **given)
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def all_that_is_left(trainer: Trainer) -> dict:
    """What a training leaves behind, in plain values and tensors."""
    logs = [
        {k: v for k, v in log.items() if "runtime" not in k and "second" not in k} for log in trainer.state.log_history
    ]
    return {
        "logs": logs,
        "order": trainer.seen,
        "weights": list(trainer.model.state_dict().values()),
        "optimizer": [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()],
        "gradients": [parameter.grad for parameter in trainer.model.parameters()],
        "modes": [module.training for module in trainer.model.modules()],
        "generators": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), random.getstate()],
    }


def assert_same(first: dict, second: dict) -> None:
    for name in first:
        assert len(first[name]) == len(second[name]), name
        for own, other in zip(first[name], second[name], strict=True):
            same = torch.equal(own, other) if isinstance(own, torch.Tensor) else own == other
            assert same, f"{name}: {own} and {other}"


def count_iterators(monkeypatch) -> list:
    """Every iterator that any DataLoader gives out from now on."""
    made, begin = [], DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda self: made.append(type(self)) or begin(self))
    return made


EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
SAVED = {"save_strategy": "steps", "save_steps": 3}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
UNCHANGED = {
    "fp32": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "accumulation, bf16, dropout": {"gradient_accumulation_steps": 3, "bf16": True, "family": "gpt2"},
    "dropout, evaluated": {"family": "gpt2", **EVALUATED},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "mixture of experts": {"family": "mixtral"},
    "padding-free": {"uneven": True, "data_collator": DataCollatorWithFlattening()},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "re-entrant checkpointing, dropout": {"family": "gpt2", "gradient_accumulation_steps": 2, **REENTRANT},
    "workers": {"dataloader_num_workers": 2, **EVALUATED},
    "stream": {"is_stream": True, **EVALUATED},
    "stream, workers": {"is_stream": True, "dataloader_num_workers": 2},
    "saved": {"family": "gpt2", **SAVED, **EVALUATED},
}


def settings_of(case: dict) -> dict:
    """The options of `train_watched` for a case of UNCHANGED, with a model and data made anew."""
    case = {"family": "llama", "uneven": False, "is_stream": False, **case}
    data = (uneven_rows if case.pop("uneven") else rows)(8 * 8 * case.get("gradient_accumulation_steps", 1))
    data = Stream(data) if case.pop("is_stream") else data
    model = tiny(case.pop("family"))
    return {"model": model, "data": data, "eval_dataset": rows(12, seed=1), "logging_steps": 1, **case}


@pytest.mark.parametrize("case", UNCHANGED)
def test_a_run_is_the_same_with_and_without(case, tmp_path, monkeypatch):
    left, iterators = [], count_iterators(monkeypatch)
    for guards in ([], [RegressionCallback()]):
        iterators.clear()
        settings = settings_of(UNCHANGED[case])
        trainer = train_watched(tmp_path=tmp_path, guards=guards, trainer_class=Recording, **settings)
        left.append({**all_that_is_left(trainer), "iterators": [len(iterators)]})
    assert_same(*left)
    assert {"missing_label_shift", "non_causal_attention", "loss_not_finite"} <= guards[0].judged


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_resumed_run_is_the_same_with_and_without(is_stream, tmp_path):
    left = []
    for name in ("without", "with"):
        settings = {"family": "gpt2", "is_stream": is_stream, **SAVED, **EVALUATED}
        where, guards = tmp_path / name, [RegressionCallback()] if name == "with" else []
        train_watched(tmp_path=where, guards=guards, trainer_class=Recording, steps=3, **settings_of(settings))
        again = [RegressionCallback()] if guards else []
        trainer = train_watched(
            tmp_path=where, guards=again, resume=True, trainer_class=Recording, **settings_of(settings)
        )
        left.append(all_that_is_left(trainer))
    assert_same(*left)
    found = {(each.id, each.severity) for each in again[0].findings}
    assert "resume_jump" in again[0].judged and found == {("accumulation_mismatch", "info")}  # GPT-2's count


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_run_is_the_same_with_and_without(accumulation, tmp_path):
    counters, left = torch._dynamo.utils.counters, []
    for guards in ([], [RegressionCallback()]):
        torch._dynamo.reset()
        counters.clear()
        case = {"torch_compile": True, "gradient_accumulation_steps": accumulation}
        trainer = train_watched(tmp_path=tmp_path, guards=guards, trainer_class=Recording, **settings_of(case))
        graphs = [dict(counters[name]) for name in ("stats", "frames", "recompiles", "graph_break")]
        left.append({**all_that_is_left(trainer), "graphs": graphs})
    assert left[0]["graphs"][0]["unique_graphs"] > 0
    assert_same(*left)
    assert {"compiled_mismatch", "missing_label_shift"} <= guards[0].judged


def test_two_callbacks_do_the_work_of_one(tmp_path):
    guards = [RegressionCallback(), RegressionCallback()]
    trainer = train_watched(tiny(), tmp_path, guards, steps=4)
    trainer.train()
    assert "missing_label_shift" in guards[0].judged and not guards[1].judged
    assert guards[1].cannot_judge["missing_label_shift"] == "another RegressionCallback watches this Trainer"
    assert len((tmp_path / "run/_recipe/steps.jsonl").read_text().splitlines()) == 4
    assert "training_step" not in vars(trainer) and "prediction_step" not in vars(trainer)


# --- healthy runs are silent, and judged

STEPS = 60
MORE_STEPS = 100  # where a step has fewer targets: some guards wait for a number of them
JUDGED = {
    *("missing_label_shift", "double_label_shift", "wrong_loss_target", "init_loss_off"),
    *("non_causal_attention", "row_leak", "eval_not_repeatable", "eval_train_mismatch"),
    *("frozen_parameters", "untied_weights", "learning_rate_off", "loss_not_finite", "loss_spike", "grad_norm_off"),
    *("token_out_of_range", "padding_is_target", "eos_never_target", "repeated_data"),
    "loss_below_envelope",  # the one above needs 300 steps
}
WITH_EVALUATION = {"train_eval_gap", "train_eval_overlap"}
ENVELOPE = {"loss_below_envelope"}
PADDING_FREE = {"row_leak"}


def assert_healthy(guards: RegressionCallback, but: set = frozenset(), also: set = frozenset()) -> None:
    """No alarm, and every guard judged; all `but` these, and `also` those."""
    assert [finding.log_line() for finding in guards.findings if finding.severity != "info"] == []
    assert (JUDGED | also) - but <= guards.judged, sorted((JUDGED | also) - but - guards.judged)


def watch(model, tmp_path, data=None, **values) -> RegressionCallback:
    guards = RegressionCallback()
    data = rows(8 * STEPS) if data is None else data
    train_watched(model, tmp_path, [guards], data, **{"steps": STEPS, **values})
    return guards


SHOWN = ("gpt2", "mistral", "mixtral", "bloom", "bert", "mamba2")  # attention, positions and experts differ


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SHOWN else pytest.mark.slow) for name in FAMILIES]
)
def test_healthy_models_of_any_family(family, tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": STEPS // 2, "eval_dataset": rows(16, seed=1)}
    assert_healthy(watch(tiny(family), tmp_path, **evaluation), also=WITH_EVALUATION)


@pytest.fixture
def padding_tokenizer(tokenizer):
    """Pads with id 0, which is in no text."""
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.convert_ids_to_tokens(0)
    return padding


@pytest.mark.parametrize(
    "collator", ["language_modeling", "flattening", pytest.param("seq2seq", marks=pytest.mark.slow)]
)
def test_healthy_batches_of_any_collator(collator, padding_tokenizer, tmp_path):
    data = uneven_rows(8 * STEPS)
    if collator == "language_modeling":
        guards = watch(
            tiny(), tmp_path, data, data_collator=DataCollatorForLanguageModeling(padding_tokenizer, mlm=False)
        )
    elif collator == "seq2seq":
        data = [{**row, "labels": row["input_ids"]} for row in data]
        guards = watch(tiny(), tmp_path, data, data_collator=DataCollatorForSeq2Seq(padding_tokenizer))
    else:
        guards = watch(tiny(), tmp_path, data, data_collator=DataCollatorWithFlattening())
    if collator == "flattening":
        assert_healthy(guards, but=PADDING_FREE, also={"cross_document_attention"})
    else:
        assert_healthy(guards)


EPOCHS = {"steps": -1, "num_train_epochs": 14}
REGIMES = {
    "sgd": ({"optim": "sgd", "learning_rate": 0.5}, set()),
    "streamed by workers": ({"is_stream": True, "dataloader_num_workers": 2}, set()),
    "epochs with a short last step": ({"count": 164, "gradient_accumulation_steps": 3, **EPOCHS}, ENVELOPE),
    "data smaller than a step": ({"count": 12, "gradient_accumulation_steps": 4, "steps": 60}, ENVELOPE),
    "accumulation, re-entrant checkpointing": ({"gradient_accumulation_steps": 2, **REENTRANT}, set()),
    "best model kept": (
        {**EVALUATED, **SAVED, "eval_steps": 30, "save_steps": 30, "load_best_model_at_end": True},
        set(),
    ),
}
MORE_REGIMES = {
    "adafactor": ({"optim": "adafactor"}, set()),
    "no clipping": ({"max_grad_norm": 0}, set()),
    "cosine": ({"lr_scheduler_type": "cosine"}, set()),
    "wsd": ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20}}, set()),
    "linear, no warmup": ({"lr_scheduler_type": "linear", "warmup_steps": 0}, set()),
    "by loss": ({"lr_scheduler_type": "reduce_lr_on_plateau", **EVALUATED, "eval_steps": 20}, {"learning_rate_off"}),
    "epochs": ({"count": 160, "steps": -1, "num_train_epochs": 6}, set()),
    "last batch dropped": ({"count": 164, "dataloader_drop_last": True}, set()),
    "workers": ({"dataloader_num_workers": 2}, set()),
    "sequential": ({"train_sampling_strategy": "sequential"}, set()),
    "by length": ({"train_sampling_strategy": "group_by_length"}, set()),
    "logged seldom": ({"logging_steps": 500}, set()),
    "weights alone saved": ({**SAVED, "save_steps": 20, "save_only_model": True}, set()),
    "evaluated before": ({"eval_on_start": True}, WITH_EVALUATION),
    "label smoothing": ({"label_smoothing_factor": 0.1}, set()),
    "neftune": ({"neftune_noise_alpha": 5}, set()),
    "checkpointing": ({"activation_checkpointing": True}, set()),
    "accumulation, bf16": ({"gradient_accumulation_steps": 3, "bf16": True}, set()),
}


@pytest.mark.parametrize("regime", [*REGIMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_REGIMES)])
def test_healthy_runs_of_any_regime(regime, tmp_path):
    values, but = (REGIMES | MORE_REGIMES)[regime]
    values = {"is_stream": False, "count": 8 * STEPS * values.get("gradient_accumulation_steps", 1), **values}
    data = rows(values.pop("count"))
    data = Stream(data) if values.pop("is_stream") else data
    guards = watch(tiny(), tmp_path, data, eval_dataset=rows(16, seed=1), **values)
    assert_healthy(guards, but, {"accumulation_mismatch"} if "gradient_accumulation_steps" in values else set())


def test_a_healthy_model_that_goes_on_from_weights(tmp_path):
    train_watched(tiny(), tmp_path, [], steps=STEPS).save_model(tmp_path / "weights")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert_healthy(watch(model, tmp_path, rows(8 * STEPS, seed=1)), but={*ENVELOPE, "init_loss_off"})


def test_a_healthy_run_with_an_optimizer_and_scheduler_of_ones_own(tmp_path):
    model = tiny()
    groups = [{"params": model.model.parameters(), "lr": 1e-3}, {"params": model.lm_head.parameters(), "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    assert_healthy(watch(model, tmp_path, optimizers=(optimizer, scheduler)), but={"learning_rate_off"})


class LittleMemory(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_batch_size_found_by_trial(tmp_path):
    values = {"auto_find_batch_size": True, "trainer_class": LittleMemory, "steps": MORE_STEPS}
    assert_healthy(watch(tiny(), tmp_path, rows(8 * MORE_STEPS), **values))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_is_not_kept_alive(tmp_path, workers):
    """Without it neither are its model, in a GPU's memory, and its loader's workers, persistent or not."""
    loading = dict(dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0)
    guards = RegressionCallback()
    trainer = train_watched(tiny(), tmp_path, [guards], **loading)
    known, model, children = weakref.ref(trainer), weakref.ref(trainer.model), {*multiprocessing.active_children()}
    assert workers == 0 or children
    gc.disable()
    try:
        del trainer
        assert known() is None and not {*multiprocessing.active_children()} & children
    finally:
        gc.enable()
    assert guards.judged and guards.history and guards.facts and guards.failure is None
    del guards
    gc.collect()
    assert model() is None


def test_evaluations_of_several_sets_and_outside_of_training(tmp_path):
    sets = {"one": rows(16, seed=1), "two": rows(16, seed=2)}
    guards = RegressionCallback()
    trainer = train_watched(tiny(), tmp_path, [], rows(8 * 60), steps=1, eval_dataset=sets)
    trainer.add_callback(guards)
    trainer.evaluate()
    trainer.args.max_steps, trainer.args.eval_strategy, trainer.args.eval_steps = 60, "steps", 20
    trainer.train()
    trainer.evaluate()
    trainer.predict(rows(16, seed=3))
    trainer.train()
    # The second training begins with a trained model.
    assert_healthy(guards, but=ENVELOPE | {"init_loss_off"}, also={"train_eval_overlap"})


# --- TRL


def texts(count: int, seed: int = 0) -> list[str]:
    """Of 20 to 90 characters, one token each."""
    lengths = np.random.default_rng(seed).integers(20, 90, count)
    ids = markov_text(count, 90, seed, vocabulary=90) + 33
    return ["".join(map(chr, row[:length].tolist())) for row, length in zip(ids, lengths, strict=True)]


def prompts(count: int) -> dict:
    parts = [(text[: len(text) // 3], text[len(text) // 3 :]) for text in texts(count)]
    return {"prompt": [prompt for prompt, _ in parts], "completion": [completion for _, completion in parts]}


def watch_sft(tokenizer, tmp_path, data: dict, collate=lambda inner: inner, steps=STEPS, **values):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "max_length": 64,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    trainer = trl.SFTTrainer(
        model=tiny(vocab_size=257, eos_token_id=256),
        args=trl.SFTConfig(**{**arguments, **values}),
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=copy.deepcopy(tokenizer),
    )
    trainer.data_collator = collate(trainer.data_collator)
    guards = RegressionCallback()
    trainer.add_callback(guards)
    trainer.train()
    return guards


SFT = {
    "text": ({}, set()),
    "logits": ({"loss_type": "nll"}, set()),
    "packing": ({"packing": True}, PADDING_FREE),
    "wrapped": ({"packing": True, "packing_strategy": "wrapped"}, set()),
    "padding-free": ({"padding_free": True, "max_length": None}, PADDING_FREE),
    "prompts": ({"completion_only_loss": True}, set()),
    "packed prompts, bf16": ({"packing": True, "bf16": True}, PADDING_FREE),
}
SFT_SHOWN = ("text", "packing", "padding-free", "prompts")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in SFT_SHOWN else pytest.mark.slow) for c in SFT])
def test_healthy_sft(case, tokenizer, tmp_path):
    values, but = SFT[case]
    steps = MORE_STEPS if "prompts" in case else STEPS
    data = prompts(2 * 8 * steps) if "prompts" in case else {"text": texts(2 * 8 * steps)}
    guards = watch_sft(tokenizer, tmp_path, data, steps=steps, **values)
    assert_healthy(guards, but, also={"cross_document_attention"} if but else set())


def labels_moved(by: int):
    """A collator whose labels lie one place to the right (1) or left (-1) of the tokens."""

    def collate(inner):
        def moved(examples):
            batch = inner(examples)
            batch["labels"] = batch["labels"].roll(by, dims=1)
            batch["labels"][:, 0 if by > 0 else -1] = -100
            return batch

        return moved

    return collate


@pytest.mark.parametrize("values", [{}, {"packing": True}, {"completion_only_loss": True}])
@pytest.mark.parametrize(("by", "named"), [(-1, "double_label_shift"), (1, "missing_label_shift")])
def test_wrong_shifts_in_sft_are_named(by, named, values, tokenizer, tmp_path):
    data = prompts(100) if "completion_only_loss" in values else {"text": texts(100)}
    guards = watch_sft(tokenizer, tmp_path, data, labels_moved(by), steps=3, **values)
    assert named in [finding.id for finding in guards.findings if finding.step == 0]
