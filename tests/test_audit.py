"""The audit of transformers' classes: on a healthy class, on seeded faults, and what README says of its results."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.audit import one, pool
from tests.audit.classes import Entry, find_entries
from tests.audit.faults import FAULTS, SCRIPTS, run_script
from tests.audit.page import PAGE, format_page, format_summary
from tests.audit.results import RESULTS, summarize
from tests.audit.shrink import shrink
from tests.audit.subject import make_batch

ROOT = Path(__file__).parents[1]


class CountsAllPositions(transformers.LlamaForCausalLM):
    """Divides by all positions, those without a label included, and ignores num_items_in_batch."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss * (labels[:, 1:] != -100).sum() / labels.numel()
        return output


class SeesTheRow(transformers.LlamaForCausalLM):
    """A hundredth of the mean over the row in every logit: later tokens and other documents leak."""

    def forward(self, input_ids=None, labels=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.mean(dim=1, keepdim=True)
        if labels is not None:
            shifted = labels[:, 1:].reshape(-1)
            output.loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), shifted)
        return output


@pytest.fixture
def audited(monkeypatch):
    """Audits a class in this process, with the config of a Llama."""
    monkeypatch.setattr(one.resource, "setrlimit", lambda *limits: None)
    threads = torch.get_num_threads()

    def audit(kind: type) -> dict:
        monkeypatch.setattr(one, "find_class", lambda name: kind)
        return one.audit(Entry(kind.__name__, "llama", "causal"))

    yield audit
    torch.set_num_threads(threads)


def statuses(report: dict, check: str) -> set[str]:
    settings = [checks for by_setting in report["results"].values() for checks in by_setting.values()]
    return {checks[check].status for checks in settings if check in checks}


def row_of(report: dict, kind: type) -> dict:
    return summarize([Entry(kind.__name__, "llama", "causal")._asdict() | report], {}, 1.0)["classes"][0]


def test_a_healthy_class_passes(audited):
    report = audited(transformers.LlamaForCausalLM)
    row = row_of(report, transformers.LlamaForCausalLM)
    assert (row["verdict"], row["documents"], row["evidence"]) == ("pass", "kept apart", [])
    assert report["disagreements"] == []
    assert statuses(report, "cache") == statuses(report, "trainer") == {"pass"}


def test_a_loss_that_counts_all_positions_is_reported(audited):
    report = audited(CountsAllPositions)
    assert statuses(report, "loss") == statuses(report, "num_items") == statuses(report, "trainer") == {"fault"}
    assert "mean over all at shift 1" in report["results"]["eager"]["plain"]["loss"].detail
    assert statuses(report, "causal") == {"pass"}
    assert row_of(report, CountsAllPositions)["verdict"] == "open"  # no script confirms it


def test_a_leak_of_later_tokens_is_reported_and_the_probe_agrees(audited):
    report = audited(SeesTheRow)
    assert statuses(report, "causal") == statuses(report, "documents") == {"fault"}
    assert statuses(report, "loss") == statuses(report, "rows") == {"pass"}
    assert not [gap for gap in report["disagreements"] if ", causal:" in gap or ", rows:" in gap]


def test_a_class_that_does_not_run_on_texts_is_not_audited(audited):
    class NeedsImages(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            raise ValueError("pixel_values are needed")

    row = row_of(audited(NeedsImages), NeedsImages)
    assert row["verdict"] == "not audited" and "pixel_values are needed" in row["evidence"][0]


def test_batches_differ_only_in_what_their_setting_says():
    plain, padded, packed = (make_batch(setting) for setting in ("plain", "padded", "packed"))
    assert torch.equal(plain.ids, packed.ids) and not plain.extra
    assert torch.equal(padded.real, padded.extra["attention_mask"].bool())
    assert bool((padded.labels[~padded.real] == -100).all())
    assert torch.equal(
        packed.extra["position_ids"] == 0, (packed.documents.diff(prepend=-1 + 0 * plain.ids[:, :1]) != 0)
    )


def test_shrinking_keeps_one_layer_of_each_kind():
    config = shrink(transformers.Gemma3TextConfig, {})
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (64, 128, 2)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "PROGRESS", tmp_path / "progress")
    entry = find_entries()["LlamaForCausalLM"]
    (tmp_path / "progress").mkdir()
    known = {"results": {}, "disagreements": [], "problem": "of the run that was killed", "seconds": 0}
    pool._write(tmp_path / "progress", entry, known)
    reports, _ = pool.audit_all([entry], 1, keep=True)
    assert reports[0]["problem"] == "of the run that was killed"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_scripts_import_torch_and_transformers_only(fault):
    lines = (SCRIPTS / f"{fault.name}.py").read_text(encoding="utf-8").splitlines()
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    assert imports == {"import torch", "import transformers"}
    assert fault.upstream or fault.report


def test_a_script_confirms_its_fault():
    confirmed = run_script(SCRIPTS / "decoder_input_from_source.py")
    assert list(confirmed) == ["FSMTForConditionalGeneration"]


def test_the_page_is_that_of_the_recorded_results():
    assert PAGE.read_text(encoding="utf-8") == format_page(json.loads(RESULTS.read_text(encoding="utf-8")))


def test_every_class_of_the_mappings_is_recorded():
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [row["class"] for row in recorded["classes"]] == list(find_entries())


def test_readme_says_what_was_recorded():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert format_summary(json.loads(RESULTS.read_text(encoding="utf-8"))) in readme
