"""README's picture, drawn from two small run directories."""

import json
from xml.etree import ElementTree

from tests.picture import build_chart, draw

STEPS = 120


def write_run(folder, end: float, findings=()):
    """A loss that falls in a line from 8 to `end`."""
    folder.mkdir()
    losses = [8 - (8 - end) * step / STEPS for step in range(1, STEPS + 1)]
    steps = [
        {"step": i, "tokens_seen": 2048 * i, "loss": loss, "floor": 5.0 if i <= 60 else None}
        for i, loss in enumerate(losses, start=1)
    ]
    for name, records in (("steps.jsonl", steps), ("findings.jsonl", findings)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_it_has_both_curves_and_the_first_finding_of_each_id(tmp_path):
    found = [("missing_label_shift", "error", 0), ("loss_spike", "warning", 60), ("loss_spike", "warning", 90)]
    found += [("init_loss_off", "info", 0)]
    keys = ("id", "severity", "step")
    findings = [{**dict(zip(keys, f, strict=True)), "tokens_seen": 2048 * f[2], "found": "x < y"} for f in found]
    chart = build_chart(write_run(tmp_path / "healthy", 6.0), write_run(tmp_path / "unshifted", 0.0, findings))
    texts = [element.text for element in ElementTree.fromstring(draw(chart)).iter() if element.tag.endswith("}text")]
    assert [text for text in texts if ", step" in text] == ["missing_label_shift, step 0", "loss_spike, step 60"]
    assert "healthy" in texts and "without label shift: the model copies its input" in texts
