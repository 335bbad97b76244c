"""Small things that many tests need: a throw-away tokenizer, a corpus, a tiny model. No network anywhere."""

import functools
import gc
import json
import logging
import os
import shutil
import tempfile
from dataclasses import replace
from types import FrameType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # read when it is imported, by whichever test

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend, Trainer

from recipe.guards.guard import Guard

torch.set_num_threads(1)
# the same examples in every run: a test that fails by chance on somebody else's change is of no use
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


# A test of theirs takes a minute or more.
LONG = ("test_zoo.py", "test_reports.py", "test_faults.py", "test_ranks.py", "test_data_faults.py")


def pytest_collection_modifyitems(items):
    """The long ones first: at the end one of them would run beside idle cores."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish(session):
    """Accelerate collects garbage at the start of each training. Nothing that is imported by now becomes garbage, and
    to look through it took a third of the time of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_levels_stay_as_they_are():
    """A run in this process sets them (`configure_logging`), and the next test may listen for a warning."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def samples_are_short(monkeypatch):
    """They took a third of a short run."""
    monkeypatch.setattr("recipe.trainer.SAMPLE_TOKENS", 8)


@pytest.fixture(autouse=True)
def findings_fit_in_their_line(monkeypatch):
    """What any guard says in any test: nothing is cut in the log line, the likely cause least of all. Details in
    parentheses and behind a colon may be left out."""
    cut, make = [], Guard.finding.__func__

    def finding(cls, *arguments, **keywords):
        found = make(cls, *arguments, **keywords)
        line = replace(found, step=9999).log_line()
        is_cut = line.count("…") > sum(text.count("…") for text in (found.found, found.expected))
        cut.extend([line] if is_cut else [])
        return found

    monkeypatch.setattr(Guard, "finding", classmethod(finding))
    yield
    assert cut == []


@pytest.fixture(autouse=True)
def a_training_leaves_no_frames(monkeypatch, caplog):
    """Whatever the guards keep of an exception: its frames would hold the loader's workers, who do not end then. They
    are looked for before garbage is collected; not where pytest itself keeps a traceback that was logged."""
    kept, train = [], Trainer.train

    def frames_of_trainings() -> dict[int, FrameType]:
        frames = [each for each in gc.get_objects() if type(each) is FrameType]
        return {id(frame): frame for frame in frames if frame.f_code.co_name == "_inner_training_loop"}

    @functools.wraps(train)
    def watched(self, *arguments, **keywords):
        is_on, before = gc.isenabled(), frames_of_trainings()  # such as one that ended in an exception
        gc.disable()
        try:
            found = train(self, *arguments, **keywords)
            if not any(record.exc_info for record in caplog.records):
                kept.extend(str(frame) for key, frame in frames_of_trainings().items() if key not in before)
            return found
        finally:
            if is_on:
                gc.enable()

    monkeypatch.setattr(Trainer, "train", watched)
    yield
    assert kept == []


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, EOS = id 256: sequences are easy to predict by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return TokenizersBackend(tokenizer_object=backend, eos_token="</s>", model_max_length=10**6)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


def document(index: int) -> str:
    """A short text that names its own index and differs in length from its neighbours."""
    return f"<{index}> " + " ".join(f"w{(index * 7 + i * i) % 97}" for i in range(3 + index * 5 % 23))


@pytest.fixture
def write_parquet(tmp_path):
    def write(
        num_documents: int, rows_per_group: int = 10, num_files: int = 1, texts=None, column: str = "text"
    ) -> str:
        texts = texts if texts is not None else [document(i) for i in range(num_documents)]
        share = -(-len(texts) // num_files)
        for file in range(num_files):
            table = pa.table({column: pa.array(texts[file * share : (file + 1) * share], pa.string())})
            pq.write_table(table, tmp_path / f"part-{file:02}.parquet", row_group_size=rows_per_group)
        return str(tmp_path / "part-*.parquet")

    return write


@pytest.fixture(scope="session")
def tiny_config():
    return {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
        "bos_token_id": None,
    }


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny_config))


@pytest.fixture
def write_config(tmp_path, tiny_config, tokenizer_dir, write_parquet):
    """A whole run that takes seconds: writes data, model and config, returns the config's path."""

    def write(**changes) -> str:
        (tmp_path / "model.json").write_text(json.dumps(tiny_config))
        values = {
            "model_config": str(tmp_path / "model.json"),
            "tokenizer": tokenizer_dir,
            "source": write_parquet(300),
            "block_size": 32,
            "max_steps": 6,
            "eval_skip": 280,
            "eval_documents": 10,
            "num_lanes": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.003,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
            "output_dir": str(tmp_path / "run"),
        }
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**values, **changes}))
        return str(path)

    return write
