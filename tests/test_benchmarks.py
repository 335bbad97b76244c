"""The arithmetic of the training benchmarks, on hand-made records: nothing is trained."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import growth, throughput, time_to_loss
from tests.benchmarks.races import eval_loss
from tests.benchmarks.time_to_loss import SEEDS, SWEEP, best_of, make_result, next_run, summary


def record(arm="ours", number=0, seed=SEEDS[0], tokens=100, reached=True, target=5.03, slower=1) -> dict:
    ends = {
        "tokens": tokens,
        "seconds": tokens / 10,
        "processor_seconds": slower * tokens / 5,
        "evals": [[tokens, 5.0]],
    }
    ends["processor"] = "one, AVX2, 2 CPUs" if slower > 1 else "one, AVX512, 2 CPUs"
    known = {"arm": arm, "target": target, "settings": SWEEP[arm, target][number], "seed": seed}
    return {**known, "reached": reached, **ends}


def whole_sweep(ours: list[int], stock: list[int]) -> list[dict]:
    tokens = {"ours": ours, "stock": stock}
    return [record(arm, number, tokens=each) for arm, many in tokens.items() for number, each in enumerate(many)]


def test_a_number_of_runs_is_not_negative():
    assert time_to_loss.natural("0") == 0
    with pytest.raises(ValueError):
        time_to_loss.natural("-1")


def test_a_sweep_has_at_most_8_runs_an_arm():
    assert all(len(runs) <= 8 for runs in SWEEP.values())
    assert {arm for arm, _ in SWEEP} == set(time_to_loss.ARMS)


def test_runs_go_on_where_they_were_stopped_and_end_at_the_best_of_their_arm():
    first = next_run([])
    assert (first["arm"], first["seed"], first["settings"]) == ("ours", SEEDS[0], SWEEP["ours", 5.03][0])
    second = next_run([record(tokens=500)])
    assert second["settings"] == SWEEP["ours", 5.03][1] and second["limit"] == 500
    assert next_run([record(tokens=500, reached=False)])["limit"] > 10**9


def test_winners_are_repeated_with_the_other_seeds():
    sizes = [len(SWEEP[arm, 5.03]) for arm in ("ours", "stock")]
    records = whole_sweep(*([[300, 200, 400, 250, 900, 900, 900, 900][:size] for size in sizes]))
    assert best_of(records, "ours", 5.03)["settings"] == SWEEP["ours", 5.03][1]
    seen = []
    while (run := next_run(records))["target"] == 5.03:  # its seeds come before the next loss
        seen.append((run["arm"], run["seed"]))
        records.append(record(run["arm"], 1, run["seed"], tokens=210))
    assert seen == [(arm, seed) for seed in SEEDS[1:] for arm in ("ours", "stock")]
    row = summary(records)[0]
    assert (row["seeds"], row["tokens"]) == (3, [200, 210, 210])


def test_the_table_has_the_ratio_of_the_medians():
    sizes = [len(SWEEP[arm, 5.03]) for arm in ("ours", "stock")]
    result = make_result(whole_sweep([200] * sizes[0], [500] * sizes[1]))
    assert [row["tokens, median"] for row in result.rows] == [200, 500]
    assert "0.40 of the tokens and of the processor time 0.40 on AVX512." in result.note


def test_times_are_compared_with_those_of_the_same_processor():
    records = [
        record("ours", 0, seed, tokens, slower=slower)
        for seed, tokens, slower in zip(SEEDS, (200, 210, 220), (1, 3, 3), strict=True)
    ]
    records += [
        record("stock", 0, seed, tokens, slower=slower)
        for seed, tokens, slower in zip(SEEDS, (400, 500, 700), (1, 3, 1), strict=True)
    ]
    result = make_result(records)
    assert [row["processor s, median"] for row in result.rows] == [
        "40 (1 on AVX512); 129 (2 on AVX2)",
        "110 (2 on AVX512); 300 (1 on AVX2)",
    ]
    assert "0.42 of the tokens and of the processor time 0.36 on AVX512, 0.43 on AVX2." in result.note


def test_an_eval_loss_is_the_mean_over_all_rows():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape))
    rows = torch.randint(16, (35, 12))  # in batches of 32 and 3
    wanted = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in rows]).mean()
    assert eval_loss(model, rows) == pytest.approx(wanted.item(), rel=1e-5) and model.training


def arm(seconds: float, parts=None) -> list[dict]:
    known = {"first": 9.0, "peak_mb": 500.0, "parameters": 1000, "rates": {"fp32": 6e8}}
    return [{"seconds": [seconds, seconds, 9 * seconds], **known, "parts": parts or {}}]


def test_throughput_is_of_the_median_step_and_beside_the_best_stock():
    found = {"recipe": arm(0.5, {"guard EosToken": 2e-3}), "stock Trainer": arm(1.0), "stock Trainer, bf16": arm(0.25)}
    rows = {row["arm"]: row for row in throughput.rows_of("demo", found)}
    assert rows["recipe"]["tokens/s"] == 2048 / 0.5
    assert [rows[name]["of the best stock"] for name in found] == ["0.50", "0.25", "1.00"]
    assert rows["recipe"]["of the matrix rate"] == "4%"  # 6 FLOPs x 1,000 parameters x 4,096 tokens/s
    assert "guard EosToken 2" in throughput.note_of("demo", found)


def test_growth_is_against_the_first_point():
    points = {
        name: {**arm(s)[0], "tokens": 1000, "parts": {"end of step in all": 1e-3}} for name, s in (("a", 1), ("b", 3))
    }
    rows = growth.rows_of("block", points)
    assert [row["to the first"] for row in rows] == ["1.00", "3.00"]
    assert rows[0]["us a token"] == 1000 and rows[0]["end of step (guards), us a token"] == 1.0
    assert growth.draw({"block": points, "rows": points}).count("<circle") == 4


def test_a_winner_also_runs_where_the_other_arm_ran(monkeypatch):
    """Once the seeds are done: seconds of two processors are not compared."""
    sizes = [len(SWEEP[arm, 5.03]) for arm in ("ours", "stock")]
    records = whole_sweep([200] * sizes[0], [500] * sizes[1])
    records += [record(arm, 0, seed, 200) for seed in SEEDS[1:] for arm in ("ours", "stock")]
    here = {"processor": "AMD EPYC, AVX2, 2 CPUs"}
    records = [each | here if each["arm"] == "stock" else each for each in records]
    monkeypatch.setattr(time_to_loss, "processor", lambda: here["processor"])
    run = next_run(records)
    assert (run["arm"], run["target"], run["settings"]) == ("ours", 5.03, SWEEP["ours", 5.03][0])
    assert next_run([*records, record("ours", 0, tokens=200) | here])["target"] != 5.03
