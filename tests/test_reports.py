"""Public reports as programs: one of them runs here and is judged as the page says, and two with `-m slow`."""

from dataclasses import replace

import pytest

from recipe.guards import FINDING_IDS
from tests.reports.__main__ import PAGE, PARTS, run_reports
from tests.reports.report import Report

REPORTS = [report for reports in PARTS.values() for report in reports]
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
ROWS = {line.split("`")[1]: line for line in TEXT.splitlines() if line.startswith("| `")}
# A fault that is caught, one that is missed and a healthy training; steps until the last is at a negative rate.
SAMPLE = {"eos_masked_as_padding": 12, "prompts_scored": 12, "batch_is_a_list": 24}


def test_the_page_has_a_row_of_each_report():
    assert list(ROWS) == [report.name for report in REPORTS]
    for report in REPORTS:
        row = ROWS[report.name]
        threads = [each.split("#")[0] + "/issues/" + each.split("#")[1] for each in report.threads if "#" in each]
        assert all(each in row for each in threads) and all(what in row for what in report.what), report.name
        if "**right**" not in row:
            assert report.missed and f"- `{report.name}`: {report.missed}" in TEXT, report.name


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_a_report_is_described(report):
    assert report.threads and report.says.endswith(".") and all(what.endswith(".") for what in report.what)
    assert set(report.names) <= set(FINDING_IDS) and report.run is not report.beside


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(SAMPLE)]
)
def test_a_report_is_judged_as_the_page_says(name):
    results = run_reports({"sample": [short(report, SAMPLE[name]) for report in REPORTS if report.name == name]})
    assert not results["problems"] and len(results["sample"]) == 1
    for row in results["sample"]:
        assert ROWS[name].endswith(f"| **{row['judgement']}** |"), row


def short(report: Report, steps: int) -> Report:
    return replace(report, setting=report.setting.changed(steps=steps))


def test_alarms_decide():
    report = next(report for report in REPORTS if report.name == "eos_masked_as_padding")
    right, other = ({"findings": [{"id": name, "severity": "error"}]} for name in ("eos_never_target", "loss_spike"))
    silent, hint = {"findings": []}, {"findings": [{"id": "eos_never_target", "severity": "info"}]}
    pairs = [(right, silent), (other, hint), (hint, silent), (right, other)]
    assert [report.judge(*pair) for pair in pairs] == ["right", "named otherwise", "missed", "false alarm"]
    assert replace(report, healthy=True).judge(silent, right) == "right"
