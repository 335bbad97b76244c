"""The verdict: on plain facts, and on runs."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from recipe.__main__ import run
from recipe.guards import Finding
from recipe.guards.diverged import LossDiverged
from recipe.guards.step import largest_rate, plain_losses
from recipe.plain_json import dumps
from recipe.results import verdict
from recipe.verdict import LAST_STEPS, Learned, final_loss, judge_run
from tests.test_guards_on_runs import train

JUDGED = {"missing_label_shift", "loss_not_finite"}
DEMO = Learned(
    final_loss=4.5,
    unigram=6.58,
    steps=800,
    tokens_seen=1_638_400,
    learning_rate_sum=1.4,
    vocab_size=4096,
    unigram_of_run=6.6,
    bigram_of_run=5.4,
)


def text_of(learned=DEMO, findings=(), judged=JUDGED, **more) -> str:
    return judge_run(findings, learned, judged, **more).text


def found(name: str, severity: str) -> Finding:
    return Finding(name, severity, 1, 1, "x", "y")


def test_a_run_that_learned_from_context_is_healthy():
    assert judge_run([found("accumulation_mismatch", "info")], DEMO, JUDGED).text == "healthy"


NOTHING = "no fault found, but nothing learned from context yet: "


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate_sum": 0.0}, "the learning rate was 0"),
        ({"steps": 30, "tokens_seen": 15_360}, "too few tokens, 15,360 in 30 steps"),
        ({"learning_rate_sum": 0.01}, "the learning rates of all steps add up to 0.01 only"),
        ({}, "after 1,638,400 tokens in 800 steps, for no reason that a guard knows"),
        ({"final_loss": math.nan}, "the loss is not finite"),
        ({"final_loss": 5.0, "learning_rate_sum": 0.0}, "the learning rate was 0"),
        ({"final_loss": 5.0, "learning_rate_sum": 4e-8}, "the learning rates add up to 4e-08 only"),
        ({"final_loss": 358.0, "steps": 15}, "the loss has diverged, above a uniform guess, 8.32"),
        ({"final_loss": 7.1, "first_loss": 6.3, "steps": 60}, "the loss rose, from 6.30 in the first step"),
    ],
)
def test_a_loss_that_is_not_under_the_frequencies_is_not_healthy(changes, reason):
    learned = replace(DEMO, **{"final_loss": 8.0, **changes})
    compared = f"(final loss {learned.final_loss:.2f}, unigram entropy 6.58)"
    verdict = judge_run([], learned, JUDGED)
    assert (verdict.kind, verdict.text) == ("nothing_learned", f"{NOTHING}{reason} {compared}")


def test_exactly_the_entropy_is_not_under_it_and_counting_has_a_margin():
    assert text_of(replace(DEMO, final_loss=6.58)).startswith(NOTHING)
    assert text_of(replace(DEMO, final_loss=6.57)) == "healthy"
    assert text_of(replace(DEMO, final_loss=6.57, is_prequential=True)).startswith(NOTHING)
    assert text_of(replace(DEMO, final_loss=6.50, is_prequential=True)) == "healthy"


@pytest.mark.parametrize(
    ("eval_loss", "is_healthy"),
    [(13.2, False), (8.4, False), (8.2, True), (6.9, True), (None, True)],  # ln V is 8.32
)
def test_where_rows_come_again_an_evaluation_must_beat_a_guess(eval_loss, is_healthy):
    text = text_of(replace(DEMO, final_loss=0.7, eval_loss=eval_loss))
    assert text == "healthy" if is_healthy else text.startswith(f"{NOTHING}its rows were learned by heart")


def watched(reported, sampled, evaluations=None, passes=2, evidence=(), is_new=True):
    """What `verdict` reads of a callback: a window of 20 steps, sampled in every second one, vocabulary 4,096."""
    guard = LossDiverged()
    window = [[reported(step), sampled(step) if step % 2 and sampled else None] for step in range(20)]
    first = None if sampled is None else sampled(0)
    guard.state = {"window": window, "first_reported": reported(-99), "first_sampled": first}
    ngrams = SimpleNamespace(recent=[(6.6, 5.4)])
    session = SimpleNamespace(
        runner=SimpleNamespace(guards=[guard]),
        taps=SimpleNamespace(ngrams=ngrams),
        run=SimpleNamespace(vocab_size=4096, is_new_model=is_new),
        passes=passes,
        eval_losses=evaluations or {},
        learning_rate_sum=1.0,
    )
    return SimpleNamespace(
        session=session,
        history=[{"step": step + 1, "loss": loss} for step, (loss, _) in enumerate(window)],
        findings=[Finding("accumulation_mismatch", "info", 1, 1, "x", "y", evidence=each) for each in evidence],
        tokens_seen=10_240,
        judged=JUDGED,
        not_applicable={},
        cannot_judge={},
        failure=None,
    )


def noisy(loss):
    return lambda step: loss + 0.3 * math.sin(7 * step)


UNSHIFTED = {"num_items": 128, "scored": 96, "weight": 1 / 128}


@pytest.mark.parametrize(
    ("of_run", "words"),
    [
        (watched(lambda step: 4.1, noisy(8.2)), "too few tokens, 10,240 in 20 steps (final loss 8.2"),  # halved
        (watched(lambda step: 2900.0, noisy(6.0)), "healthy"),  # summed
        (watched(lambda step: 6.6, noisy(6.5)), "too few tokens"),  # they agree: the reported one
        (watched(lambda step: 6.2, None, evidence=[UNSHIFTED]), "too few tokens, 10,240 in 20 steps (final loss 8.27"),
        (watched(lambda step: 4.1, None), "not judged: the reported loss is not known to be per token"),
        (watched(lambda step: 4.1, None, is_new=False), "healthy"),  # compiled, and trained before
        (watched(lambda step: 0.7, noisy(0.7), {"eval_loss": 13.2}), "its rows were learned by heart"),
        (watched(lambda step: 0.7, noisy(0.7), {"eval_a_loss": 13.2, "eval_b_loss": 5.0}), "healthy"),  # several sets
        (watched(lambda step: 4.0, noisy(4.0), {"eval_loss": 13.2}, passes=1), "healthy"),  # another domain
        (watched(lambda step: 70.0, noisy(0.7), {"eval_loss": 1320.0}), "healthy"),  # sums
    ],
)
def test_the_loss_per_token_is_judged_in_whatever_unit_it_is_reported(of_run, words):
    assert words in verdict(of_run, None).text


def test_an_evaluation_counts_if_it_is_a_mean_of_its_batches():
    ranks = [{"losses": [5.0, 7.0]}, {"losses": [6.0]}]
    metrics = {"eval_loss": 6.1, "eval_sum_loss": 960.0, "eval_runtime": 6.0}
    assert plain_losses(metrics, ranks) == {"eval_loss": 6.1} and plain_losses(metrics, [{"losses": []}]) == {}
    assert largest_rate([(0.0, 0.1), (1e-3, None)]) == 1e-3 and largest_rate([(None, None)]) == 1.0


def test_random_tokens_are_not_judged():
    random = replace(DEMO, final_loss=8.4, unigram=8.31, unigram_of_run=8.32, bigram_of_run=8.32)
    assert text_of(random).startswith(
        "not judged: context does not help on this data (one token of it saves 0.00 nats;"
    )
    few = replace(random, tokens_seen=50_000, steps=30)
    assert "too few tokens" in text_of(few)  # a bigram has not learned anything yet either


def test_what_could_not_be_watched_is_not_judged():
    assert text_of(failure="the guards failed with X") == "not judged: the guards failed with X"
    reason = {"missing_label_shift": "the batch has no labels"}
    words = "not judged: what the loss is computed on is not known (the batch has no labels)"
    assert text_of(judged={"loss_spike"}, reasons=reason) == words
    reason = {"missing_label_shift": "the objective is a preference"}
    assert text_of(judged={"loss_spike"}, reasons=reason) == "not judged: the objective is a preference"
    assert text_of(replace(DEMO, steps=0)) == "not judged: no step was trained"
    assert text_of(replace(DEMO, final_loss=None)) == "not judged: no final loss is known"
    assert text_of(replace(DEMO, unigram=None)) == "not judged: no unigram entropy is known"


def test_findings_come_first_and_root_causes_first_of_them():
    both = [found("train_eval_gap", "warning"), found("loss_diverged", "error"), found("loss_not_finite", "error")]
    assert text_of(findings=both) == "not to be trusted: loss_diverged, loss_not_finite"
    assert text_of(findings=both[:1], failure="x", interrupted_by="SIGINT") == "suspicious: train_eval_gap"


def test_an_interrupted_run_says_so():
    assert text_of(interrupted_by="SIGTERM") == "interrupted by SIGTERM, healthy so far"
    few = text_of(replace(DEMO, final_loss=8.0, steps=9, tokens_seen=900), interrupted_by="SIGTERM")
    assert few.startswith(f"interrupted by SIGTERM, so far {NOTHING}too few tokens")


def test_the_final_loss_is_the_evaluations_else_the_mean_of_the_last_steps():
    assert final_loss(4.0, [9.0]) == 4.0
    assert final_loss(None, [100.0] + [5.0, 7.0] * (LAST_STEPS // 2)) == 6.0
    assert final_loss(None, []) is None


def test_json_has_no_nan():
    value = {"a": [1.0, math.nan, (math.inf, "x")], "b": None, "c": True}
    assert json.loads(dumps(value), parse_constant=pytest.fail) == {
        "a": [1.0, None, [None, "x"]],
        "b": None,
        "c": True,
    }


# --- runs


def test_in_a_trainer_of_ones_own(tmp_path):
    """A text of order 1 over 64 tokens, of which a small model learns the bigrams in 150 steps."""
    guards = train(tmp_path / "healthy", steps=150, learning_rate=1e-2)
    assert verdict(guards, interrupted_by=None).text == "healthy"
    frozen = train(tmp_path / "frozen", steps=40, learning_rate=0.0)
    assert verdict(frozen, interrupted_by=None).text.startswith(f"{NOTHING}the learning rate was 0 (final loss 5.5")


def strict(file) -> list[dict]:
    lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_a_rate_of_0_is_not_healthy(write_config, tmp_path):
    assert run(["train", write_config(learning_rate=0.0, max_steps=40, eval_steps=40)]) == 0
    (stored,) = strict(tmp_path / "run/run.json")
    assert stored["result"]["verdict"].startswith(f"{NOTHING}the learning rate was 0 (final loss 5.5")
    assert "verdict info" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_a_run_that_diverges_is_not_to_be_trusted(write_config, tmp_path, rate):
    assert run(["train", write_config(learning_rate=rate, max_steps=30, eval_steps=30)]) == 0
    (stored,) = strict(tmp_path / "run/run.json")
    assert stored["result"]["verdict"] == "not to be trusted: loss_diverged"
    assert "verdict error" in (tmp_path / "run/report.html").read_text()


def test_a_run_that_is_lost_ends_in_a_verdict_and_a_report(write_config, tmp_path, caplog):
    """At a rate of 1e30 the loss is lost after a step or two; such steps are not applied, the third ends the run."""
    assert run(["train", write_config(learning_rate=1e30), "--json"]) == 3
    assert "3 steps in a row were not finite" in caplog.text
    files = ["run.json", "exit.json", "steps.jsonl", "findings.jsonl"]
    stored, ended, *_ = [record for name in files for record in strict(tmp_path / "run" / name)]
    assert stored["result"]["verdict"].startswith("suspicious: loss_not_finite")
    assert ended == {"code": 3, "reason": stored["result"]["verdict"]}
    assert "loss_not_finite" in (tmp_path / "run" / "report.html").read_text()
