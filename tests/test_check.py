"""`check` and `report --bundle`, through the command line's own entry."""

import json
import zipfile

import pytest
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from recipe.__main__ import run
from recipe.bundle import write_bundle
from recipe.errors import UserError
from recipe.guards.finding import FINDING_IDS


def unshifted(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def test_check_judges_without_training(write_config, tmp_path, capsys):
    assert run(["check", write_config(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"missing_label_shift", "non_causal_attention", "row_leak", "eval_train_mismatch"} <= set(result["judged"])
    assert result["findings"] == [] and "repeated_data" in result["needs_training"]
    parts = [result["judged"], result["needs_training"], result["cannot_judge"], result["not_applicable"]]
    assert set().union(*parts) == set(FINDING_IDS)
    assert not (tmp_path / "run").exists()


def test_check_finds_the_missing_shift_and_says_3(write_config, monkeypatch, capsys):
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", staticmethod(unshifted))
    assert run(["check", write_config()]) == 3
    out = capsys.readouterr().out
    assert "error           missing_label_shift | step 0 | found loss target = token i" in out
    assert "clear           double_label_shift" in out and "not applicable  rank_divergence: one rank" in out


def test_check_of_a_bad_config_is_one_line(write_config, capsys):
    assert run(["check", write_config(block_size=0)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_bundle_has_findings_and_no_secrets(write_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", staticmethod(unshifted))
    assert run(["train", write_config()]) == 0
    folder = tmp_path / "run"
    info = json.loads((folder / "run.json").read_text())
    info["arguments"] |= {"hub_token": "hf_abcdefghijklmnop", "note": "see https://example.org/private?key=1"}
    (folder / "run.json").write_text(json.dumps(info))
    assert run(["report", str(folder), "--bundle"]) == 0
    bundle = capsys.readouterr().out.splitlines()[-1]
    with zipfile.ZipFile(bundle) as archive:
        assert sorted(archive.namelist()) == [
            "evals.jsonl",
            "exit.json",
            "findings.jsonl",
            "run.json",
            "steps.jsonl",
        ]
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    everything = "".join(texts.values())
    assert str(tmp_path) not in everything and "hf_abc" not in everything and "example.org" not in everything
    assert json.loads(texts["findings.jsonl"].splitlines()[0])["id"] == "missing_label_shift"
    packed = json.loads(texts["run.json"])
    assert packed["arguments"]["hub_token"] == "(removed)"
    assert packed["arguments"]["learning_rate"] == info["arguments"]["learning_rate"]
    assert packed["versions"] == info["versions"]
    assert texts["steps.jsonl"].count("\n") == 6


def test_a_bundle_of_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        write_bundle(tmp_path)
