"""The page of `compare` in a headless Chromium: the report's own script and styles on several runs."""

import json

import pytest

from recipe.compare import compare_runs, write_page
from tests import test_report as plain
from tests.browser import EXECUTABLE, MISSING, headless
from tests.test_report import write_lines
from tests.test_report_page import CURVE, OVERFLOWING, choose, point, texts, tip

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=MISSING)
STEPS = 60


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """ "half" has half of the batch of "whole", so its steps are at other tokens; markup in a verdict."""
    folder = tmp_path_factory.mktemp("compare")
    for name, factor in (("whole", 1), ("half", 2)):
        (folder / name).mkdir()
        info = plain.run_info(STEPS, plain.FINDINGS)
        info["result"]["verdict"] = "suspicious: repeated_data" if factor == 1 else plain.HOSTILE
        (folder / name / "run.json").write_text(json.dumps(info))
        records = [record | {"loss": record["loss"] / factor} for record in plain.step_records(STEPS)]
        if factor == 2:
            records = [record | {"tokens_seen": record["tokens_seen"] // 2} for record in records]
        write_lines(folder / name / "steps.jsonl", records)
    return write_page(compare_runs([folder / "whole", folder / "half"]), folder / "compare.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with headless(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_values_zoom_and_axes_are_those_of_the_report(browser, file):
    page = browser.open(file.as_uri())
    page.mouse("Moved", *point(page, 0.5))
    title, whole, half = tip(page)
    tokens = int(title.split(", ", 1)[1].removesuffix(" tokens").replace(",", ""))
    step = tokens // plain.TOKENS_PER_STEP
    assert title.startswith(f"step {step}, ") and whole.startswith("whole ") and "(smoothed " in whole
    assert half.startswith(f"half, step {2 * step}, {tokens:,} tokens ")  # it has seen as many, in twice the steps
    drawn = page.run(CURVE.replace("path.raw", "path.raw.run1"))
    choose(page, "unit", "steps")
    assert page.run(CURVE.replace("path.raw", "path.raw.run1")) != drawn  # by steps it is as long as the other
    page.mouse("Moved", *point(page, 0.5))
    assert len(tip(page)) == 3 and f"half, step {step}" not in tip(page)[0]
    page.click("[data-do=in]")
    zoomed = page.run(CURVE)
    page.click("[data-do=all]")
    assert page.run(CURVE) != zoomed and texts(page, "label:has(:checked)")[0] == "steps"
    assert page.problems() == [] and set(page.requests()) == {file.as_uri()}
    page.close()


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_over_its_box_and_words_are_whole(browser, file, width):
    page = browser.open(file.as_uri(), width, is_dark=width == 768)
    assert page.run("document.documentElement.scrollWidth") <= width and page.run(OVERFLOWING) == []
    ends = "['.to-end', '.to-end > .chart'].map((each) => document.querySelector(each).getBoundingClientRect().right)"
    assert abs(page.run(f"(([frame, chart]) => chart - frame)({ends})")) < 1  # scrolled to its end
    layout = page.run("getComputedStyle(document.querySelector('.runs td')).display")
    assert layout == ("block" if width == 360 else "table-cell")
    lines = "(({ height }) => height)(document.querySelector('.runs td').getClientRects()[0])"
    assert page.run(lines) < 70  # two lines: the verdict is broken between its words
    assert page.problems() == []
    page.close()
