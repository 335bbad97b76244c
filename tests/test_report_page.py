"""The report in a headless Chromium: what its script adds, three widths, light and dark; skipped without one."""

import json
import re

import numpy as np
import pytest

from recipe.report import write_report
from tests import test_report as plain
from tests.browser import EXECUTABLE, MISSING, headless
from tests.test_report import FINDINGS, HOSTILE, TOKENS_PER_STEP, write_lines

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=MISSING)
STEPS = 1200
SPIKE = {**FINDINGS[0], "id": "loss_spike", "severity": "warning", "step": 700, "tokens_seen": 700 * TOKENS_PER_STEP}
AGAIN = {**SPIKE, "step": 710, "tokens_seen": 710 * TOKENS_PER_STEP}


def step_records():
    records = plain.step_records(STEPS)
    for record in records:
        record["floor"] = 7.0 - 0.5 * record["step"] ** 0.2 if record["step"] <= STEPS // 2 else None
    records[699] |= {"loss": 7.5, "grad_norm": 500.0}
    records[958]["loss"] = None
    return records


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The report of a run with a spike, a step that is not finite, and markup in all that it can hold."""
    folder = tmp_path_factory.mktemp("page") / "a<b>&c"
    folder.mkdir()
    findings = [*FINDINGS, SPIKE, AGAIN]
    info = plain.run_info(STEPS, findings)
    info["trajectory"]["name"] = info["result"]["verdict"] = HOSTILE
    info["arguments"]["long"], info["model"]["parameters"] = "w" * 300, 70_553_706_496
    (folder / "run.json").write_text(json.dumps(info))
    records = {"steps": step_records(), "evals": plain.eval_records(STEPS), "samples": plain.sample_records(STEPS)}
    for name, lines in (records | {"findings": findings}).items():
        write_lines(folder / f"{name}.jsonl", lines)
    return write_report(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with headless(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, file):
    """The report at its usual width. Whatever a test does with it, the console stays empty and nothing is loaded."""
    page = browser.open(file.as_uri())
    yield page
    assert page.problems() == []
    assert set(page.requests()) == {file.as_uri()}
    page.close()


def point(page, share):
    """Pixels of the place in the loss chart that is a share of its plot from the left."""
    left, top, width, height = page.box(".to-end svg")
    start, end = (pixel * width / 1092 for pixel in (52, 1092 - 14))
    return left + start + share * (end - start), top + height / 2


def tip(page, chart=0):
    """The lines of the box beside the cursor, None where there is none."""
    return page.run(f"""(() => {{ const tip = document.querySelectorAll(".tip")[{chart}];
        return tip.hidden ? null : [...tip.children].map((each) => [...each.children].map((part) => part.textContent)
            .join(" ") || each.textContent); }})()""")


def texts(page, selector):
    return page.run(f"[...document.querySelectorAll({selector!r})].map((each) => each.textContent.trim())")


def choose(page, name, value):
    page.run(f"document.querySelector('input[name={name}][value={value}]').click()")


def first_step(page):
    return int(re.match(r"step ([\d,]+),", tip(page)[0])[1].replace(",", ""))


SHOWN = "[...document.querySelectorAll('%s')].filter((each) => each.checkVisibility()).length"
CURVE = "document.querySelector('.to-end path.raw').getAttribute('d')"


def numbers(path):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


def test_the_script_draws_what_the_server_drew(page, file):
    """The page redraws the charts as it opens; without a script they look the same."""
    drawn = plain.Page(file.read_text(encoding="utf-8"))
    for css in ("raw", "line", "floor", "reference", "grid"):
        of_css = [attributes for tag, attributes in drawn.tags if tag == "path" and attributes.get("class") == css]
        found = page.run(f"[...document.querySelectorAll('path.{css}')].map((each) => each.getAttribute('d'))")
        assert of_css and len(found) == len(of_css), css
        for one, other in zip(found, (attributes["d"] for attributes in of_css), strict=True):
            assert re.sub(r"[-\d.]+", "", one) == re.sub(r"[-\d.]+", "", other), css
            assert numbers(one) == pytest.approx(numbers(other), abs=0.15), css
    for tag, names in (("text", ("x", "y")), ("circle", ("cx", "cy"))):
        expected = [[float(attributes[name]) for name in names] for each, attributes in drawn.tags if each == tag]
        places = f"{json.dumps(names)}.map((name) => Number(each.getAttribute(name)))"
        found = page.run(f"[...document.querySelectorAll('{tag}:not(.cursor)')].map((each) => {places})")
        assert np.allclose(found, expected, rtol=0, atol=0.15), tag


def test_the_pointer_shows_the_values_of_its_step(page):
    x, y = point(page, 0.7)
    page.mouse("Moved", x, y)
    lines = tip(page)
    step = first_step(page)
    assert lines[0] == f"step {step}, {step * TOKENS_PER_STEP:,} tokens"
    loss = step_records()[step - 1]["loss"]
    assert f"this step {float(f'{loss:.5g}'):g}" in lines
    assert lines[1].startswith("smoothed ") and lines[3].startswith("n-gram baseline ")
    assert page.run("document.querySelectorAll('g.cursor:not([style*=none])').length") == 4  # one in each chart
    page.mouse("Moved", 5, 5)
    assert tip(page) is None


def test_a_spike_a_gap_and_marks_are_named(page):
    page.run("document.querySelector('td a[data-tokens=\"716800\"]').click()")  # step 700: its loss_spike
    assert {"this step 7.5", "loss_spike at step 700: pass 2 begins"} <= set(tip(page))
    page.run("document.querySelector('.to-end svg').focus()")
    page.press("End")
    assert first_step(page) < STEPS
    page.press("0")
    page.press("End")
    assert first_step(page) == STEPS and "eval loss 4.3000 at step 1,200" in tip(page)
    for _ in range(2):
        page.press("PageUp")
    assert first_step(page) == STEPS - 2 * STEPS // 10
    page.press("ArrowLeft")
    assert "this step not finite" in tip(page)
    assert "step 959, 982,016 tokens; " in page.run("document.querySelector('[aria-live]').textContent")


def test_zoom_by_dragging_and_by_buttons(page):
    whole = page.run(CURVE)
    page.drag(point(page, 0.5), point(page, 0.6))
    zoomed = page.run(CURVE)
    steps = []
    for share in (0, 1):
        page.mouse("Moved", *point(page, share))
        steps.append(first_step(page))
    assert steps == [round(STEPS**0.5), round(STEPS**0.6)]  # the axis is logarithmic
    assert zoomed.count("L") <= steps[1] - steps[0] + 3 and zoomed != whole
    assert "50k" in texts(page, ".small > div:first-child .tick")  # the other charts follow
    page.click(".to-end svg", clicks=2)
    assert page.run(CURVE) == whole
    seen = [whole]
    for button in ("in", "later", "earlier", "out"):
        page.click(f"[data-do={button}]")
        seen.append(page.run(CURVE))
    assert len({*seen[:3]}) == 3 and numbers(seen[3]) == pytest.approx(numbers(seen[1]), abs=0.15)
    assert seen[4] == whole


def test_axes_are_switched_and_stay_so_when_the_page_is_loaded_again(page):
    whole, title = page.run(CURVE), ".to-end .axes text:last-child"
    assert texts(page, title) == ["tokens seen, log scale"] and "1M" in texts(page, ".to-end .tick")
    choose(page, "unit", "steps")
    assert texts(page, title) == ["step, log scale"] and "1k" in texts(page, ".to-end .tick")
    assert page.run(CURVE) == whole  # each step has as many tokens
    choose(page, "x", "linear")
    linear = page.run(CURVE)
    assert texts(page, title) == ["step"]
    choose(page, "y", "log")
    assert page.run(CURVE) != linear
    page.click("[data-do=in]")
    zoomed = page.run(CURVE)
    page.reload()
    assert texts(page, title) == ["step"] and texts(page, "label:has(:checked)") == ["steps", "linear", "log"]
    assert page.run(CURVE) == zoomed
    page.click("[data-do=all]")
    for name, value in (("unit", "tokens"), ("x", "log"), ("y", "linear")):
        choose(page, name, value)
    assert page.run(CURVE) == whole


def test_a_marker_opens_its_finding_and_the_finding_its_place_in_the_chart(page):
    page.click(".to-end a.warning text")
    page.settle()
    row = "document.querySelector('#finding-2')"  # the error is the first
    assert page.run("location.hash") == "#finding-2" and page.run(f"{row}.querySelector('details').open")
    top, bottom = page.run(f"(({{ top, bottom }}) => [top, bottom])({row}.getBoundingClientRect())")
    assert 0 <= top < bottom <= page.run("innerHeight")
    page.click("#finding-2 a")
    assert first_step(page) == 700
    assert texts(page, ".to-end a.marker text") == ["missing_label_shift", "accumulation_mismatch", "loss_spike x2"]
    assert page.run(SHOWN % ".to-end a.marker text") == 1  # the other two are out of sight
    ticks = texts(page, ".small > div:first-child .tick[text-anchor=end]:not(.far)")[:-1]
    assert all(float(tick) < 50 for tick in ticks)  # a gradient norm of 500 does not flatten the rest


OVERFLOWING = """(() => {
    document.querySelectorAll("details").forEach((each) => { each.open = true; });
    return [...document.querySelectorAll("body *:not(svg *, script)")].filter((each) => {
        const { right, left, width } = each.getBoundingClientRect();
        if (!width || each.closest(".unseen") || (each.closest(".chart") && !each.closest(".tip"))) return false;
        return right > innerWidth + 0.5 || left < -0.5 || (each.scrollWidth > each.clientWidth + 1 &&
            !each.matches(".scroll") && getComputedStyle(each).display !== "inline");
    }).map((each) => `${each.tagName}.${each.className}: ${each.textContent.slice(0, 40)}`);
})()"""


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_over_its_box(browser, file, width):
    page = browser.open(file.as_uri(), width)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.mouse("Moved", *point(page, 0.98))
    assert tip(page) is not None and page.run(OVERFLOWING) == []
    ends = "['.to-end', '.to-end > .chart'].map((each) => document.querySelector(each).getBoundingClientRect().right)"
    assert abs(page.run(f"(([frame, chart]) => chart - frame)({ends})")) < 1  # scrolled to its end
    columns = page.run("new Set([...document.querySelectorAll('.figure')].map((each) => each.offsetLeft)).size")
    assert columns == {390: 2, 768: 3, 1280: 5}[width]
    layout = page.run("getComputedStyle(document.querySelector('.findings td')).display")
    assert layout == ("inline-block" if width == 390 else "table-cell")
    colours = []
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(17, 20, 27)"]
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run(SHOWN % ".tools") == 0
    assert page.run("getComputedStyle(document.body).backgroundColor") == colours[0]
    assert page.problems() == []
    page.close()


def test_without_script_all_but_the_tools_is_there(browser, file):
    page = browser.open(file.as_uri(), 390, scripts=False)
    assert page.run(SHOWN % ".tools") == 0 and page.run(SHOWN % "svg path.raw") == 4
    page.close()


def test_a_run_of_one_step_without_numbers_opens(browser, tmp_path):
    write_lines(tmp_path / "steps.jsonl", [plain.step_records(1)[0] | {"loss": None, "grad_norm": None}])
    page = browser.open(write_report(tmp_path).as_uri())
    page.mouse("Moved", *point(page, 1))
    assert tip(page) == ["step 1, 1,024 tokens", "this step not finite"]
    for button in ("in", "later", "out", "all"):
        page.click(f"[data-do={button}]")
    assert page.problems() == []
    page.close()
