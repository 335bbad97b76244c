"""The zoo: a sample of it runs here, with `-m slow` a tenth, and finds what RESULTS.md says; the scoring, on records
written by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from recipe.guards import FINDING_IDS
from tests.zoo import __main__ as command
from tests.zoo.bug import AREAS
from tests.zoo.cases import PARTS, SAMPLE, bugs_of, healthy_of, sample, tenth
from tests.zoo.pool import Task
from tests.zoo.remains import NO_EFFECT, WHY_MISSED
from tests.zoo.results import MEASURES, TARGETS, format_results
from tests.zoo.score import (
    OURS,
    at_least,
    bounds,
    judged_shares,
    over_seeds,
    score_bug,
    score_healthy,
    share_of,
    summarize,
    summarize_all,
)
from tests.zoo.setting import Setting

FOLDER = Path(command.__file__).parent
RESULTS = json.loads((FOLDER / "results.json").read_text())
BUGS = [bug for part in PARTS for bug in bugs_of(part)]
HEALTHY = {name: setting for part in PARTS for name, setting in healthy_of(part).items()}


# --- what there is


def test_there_are_as_many_as_promised():
    assert len(BUGS) >= 70 and len({bug.mechanism for bug in BUGS}) >= 45
    assert len(HEALTHY) >= 80 and len({setting.key for setting in HEALTHY.values()}) == len(HEALTHY)
    assert set(AREAS) == {bug.area for bug in BUGS}


def test_names_are_unique_and_bugs_are_described():
    names = Counter([*HEALTHY, *(bug.name for bug in BUGS)])
    assert [name for name, count in names.items() if count > 1] == []
    for bug in BUGS:
        assert bug.what.endswith(".") and bug.source and set(bug.names) <= set(FINDING_IDS), bug.name
        assert 0 <= bug.onset <= bug.setting.steps, bug.name  # one may come after the last step


def test_nothing_in_the_recipe_knows_of_the_zoo():
    sources = (FOLDER.parents[1] / "recipe").rglob("*.py")
    assert [path.name for path in sources if "tests.zoo" in path.read_text(encoding="utf-8")] == []


# --- a part of it


def assert_as_recorded(parts: dict) -> None:
    """Each bug's first finding is the recorded one, if any; its twin and the healthy runs are silent."""
    found = command.run_zoo(parts, only_guards=True)
    assert found["problems"] == []
    recorded = {row["name"]: row["first"] for part in PARTS for row in RESULTS["parts"][part]["bugs"]}
    rows = [row for part in PARTS for row in found["parts"][part]["bugs"]]
    assert {row["name"]: row["first"] for row in rows} == {row["name"]: recorded[row["name"]] for row in rows}
    healthy = [row for part in PARTS for row in found["parts"][part]["healthy"]]
    assert healthy and {row["name"]: row["alarms"] for row in healthy if row["alarms"]} == {}


def test_the_sample_holds_every_kind_of_run():
    settings = [bug.setting for bugs, _ in sample().values() for bug in bugs]
    settings += [setting for _, healthy in sample().values() for setting in healthy.values()]
    assert len(settings) == len(SAMPLE)
    assert {setting.kind for setting in settings} == {setting.kind for setting in HEALTHY.values()}
    for name in ("ranks", "accumulation", "save_at"):
        assert any(getattr(each, name) > getattr(Setting(), name) for each in settings), name
    assert {bug.area for bugs, _ in tenth().values() for bug in bugs} == set(AREAS)


def test_the_sample_is_as_recorded():
    assert_as_recorded(sample())


@pytest.mark.slow
def test_a_tenth_is_as_recorded():
    assert_as_recorded(tenth())


def test_the_recorded_results_are_those_of_all_bugs_and_runs():
    for part in PARTS:
        recorded = RESULTS["parts"][part]
        assert [row["name"] for row in recorded["bugs"]] == [bug.name for bug in bugs_of(part)]
        assert {*healthy_of(part)} <= {row["name"] for row in recorded["healthy"]}
    assert RESULTS["problems"] == []
    assert format_results(RESULTS) == (FOLDER / "RESULTS.md").read_text()


def test_what_was_not_caught_has_a_reason_and_nothing_else_has_one():
    missed = {row["name"] for part in PARTS for row in RESULTS["parts"][part]["bugs"] if not row["is_caught"]}
    assert missed == WHY_MISSED.keys()
    assert all(why.endswith(".") and len(why) <= 140 for why in WHY_MISSED.values())


def test_only_listed_bugs_change_nothing():
    rows = {row["name"]: row for part in PARTS for row in RESULTS["parts"][part]["bugs"]}
    same = {name for name, row in rows.items() if row["is_same_as_twin"] and not row["is_caught"]}
    assert same == NO_EFFECT.keys() and all(why.endswith(".") for why in NO_EFFECT.values())


def test_results_are_short_and_the_summary_comes_first():
    text = (FOLDER / "RESULTS.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles[1] == "## All parts together" and "what is wrong" not in text
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 200
    for part in PARTS:
        table = text.split(f"## Bugs of `{part}`")[1].split("### Not caught")[0]
        assert all(f"| {row['name']} |" in table for row in RESULTS["parts"][part]["bugs"])


def test_crashes_of_other_tools_are_shown():
    crash = {"run": "healthy", "tool": "losslint", "error": "RuntimeError: cannot lint"}
    assert "Crashes of other tools: losslint 1." in format_results({**RESULTS, "crashes": [crash]})
    assert "Crashes" not in format_results({**RESULTS, "crashes": []})


def test_readme_says_what_was_recorded():
    readme = " ".join((FOLDER.parents[1] / "README.md").read_text(encoding="utf-8").split())
    ours = summarize_all(RESULTS["parts"].values(), {})[OURS]
    first = json.loads((FOLDER / [*PARTS][-1] / "first_score.json").read_text())["bugs"]
    caught = sum(bug["is_caught"] for bug in first.values())
    assert f"of {ours['recall']['of']} silent bugs" in readme and f"{ours['recall']['hits']} are caught" in readme
    assert f"{ours['named_first']['hits']} of these under the right name first" in readme
    assert ours["false_alarms"]["hits"] == 0 and f"on {ours['false_alarms']['of']} healthy runs" in readme
    assert (
        f"Of the {len(first)} bugs among them whose authors had not seen the guards, {caught} at their first" in readme
    )


def test_the_docs_say_what_was_recorded_of_the_targets():
    docs = " ".join((FOLDER.parents[1] / "docs" / "zoo.md").read_text(encoding="utf-8").split())
    ours = summarize_all(RESULTS["parts"].values(), {})[OURS]
    asked = {"before_step_1": "50 %", "soon": "95 %", "named_first": "95 %"}
    for name, target in asked.items():
        assert f"({100 * ours[name]['share']:.1f} %, {target} asked for)" in docs and TARGETS[name] == target
    later = [
        row for part in PARTS for row in RESULTS["parts"][part]["bugs"] if row["is_caught"] and row["latency"] > 0
    ]
    areas = ("data", "ranks", "optimizer and schedule", "checkpoint and resume")
    of_these = sum(row["area"] in areas for row in later)
    assert f"Of the {len(later)} bugs caught later {of_these} are in" in docs
    assert all(f"`{row['name']}`" in docs for row in later if row["latency"] > 30)
    assert RESULTS["environment"]["commit"] in docs


def test_add_runs_what_is_missing_and_what_is_named(monkeypatch):
    """Whatever is run again replaces what was recorded of it."""
    bug = bugs_of("development")[0]
    runs = {name: Setting(seed=seed) for seed, name in enumerate(("kept", "again", "new"))}
    asked = {}

    def run_zoo(parts, processes):
        asked.update(parts["development"][1])
        rows = [{**healthy_row(name), "setting": setting.describe()} for name, setting in asked.items()]
        return {**RESULTS, "parts": {"development": {"bugs": [], "healthy": rows}}, "problems": []}

    def healthy_row(name, alarms=()):
        return {"name": name, "setting": runs[name].describe(), "alarms": list(alarms), "others": {}}

    monkeypatch.setattr(command, "run_zoo", run_zoo)
    old = [healthy_row("kept"), healthy_row("again", [("loss_spike", 1, "x")])]
    known = next(row for row in RESULTS["parts"]["development"]["bugs"] if row["name"] == bug.name)
    recorded = {**RESULTS, "parts": {"development": {"bugs": [known], "healthy": old}}}
    merged = command.add_missing(recorded, {"development": ([bug], runs)}, {"again"}, None)
    assert [*asked] == ["again", "new"]
    part = merged["parts"]["development"]
    assert [(row["name"], row["alarms"]) for row in part["healthy"]] == [("kept", []), ("again", []), ("new", [])]
    assert part["bugs"] == [known] and part["summary"]["guards"]["false_alarms"]["of"] == 3
    assert merged["added"][-1]["names"] == ["again", "new"]


# --- scoring


def finding(id="repeated_data", step=12, severity="warning"):
    return {"id": id, "step": step, "severity": severity, "tokens_seen": step * 10, "found": "something"}


def record(*findings, losses=(3.0, 2.0, 1.0), learned=2.0, evals=(), effects=1, **others):
    return {
        "findings": list(findings),
        "losses": list(losses),
        "learned_loss": learned,
        "eval_losses": list(evals),
        "effects": effects,
        "others": {"watchdog": [], **others},
        "steps": 3,
        "tokens": 30,
        "judged_steps": {"loss_spike": 2},
        "cannot_judge": {"row_leak": "one row"},
        "not_applicable": {"rank_divergence": "one rank"},
    }


def test_a_bug_is_caught_from_its_onset_on():
    early, late = finding(step=4), finding("loss_spike", step=12)
    row = score_bug(("loss_spike",), 10, record(early, late), record())
    assert (row["first"], row["latency"], row["is_named"], row["early"]) == ("loss_spike", 2, True, ["repeated_data"])
    assert not score_bug(("repeated_data",), 10, record(early), record())["is_caught"]


def test_what_is_only_information_is_no_catch():
    row = score_bug(("init_loss_off",), 0, record(finding("init_loss_off", 0, "info")), record())
    assert not row["is_caught"] and row["hints"] == ["init_loss_off"]


def test_what_the_twin_says_too_is_no_catch_of_any_tool():
    spike = [{"step": 5, "what": "spike"}]
    both = record(finding(), watchdog=spike), record(finding(), watchdog=spike)
    row = score_bug(("repeated_data",), 0, *both)
    assert not row["is_caught"] and row["others"] == {"watchdog": None}
    assert score_bug((), 0, both[0], record())["others"] == {"watchdog": 5}


def test_another_name_is_a_catch_that_is_not_named():
    row = score_bug(("repeated_data",), 0, record(finding("loss_spike", 1), finding()), record())
    assert row["is_caught"] and not row["is_named"] and row["all"] == ["loss_spike", "repeated_data"]
    assert row["loss_when_caught"] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("learned", "matters"), [(2.019, False), (2.021, True), (1.979, True), (None, True), (float("inf"), True)]
)
def test_what_matters_changes_what_is_learned_by_more_than_two_hundredths(learned, matters):
    assert score_bug((), 0, record(learned=learned), record())["matters"] is matters


def test_a_run_that_is_its_twin_to_the_last_digit():
    assert score_bug((), 0, record(), record())["is_same_as_twin"]
    assert not score_bug((), 0, record(evals=[2.0]), record(evals=[1.0]))["is_same_as_twin"]
    assert score_bug((), 0, record(evals=[2.0]), record(evals=[1.0]))["reported"] == 1


def test_weights_that_fit_no_healthy_model_may_be_the_same_too():
    assert score_bug((), 0, record(learned=None), record(learned=None))["is_same_as_twin"]
    assert not score_bug((), 0, record(learned=None), record())["is_same_as_twin"]


def test_a_bug_that_changes_nothing_is_a_problem_unless_it_is_caught_or_listed():
    def problems(bug, *found, effects=1, losses=(3.0,)):
        records = {Task(bug.setting, bug).key: record(*found, effects=effects, losses=losses)}
        return command.score_bugs([bug], {**records, Task(bug.setting).key: record(losses=(3.0,))})[1]

    listed, other = (next(bug for bug in BUGS if (bug.name in NO_EFFECT) == is_listed) for is_listed in (True, False))
    assert "its code ran and changed nothing" in problems(other)[0]
    assert problems(listed, effects=0) == [f"{listed.name}: its code never ran"]
    assert problems(other, losses=(2.0,)) == problems(other, finding()) == problems(listed) == []


def test_a_tool_that_was_not_there_has_no_share():
    about = {"names": (), "onset": 0}
    rows = [score_bug((), 0, record(), record()) | about, score_bug((), 0, record(new=[]), record(new=[])) | about]
    shares = summarize(rows, [score_healthy(record())], ["watchdog", "new"])
    assert (shares["watchdog"]["recall"]["of"], shares["new"]["recall"]["of"]) == (2, 1)
    assert shares["new"]["false_alarms"]["of"] == 0


def test_what_was_missed_is_measured_over_seeds():
    found = over_seeds([0.05, -0.03, 0.04, -0.02])
    assert found["learned"] == pytest.approx(0.01) and not found["matters"] and found["seeds"] == 4
    assert found["learned_error"] == pytest.approx(0.0204, abs=1e-4)
    assert over_seeds([None]) == {} and over_seeds([0.5])["matters"]


def test_healthy_runs_count_warnings_and_errors():
    assert score_healthy(record(finding(severity="info")))["alarms"] == []
    assert [alarm[0] for alarm in score_healthy(record(finding()))["alarms"]] == ["repeated_data"]


def test_bounds_are_exact():
    assert bounds(0, 80) == pytest.approx((0, 1 - 0.05 ** (1 / 80)), abs=1e-9)
    assert bounds(80, 80) == pytest.approx((0.05 ** (1 / 80), 1), abs=1e-9)
    low, high = bounds(38, 40)
    assert at_least(38, 40, low) == pytest.approx(0.05) and 1 - at_least(39, 40, high) == pytest.approx(0.05)
    assert share_of([])["share"] is None


def test_the_summary_counts():
    names, about = ("repeated_data",), {"onset": 0}
    rows = [score_bug(names, 0, record(finding(step=step)), record()) | {"names": names, **about} for step in (0, 31)]
    rows.append(score_bug((), 0, record(learned=9.0), record()) | {"names": (), **about})
    ours = summarize(rows, [score_healthy(record())], ["watchdog"])["guards"]
    hits = {name: (share["hits"], share["of"]) for name, share in ours.items()}
    assert hits == {
        "recall": (2, 3),
        "recall_matters": (0, 1),
        "recall_with_id": (2, 2),
        "named_first": (2, 2),
        "before_step_1": (1, 2),
        "soon": (1, 2),
        "false_alarms": (0, 1),
    }


def test_all_parts_together_count_a_shared_twin_once():
    about = {"names": ("repeated_data",), "onset": 0}
    caught = score_bug(about["names"], 0, record(finding(step=0)), record()) | about
    twin, other = ({"setting": name, **score_healthy(record())} for name in ("the default", "padded"))
    parts = [{"bugs": [caught], "healthy": [twin]}, {"bugs": [caught], "healthy": [twin, other]}]
    ours = summarize_all(parts, ["watchdog"])["guards"]
    assert [ours[name]["of"] for name in ("recall", "named_first", "false_alarms")] == [2, 2, 2]
    assert TARGETS.keys() < MEASURES.keys() == ours.keys()


def test_judged_shares_leave_out_what_is_not_there():
    shares = judged_shares([record(), record()], ["loss_spike", "row_leak", "rank_divergence"])
    assert (shares["loss_spike"]["runs"], shares["loss_spike"]["steps"]) == (1, pytest.approx(2 / 3))
    assert shares["row_leak"]["runs"] == 0 and shares["row_leak"]["reasons"] == {"one row": 2}
    assert shares["rank_divergence"]["meant"] == 0


def test_an_unknown_name_is_one_clear_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["zoo", "--only", "original_no_shft"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and "did you mean 'original_no_shift'" in capsys.readouterr().err
