"""The report: every number recomputed from the run's files, nothing unescaped, and a page for every half-dead run."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from recipe.chart import (
    LABEL_ROW,
    LABEL_TOP,
    Chart,
    build_y_axis,
    choose_rows,
    compact,
    decimate,
    linear_ticks,
    log_ticks,
    path,
    smooth,
    thin,
)
from recipe.errors import UserError
from recipe.guards import MEANINGS
from recipe.guards.records import read_lines
from recipe.model_card import write_model_card
from recipe.report import RUN_FILES, write_report

VOID = {"meta", "br", "link", "input"}
HOSTILE = '</pre></script><script>alert("1")</script> & <b>'
TOKENS_PER_STEP = 1024
KERNELS = "attention sdpa | precision fp32 | eager | device cpu"
FINDINGS = [
    {
        "id": "accumulation_mismatch",
        "severity": "info",
        "step": 30,
        "tokens_seen": 30 * TOKENS_PER_STEP,
        "found": "pass 2 begins",
        "expected": "one pass",
        "likely_causes": [],
        "action": "",
        "evidence": {"pass": 2},
    },
    {
        "id": "missing_label_shift",
        "severity": "error",
        "step": 0,
        "tokens_seen": 0,
        "found": f"target = token i {HOSTILE}",
        "expected": "token i+1",
        "likely_causes": ["labels passed unshifted", HOSTILE],
        "action": "Let the model shift.",
        "evidence": {"positions": 48},
    },
]


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, tags, key figures, the table of data facts, and scripts."""

    def __init__(self, html):
        super().__init__()
        self.open_tags, self.tags, self.text, self.figures, self.scripts = [], [], [], {}, []
        self.cells = {"th": [], "td": []}
        self.feed(html)
        self.close()
        assert not self.open_tags, self.open_tags
        self.facts = list(zip(self.cells["th"], self.cells["td"], strict=True))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open_tags.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1][0] == tag, (tag, self.open_tags[-3:])
        self.open_tags.pop()

    def handle_data(self, data):
        if self.open_tags and self.open_tags[-1][0] == "script":
            self.scripts.append(data)
            return
        self.text.append(data)
        for tag, attributes in self.open_tags:
            if tag == "div" and "data-key" in attributes:
                self.figures.setdefault(attributes["data-key"], []).append(data)
        if ("table", {"class": "facts"}) in self.open_tags and self.open_tags[-1][0] in self.cells:
            self.cells[self.open_tags[-1][0]].append(data)

    def has(self, text):
        return text in "".join(self.text)

    def count(self, tag, css):
        return sum(name == tag and attributes.get("class") == css for name, attributes in self.tags)


def step_records(num_steps):
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "tokens_seen": step * TOKENS_PER_STEP,
            "loss": 3.0 + 5.0 / step**0.5 + float(rng.normal(0, 0.05)),
            "grad_norm": 1.0 + 9.0 / step,
            "learning_rate": 3e-4 * min(1.0, step / 10),
            "tokens_per_second": 20_000.0 + step % 7,
        }
        for step in range(1, num_steps + 1)
    ]


def eval_records(num_steps):
    return [
        {
            "step": step,
            "tokens_seen": step * TOKENS_PER_STEP,
            "eval_loss": 8.3 - step / num_steps * 4.0,
            "eval_perplexity": math.exp(8.3 - step / num_steps * 4.0),
            "eval_bits_per_byte": 2.5 - step / num_steps,
            "eval_next_token_accuracy": 0.1 + 0.2 * step / num_steps,
        }
        for step in (0, num_steps // 2, num_steps)
    ]


def sample_records(num_steps):
    return [
        {
            "step": step,
            "tokens_seen": step * TOKENS_PER_STEP,
            "prompt": f"Return {HOSTILE}",
            "text": f" at step {step} half a pair \ud83e {HOSTILE}",
            "words_in_corpus": 0.875,
        }
        for step in (num_steps // 2, num_steps)
    ]


def run_info(num_steps, findings):
    trajectory = {
        "name": "reference-a",
        "description": "a reference",
        "provenance": {"commit": "0123abc"},
        "points": [
            {
                "tokens": s * TOKENS_PER_STEP,
                "step": s,
                "loss": 3 + 5 / s**0.5,
                "low": 2.5 + 5 / s**0.5,
                "high": 4 + 5 / s,
            }
            for s in (1, 5, 25, 125)
        ],
        "red_flags": [{"before_step": 20, "loss_below": 3.5}],
    }
    return {
        "started": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:02:00+00:00",
        "config_path": "configs/demo.json",
        "arguments": {"learning_rate": 3e-4, "source": HOSTILE, "report_to": []},
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "is_dirty": False,
        "device": {"name": "Test CPU", "type": "cpu", "count": 1, "kernels": KERNELS},
        "resumed_from": None,
        "model": {"parameters": 3_146_112, "vocab_size": 4096, "block_size": 256, "flops_per_token": 20_185_088},
        "source": {"name": "docstrings", "documents": 7372, "bytes": 25_000_000, "content_hash": "feedface"},
        "trajectory": trajectory,
        "result": {
            "verdict": "healthy" if not findings else "2 findings",
            "exit_code": 0 if not findings else 3,
            "steps": num_steps,
            "tokens_seen": num_steps * TOKENS_PER_STEP,
            "train_seconds": 93.0,
            "unigram_entropy": 6.5825,
            "passes": 2,
            "tokens_by_source": {"docstrings": num_steps * TOKENS_PER_STEP, HOSTILE: 0},
            "guards": {
                "judged": ["loss_spike"],
                "cannot_judge": {"rank_divergence": "one process"},
                "disabled": ["grad_norm_off"],
            },
        },
    }


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def make_run(tmp_path):
    def make(num_steps=60, findings=(), name="demo-run"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(run_info(num_steps, findings)))
        write_lines(folder / "steps.jsonl", step_records(num_steps))
        write_lines(folder / "evals.jsonl", eval_records(num_steps))
        write_lines(folder / "findings.jsonl", findings)
        write_lines(folder / "samples.jsonl", sample_records(num_steps))
        return folder

    return make


def report_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def figure(page, key):
    """(label, value, note) as the page shows them."""
    return page.figures[key]


# Content.


def test_key_figures_are_recomputed_from_the_files(make_run):
    folder = make_run()
    page = report_of(folder)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    last = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
    result = json.loads((folder / "run.json").read_text())["result"]
    losses, speeds = [s["loss"] for s in steps[-20:]], sorted(s["tokens_per_second"] for s in steps)
    expected = {
        "train_loss": f"{math.fsum(losses) / 20:.3f}",
        "eval_loss": f"{last['eval_loss']:.3f}",
        "perplexity": f"{math.exp(last['eval_loss']):.2f}",
        "bits_per_byte": f"{last['eval_bits_per_byte']:.3f}",
        "accuracy": f"{100 * last['eval_next_token_accuracy']:.1f} %",
        "unigram_entropy": f"{result['unigram_entropy']:.3f}",
        "tokens_seen": f"{len(steps) * TOKENS_PER_STEP:,}",
        "minutes": f"{result['train_seconds'] / 60:.1f} min",
        "tokens_per_second": f"{(speeds[29] + speeds[30]) / 2:,.0f}",
        "parameters": "3,146,112",
    }
    assert {key: value[1] for key, value in page.figures.items()} == expected
    assert figure(page, "train_loss")[2] == "nats/token, mean of the last 20 steps"
    assert figure(page, "eval_loss")[2] == "nats/token, at step 60"
    assert figure(page, "minutes")[0] == "Training time"
    assert figure(page, "tokens_per_second")[2] == "median, on Test CPU"
    assert figure(page, "tokens_seen")[2] == "in 60 steps"
    assert figure(page, "parameters")[2] == "20,185,088 FLOPs per token"


def test_words_beside_the_charts_are_recomputed(make_run):
    folder = make_run()
    page = report_of(folder)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    highest = max(steps, key=lambda step: step["loss"])
    assert page.has(
        f"nats per token: last {steps[-1]['loss']:.4g}, highest {highest['loss']:.4g} at step {highest['step']}"
    )
    assert page.has(f"before clipping: last {steps[-1]['grad_norm']:.4g}, highest 10 at step 1")
    assert page.has("last 3e-4, highest 3e-4 at step 10")
    assert page.has("unigram entropy 6.58")
    assert page.has("red flag: loss below 3.5 before step 20")


def test_data_facts_are_those_of_run_json(make_run):
    page = report_of(make_run())
    assert page.facts == [
        ("Source", "docstrings"),
        ("Documents", "7,372"),
        ("Size", "25,000,000 bytes"),
        ("Content hash", "feedface"),
        ("Passes", "2"),
        ("Bad documents skipped", "–"),
        ("Tokens read", f"{60 * TOKENS_PER_STEP:,} of docstrings"),
        ("Tokens read", f"0 of {HOSTILE}"),
    ]


def test_kernels_are_said(make_run):
    assert report_of(make_run()).has(f"Kernels: {KERNELS}")


def test_a_resumed_run_says_that_its_time_is_of_the_last_session(make_run):
    folder = make_run()
    (folder / "run.json").write_text(json.dumps(run_info(60, ()) | {"resumed_from": "runs/demo/checkpoint-30"}))
    page = report_of(folder)
    assert figure(page, "minutes")[0] == "Training time, last session"
    assert page.has("runs/demo/checkpoint-30")


def test_healthy_run_reads_healthy(make_run):
    page = report_of(make_run())
    assert page.count("p", "verdict good") == 1 and page.has("Healthy")
    assert page.has("The run finished. 0 errors, 0 warnings, 0 notes.")
    assert page.has("FindingsNone.")
    assert not page.has("Missing in this report")


def test_findings_stand_most_severe_first_with_all_their_fields(make_run):
    page = report_of(make_run(findings=FINDINGS))
    text = "".join(page.text)
    assert page.count("p", "verdict error") == 1 and page.has("2 findings")
    assert page.has("A guard stopped the run (exit code 3). 1 error, 0 warnings, 1 note.")
    assert page.count("tr", "finding") == 2
    table = text[text.rindex("What to do") :]
    assert table.index("missing_label_shift") < table.index("accumulation_mismatch")
    for finding in FINDINGS:
        assert MEANINGS[finding["id"]] in table
        for words in (finding["found"], finding["expected"], finding["action"], *finding["likely_causes"]):
            assert words in table
        assert json.dumps(finding["evidence"]) in table
    assert f"{30 * TOKENS_PER_STEP:,} tokens" in table


def test_findings_are_marked_on_the_loss_chart(make_run):
    page = report_of(make_run(findings=[*FINDINGS, {**FINDINGS[0], "step": 45, "tokens_seen": 45 * TOKENS_PER_STEP}]))
    links = [attributes for tag, attributes in page.tags if tag == "a" and "marker" in attributes.get("class", "")]
    # One line for each, and one label for both of an id; each leads to the row of its finding.
    errors = [link["href"] for link in links if link["class"] == "marker error"]
    infos = [link["href"] for link in links if link["class"] == "marker info"]
    assert errors == ["#finding-1", "#finding-1"] and infos == ["#finding-2", "#finding-3", "#finding-2"]
    rows = [attributes["id"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes]
    assert rows == ["finding-1", "finding-2", "finding-3"]
    assert page.has("accumulation_mismatch x2")


def test_warnings_alone_are_amber(make_run):
    folder = make_run(findings=[{**FINDINGS[0], "severity": "warning"}])
    info = run_info(60, ())
    (folder / "run.json").write_text(json.dumps(info))
    assert report_of(folder).count("p", "verdict warning") == 1


@pytest.mark.parametrize(
    "verdict", ["not judged: x", "no fault found, but y", "interrupted by SIGINT, healthy so far"]
)
def test_only_a_healthy_run_is_green(make_run, verdict):
    folder, info = make_run(), run_info(60, ())
    info["result"]["verdict"] = verdict
    (folder / "run.json").write_text(json.dumps(info))
    assert report_of(folder).count("p", "verdict info") == 1


def test_guards_say_who_judged_and_why_others_did_not(make_run):
    page = report_of(make_run())
    assert page.has("Judged: loss_spike.")
    assert page.has("rank_divergence: one process")
    assert page.has("Disabled: grad_norm_off.")


def test_samples_come_latest_first(make_run):
    text = "".join(report_of(make_run()).text)
    assert text.index("at step 60 half a pair") < text.index("at step 30 half a pair")
    assert "88 % of its words are in the corpus" in text


def test_eval_points_band_and_entropy_are_drawn(make_run):
    page = report_of(make_run())
    assert page.count("circle", "eval") == 3
    assert page.count("path", "band") == page.count("path", "unigram") == page.count("path", "flag") == 1


def test_environment_and_arguments_are_all_there(make_run):
    text = "".join(report_of(make_run()).text)
    for section in ("arguments", "versions", "device", "source"):
        for key, value in run_info(60, ())[section].items():
            assert key in text
            assert json.dumps(value, ensure_ascii=False) in text
    assert "0123abc" in text


# Safety.


def test_nothing_from_the_run_becomes_markup(make_run):
    folder = make_run(findings=FINDINGS, name="a<b>&c")
    page = report_of(folder)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "curves"}, {"type": "module"}]
    assert "alert" not in "".join(page.scripts)  # the curves are numbers, without words of the run
    assert page.has(HOSTILE)
    assert page.has("a<b>&c")


def test_the_page_loads_nothing(make_run):
    html = write_report(make_run(findings=FINDINGS)).read_text(encoding="utf-8")
    attributes = [pair for _, attributes in Page(html).tags for pair in attributes.items()]
    assert not {"src", "srcset", "onload"} & {name for name, _ in attributes}
    assert all(value.startswith("#") or value == "data:," for name, value in attributes if name == "href")
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_the_page_has_no_path_of_this_machine(make_run):
    folder = make_run(findings=[{**FINDINGS[1], "found": "3 / 4 rows (/data/web/a.txt), tokens/s"}])
    info = run_info(60, ()) | {"config_path": "/home/me/my configs/c.json", "resumed_from": "runs/x/checkpoint-3"}
    info["arguments"] |= {"source": "/data/web/*.parquet", "output_dir": "~/runs/x", "url": "hf://a/b"}
    info["arguments"] |= {"folder": "/data/", "file": "file:///home/me/a.txt"}
    (folder / "run.json").write_text(json.dumps(info))
    html = write_report(folder).read_text(encoding="utf-8")
    assert not re.search(r"/(home|data)|~/|file:", html)
    page = Page(html)
    kept = ("3 / 4 rows (a.txt), tokens/s", '"hf://a/b"', '"*.parquet"', "runs/x/checkpoint-3", "my configs/c.json")
    assert [words for words in kept if not page.has(words)] == []


# Runs that did not end well.


@pytest.mark.parametrize("missing", RUN_FILES)
@pytest.mark.parametrize("content", [None, "", '{"step": 6', "\x00\xff[]\n"])
def test_a_report_without_one_of_the_files(make_run, missing, content):
    folder = make_run(findings=FINDINGS)
    (folder / missing).unlink()
    if content is not None:
        (folder / missing).write_bytes(content.encode("latin-1"))
    page = report_of(folder)
    is_known_empty = missing == "findings.jsonl" and content == ""
    assert page.has("Missing in this report: " + missing) != is_known_empty


def test_someone_elses_trainer_misses_no_samples_and_no_evaluation(make_run):
    folder = make_run(findings=FINDINGS)
    info = json.loads((folder / "run.json").read_text())
    del info["source"], info["model"]["flops_per_token"]
    (folder / "run.json").write_text(json.dumps(info))
    for name in ("evals.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    page = report_of(folder)
    assert not page.has("Missing in this report") and not page.has("FLOPs per token") and not page.has("Content hash")


def test_only_steps_with_a_half_written_last_line(tmp_path):
    write_lines(tmp_path / "steps.jsonl", step_records(40))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens_s')
    page = report_of(tmp_path)
    assert page.count("p", "verdict error") == 1 and page.has("Unfinished")
    assert page.has("Last recorded: step 40.")
    assert page.has("steps.jsonl: 1 of 41 records cannot be read")
    assert figure(page, "tokens_seen")[1] == f"{40 * TOKENS_PER_STEP:,}"
    assert figure(page, "eval_loss")[1] == "–"
    assert page.has("None recorded: findings.jsonl is missing.")


def test_a_run_that_died_before_its_first_step(make_run):
    folder = make_run()
    for name in ("steps.jsonl", "evals.jsonl", "samples.jsonl", "findings.jsonl"):
        (folder / name).unlink()
    info = run_info(60, ())
    del info["result"]
    (folder / "run.json").write_text(json.dumps(info | {"finished": None, "trajectory": None}))
    page = report_of(folder)
    assert page.has("Last recorded: before its first step.")
    assert page.has("nothing to draw")


def test_a_finding_that_is_damaged_is_shown_as_far_as_it_goes(make_run):
    folder = make_run()
    write_lines(folder / "findings.jsonl", [{**FINDINGS[1], "likely_causes": 1}])
    assert report_of(folder).has("missing_label_shift")


@pytest.mark.parametrize("not_finite", ["null", "NaN", "Infinity"])
def test_loss_that_is_not_finite_is_said_and_not_averaged_away(make_run, not_finite):
    folder = make_run()
    lines = (folder / "steps.jsonl").read_text().splitlines()
    lines[54:] = [re.sub(r'"loss": [^,]+', f'"loss": {not_finite}', line) for line in lines[54:]]
    (folder / "steps.jsonl").write_text("\n".join(lines))
    page = report_of(folder)
    assert page.has("not finite in 6 steps, the first of them step 55")
    assert figure(page, "train_loss")[1] == "nan"
    assert "nan" not in "".join(str(attributes.get("d")) for _, attributes in page.tags)


def test_grad_norm_may_be_null_throughout(make_run):
    folder = make_run()
    write_lines(folder / "steps.jsonl", [{**record, "grad_norm": None} for record in step_records(60)])
    assert report_of(folder).has("before clipping: never recorded")


def test_infinite_perplexity_is_shown(make_run):
    folder = make_run()
    records = eval_records(60)
    records[-1] |= {"eval_loss": 800.0, "eval_perplexity": math.inf}
    write_lines(folder / "evals.jsonl", records)
    assert figure(report_of(folder), "perplexity")[1] == "inf"


def test_the_perplexity_of_a_broken_model_fits_its_card(make_run):
    folder = make_run()
    write_lines(folder / "evals.jsonl", [eval_records(60)[-1] | {"eval_perplexity": 16_849_177.87}])
    assert figure(report_of(folder), "perplexity")[1] == "1.68e+07"


def test_one_step_is_enough(make_run):
    page = report_of(make_run(num_steps=1))
    assert figure(page, "train_loss")[2] == "nats/token, mean of the last 1 step"


@pytest.mark.parametrize("broken", ['{"step": 2, "tok', '["no object"]', "\x00\xff"])
def test_a_broken_line_costs_only_itself(make_run, broken):
    folder = make_run()
    records = step_records(60)
    lines = [json.dumps(record).encode() for record in records]
    lines[1] = broken.encode("latin-1")
    (folder / "steps.jsonl").write_bytes(b"\n".join(lines))
    assert read_lines(folder / "steps.jsonl") == [records[0], *records[2:]]
    assert report_of(folder).has("steps.jsonl: 1 of 60 records cannot be read")


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_run_is_the_users_mistake(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        write_report(tmp_path / name)


# Size.


def test_a_long_run_makes_a_small_page_that_still_shows_its_spikes(tmp_path):
    records = step_records(20_000)
    records[12_345]["grad_norm"] = 7.75
    write_lines(tmp_path / "steps.jsonl", records)
    write_lines(tmp_path / "findings.jsonl", [{**FINDINGS[0], "step": 15_000}])
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    data, _ = page.scripts
    assert len(html) < 1_000_000 and len(html) - len(data) < 250_000
    held = json.loads(data)
    steps = held["runs"]["0"]["steps"]
    assert len(steps) == len(held["runs"]["0"]["tokens"]) <= 10_000 and held["num_steps"] == 20_000
    assert held["charts"][1]["lines"][0]["y"][steps.index(12_346)] == 7.75
    assert set(range(14_951, 15_050)) <= set(steps)  # all that is near the finding
    assert page.has(f"Of 20,000 steps the page holds {len(steps):,}")
    curves = [attributes["d"] for tag, attributes in page.tags if attributes.get("class") in ("raw", "line")]
    assert len(curves) == 8
    assert all(len(re.findall("[ML]", curve)) <= 1500 for curve in curves)


@pytest.mark.parametrize("is_log", [False, True])
def test_decimation_keeps_the_extremes_of_every_stretch(is_log):
    rng = np.random.default_rng(3)
    index = np.arange(1.0, 50_001)
    x = np.log(index) if is_log else index
    y = rng.normal(size=50_000)
    y[[7, 31_000, 49_999]] = [50, -60, 70]
    kept_x, kept_y = decimate(x, y, 1500)
    assert len(kept_x) <= 1500 and (np.diff(kept_x) > 0).all()
    assert {50, -60, 70} <= set(kept_y)
    edges = np.linspace(x[0], x[-1], 751)[1:-1]
    whole, part = np.searchsorted(edges, x, "right"), np.searchsorted(edges, kept_x, "right")
    assert set(whole) == set(part)
    for bucket in np.unique(whole)[::37]:
        assert y[whole == bucket].max() == kept_y[part == bucket].max()
        assert y[whole == bucket].min() == kept_y[part == bucket].min()


def test_the_rows_of_a_long_run_hold_every_spike_and_the_first_steps():
    n, rng = 400_000, np.random.default_rng(5)
    columns = [rng.normal(size=n), np.full(n, np.nan), np.arange(n, dtype=float)]
    columns[0][[5, 123_456, 399_998]] = [9, 90, -80]
    rows = choose_rows(columns, 6000)
    assert len(rows) <= 6000 and (np.diff(rows) > 0).all()
    assert {0, 5, 123_456, 399_998, 399_999} <= set(rows)
    assert set(range(20)) <= set(rows)  # half of a log axis would be empty
    assert (choose_rows([columns[0][:500]], 6000) == np.arange(500)).all()


def test_a_smooth_line_is_thinned_for_both_axes():
    x = np.arange(1.0, 100_001)
    kept = thin(x, x, 1000)[0]
    assert len(kept) <= 1000 and {1, 2, 3, 10, 100_000} <= set(kept) and np.diff(kept).max() < 250


def test_decimation_leaves_short_lines_alone_and_keeps_gaps():
    x, y = np.arange(9.0), np.full(9, np.nan)
    assert decimate(x, y, 10)[1] is y
    long = np.ones(5000)
    long[2000:3000] = np.nan
    assert np.isnan(decimate(np.arange(5000.0), long, 100)[1]).any()


# Parts of the chart.


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1500, "1.5k"), (24_576_000, "24.58M"), (2e9, "2B"), (0.0003, "3e-4"), (0.05, "0.05"), (2.5, "2.5")],
)
def test_compact_numbers(value, text):
    assert compact(value) == text


def test_ticks_are_round():
    assert linear_ticks(2.7, 8.4, 6) == [3, 4, 5, 6, 7, 8]
    assert linear_ticks(-0.4, 9, 4) == [0, 5]
    assert log_ticks(8192, 1_000_000) == [10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000]
    assert log_ticks(1e3, 1e8) == [1e3, 1e4, 1e5, 1e6, 1e7, 1e8]


def test_smoothing_skips_gaps_and_keeps_a_constant():
    y = np.full(1000, 4.0)
    y[300:302] = np.nan
    for is_log in (False, True):
        assert np.allclose(smooth(y, is_log), 4.0)
    line = np.arange(1000.0)
    assert np.allclose(smooth(line, is_log=False)[10:-10], line[10:-10])
    assert np.isnan(smooth(np.full(50, np.nan), is_log=True)).all()


def test_a_path_breaks_at_a_gap_and_shows_a_lone_point():
    assert path(np.array([0.0, 1, 2, 3]), np.array([5.0, 6, np.nan, 7])) == "M0.0 5.0h0L1.0 6.0M3.0 7.0h0"


def test_a_rare_spike_leaves_the_chart_but_not_a_jump():
    usual = np.linspace(1, 2, 1000)
    spiked = np.concatenate([usual, [500.0]])
    assert build_y_axis(spiked, 0, 1, from_zero=True).high < 5
    assert build_y_axis(np.concatenate([usual, usual + 9]), 0, 1, from_zero=True).high > 11


def test_labels_of_near_markers_do_not_overlap():
    chart = Chart("t", 1000, 300, tokens=np.linspace(0, 100, 11))
    chart.markers = [("info", at, "a_long_finding_id", "", "") for at in (10.0, 11, 12, 60, 99)]
    markers = chart.placed_markers()
    assert [(marker["top"] - LABEL_TOP) / LABEL_ROW for marker in markers] == [0, 1, 2, 0, 0]
    assert all(marker["start"] >= 0 and marker["end"] <= 1000 for marker in markers)


# The model card.


def test_model_card_has_front_matter_and_the_figures_of_the_run(make_run):
    folder = make_run(findings=FINDINGS)
    card = write_model_card(folder, folder / "final").read_text(encoding="utf-8")
    front = card.split("---\n")[1]
    assert "library_name: transformers\n" in front and "pipeline_tag: text-generation\n" in front
    assert "\n# demo-run\n" in card
    last = eval_records(60)[-1]
    for words in (
        "3,146,112 parameters",
        f"{60 * TOKENS_PER_STEP:,} tokens of `docstrings`",
        "7,372 documents, 25,000,000 bytes",
        f"Ran on 1 x Test CPU: {KERNELS}.",
        f"| Eval loss | {last['eval_loss']:.3f} | nats/token, at step 60 |",
        f"| Bits per byte | {last['eval_bits_per_byte']:.3f} | at step 60 |",
        "**2 findings**",
        "- error: `missing_label_shift` at step 0",
        "trained from scratch",
        "## Limits",
    ):
        assert words in card
    assert json.loads(card.split("```json\n")[1].split("\n```")[0]) == run_info(60, ())["arguments"]


def test_model_card_escapes_what_is_not_code(make_run):
    folder = make_run(name="a<b>&c")
    info = run_info(60, ())
    info["device"]["name"] = "<i>|"
    info["source"]["name"] = "a`<b>"
    (folder / "run.json").write_text(json.dumps(info))
    card = write_model_card(folder, folder / "final").read_text(encoding="utf-8")
    assert "\n# a&lt;b&gt;&amp;c\n" in card
    assert "| median, on &lt;i&gt;/ |" in card
    assert "of `a'<b>`:" in card


def test_model_card_names_the_model_it_went_on_from(make_run):
    folder = make_run()
    info = run_info(60, ())
    info["arguments"]["model_name_or_path"] = "some/base"
    (folder / "run.json").write_text(json.dumps(info))
    assert "trained on from `some/base`" in write_model_card(folder, folder / "final").read_text(encoding="utf-8")
