"""What the guards cost a training: nothing is read from the device in a steady step, and what is kept of a step does
not grow with its tokens or ranks."""

import pickle
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from recipe.guards import RegressionCallback, worker
from recipe.guards.fingerprints import STEP_WINDOWS, Rates, fingerprint
from recipe.guards.ledger import Ledger
from recipe.guards.repetition import Repetition
from recipe.guards.taps import is_checked

READS = ("item", "tolist", "cpu", "__bool__", "__float__", "nonzero")
STEPS = 19  # before the probes run again, before step 21
STEADY = [step for step in range(2, STEPS) if not is_checked(step + 1)]


class Watch(TrainerCallback):
    """Counts what guards read of tensors on the training's own thread, by step (optimizer steps before it)."""

    def __init__(self, monkeypatch):
        self.step, self.found, self.thread = -1, [], threading.get_ident()
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, read):
        def call(tensor, *arguments, **kwargs):
            if threading.get_ident() == self.thread:
                frame = sys._getframe(1)
                while frame is not None and "/recipe/guards/" not in frame.f_code.co_filename:
                    frame = None if frame.f_code.co_name == "training_step" else frame.f_back
                if frame is not None:
                    self.found.append((self.step, name, frame.f_code.co_qualname))
            return read(tensor, *arguments, **kwargs)

        return call

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self.step = -1


def train(folder, config, callbacks=(), device="cpu") -> RegressionCallback:
    torch.manual_seed(0)
    ids = torch.randint(3, 250, (STEPS * 4, 32), generator=torch.Generator().manual_seed(1))
    given = dict(max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no")
    arguments = TrainingArguments(
        str(folder), **given, use_cpu=device == "cpu", report_to=[], logging_steps=STEPS, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    guards = RegressionCallback()
    model = LlamaForCausalLM(LlamaConfig(**config))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks, guards])
    trainer.train()
    assert guards.failure is None and [record["step"] for record in guards.history] == list(range(1, STEPS + 1))
    return guards


def test_a_steady_step_reads_nothing_on_the_trainings_thread(tiny_config, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    guards = train(tmp_path, tiny_config, [watch])
    assert {"repeated_data", "loss_below_envelope", "eos_never_target"} & set(guards.judged)
    assert [found for found in watch.found if found[0] in STEADY] == []
    assert any(step == 0 for step, *_ in watch.found), "the probes before step 1 read: the count works"


def test_a_pass_of_another_rank_begins_before_its_step_is_judged(monkeypatch):
    """Rows of that step may be of the pass already."""
    calls, told = [], {"passes": [], "failed": {}, "failure": None}
    of_other = {**told, "passes": [("text", None, "pass 2 of text")]}
    ranks = SimpleNamespace(gather=lambda own: [own, of_other], broadcast=lambda value: value)
    session = SimpleNamespace(ranks=ranks, is_main=True, note_pass=lambda *known: calls.append(known[0]) or True)
    monkeypatch.setattr(worker, "observe", lambda *_: calls.append("judged") or (None, []))
    found = worker.exchange(session, None, told, answer=())
    assert calls == ["text", "judged"] and found.messages == ["pass 2 of text"] and found.fault is None


# --- what is kept


def rows_of(seed: int, count: int, length: int = 128) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 30_000, (count, length)))


def places(step: int, rank: int, count: int) -> list[tuple]:
    return [(step, rank, number // 4, number % 4) for number in range(count)]


def feed(ledger: Ledger, steps: list[list[np.ndarray]], first: int, ranks: int, rates=Rates()) -> list:  # noqa: B008
    """Rows are dealt to ranks in blocks, so that the order of all of them is the same for any number. Returns what
    is found after each step."""
    found = []
    for step, rows in enumerate(steps, first):
        shares = [rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks] for rank in range(ranks)]
        parts = [fingerprint(share, places(step, rank, len(share)), (2,), rates) for rank, share in enumerate(shares)]
        ledger.observe_train(pickle.loads(pickle.dumps(parts)))
        found.append(Repetition.judge_repetition(ledger, 4.0))
    return found


REPEATED = ("repeated_data", "warning", 0.5)  # of a stream that is read twice
STREAM = [rows_of(seed, 32) for seed in range(10)] * 2


def shares(found) -> list:
    return [finding and (finding.id, finding.severity, finding.evidence["share"]) for finding in found]


def test_any_number_of_ranks_finds_the_same():
    one = shares(feed(Ledger(), STREAM, 1, ranks=1))
    assert one[:10] == [None] * 10 and one[-1] == REPEATED
    assert shares(feed(Ledger(), STREAM, 1, ranks=8)) == one


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_run_resumes_with_another_number_of_ranks(ranks):
    whole, first = Ledger(), Ledger()
    expected = shares(feed(whole, STREAM, 1, ranks=4))
    found = shares(feed(first, STREAM[:12], 1, ranks=4))
    second = Ledger.from_state(first.state())
    assert found + shares(feed(second, STREAM[12:], 13, ranks)) == expected


def test_what_is_kept_of_a_step_does_not_grow_with_its_tokens():
    sizes = []
    for tokens in (1 << 16, 1 << 19, 1 << 22):
        rates = Rates.of(tokens, tokens // 1024)
        sizes.append(tokens / rates.windows)
    assert sizes == [STEP_WINDOWS] * 3
    assert Rates.of(49_152, 48) == Rates.of(1, 1) == Rates()
    assert Rates.of(1 << 22, 1 << 16).rows == 16


def test_a_stream_that_begins_again_is_found_where_few_windows_are_kept():
    rates = Rates(256, 4)
    found = shares(feed(Ledger(rates), STREAM, 1, ranks=2, rates=rates))
    assert found[9] is None and found[-1] == REPEATED
    again = [[*rows[:24], *rows_of(50 + number, 8)] for number, rows in enumerate(STREAM[10:])]
    (*_, last) = shares(feed(Ledger(rates), STREAM[:10] + again, 1, ranks=2, rates=rates))
    assert last[1] == "warning" and abs(last[2] - 0.375) < 0.1


def test_larger_steps_after_a_resume_keep_less_of_what_was_kept():
    first = Ledger()
    feed(first, STREAM[:10], 1, ranks=1)
    rates = Rates(64, 2)
    second = Ledger.from_state(first.state(), rates)
    assert 0 < second.tables["windows"].size < 0.5 * first.tables["windows"].size
    assert shares(feed(second, STREAM[10:], 11, ranks=2, rates=rates))[-1][:2] == REPEATED[:2]


def test_eval_rows_that_another_rank_trains_on_are_found():
    ledger, held_out = Ledger(), rows_of(99, 16)
    ledger.observe_eval(held_out)
    feed(
        ledger, [[*rows[:-4], *held_out[4 * step : 4 * step + 4]] for step, rows in enumerate(STREAM[:4])], 1, ranks=2
    )
    assert Repetition.judge_overlap(ledger, 4.0).evidence["share"] == 1.0
