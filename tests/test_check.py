"""`check` and `report --bundle`, through the command line's own entry."""

import json
import zipfile

import pytest
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from recipe.__main__ import run
from recipe.bundle import write_bundle
from recipe.errors import UserError
from recipe.guards import FINDING_IDS
from recipe.guards.records import read_lines


def unshifted(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def test_check_judges_without_training(write_config, tmp_path, capsys):
    assert run(["check", write_config(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"missing_label_shift", "non_causal_attention", "row_leak", "eval_train_mismatch"} <= set(result["judged"])
    assert result["findings"] == [] and "learning_rate_off" in result["needs_training"]
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
    assert packed["result"]["guards"]["judged_steps"] == info["result"]["guards"]["judged_steps"]
    for line, stored in zip(texts["findings.jsonl"].splitlines(), read_lines(folder / "findings.jsonl"), strict=True):
        record = json.loads(line)
        assert all(record[name] == stored[name] for name in ("id", "severity", "step", "tokens_seen", "check"))
        assert {k: v for k, v in record["evidence"].items() if isinstance(v, float)} == {
            k: v for k, v in stored["evidence"].items() if isinstance(v, float)
        }
    assert texts["steps.jsonl"].count("\n") == 6


# Where it stands in `arguments` -> value, and what of it must be nowhere in the bundle.
SECRETS = {
    "output_dir": ("/home/jane/My Client Acme/run", "jane Client Acme"),
    "source": ([{"path": "runs/acme-secret", "weight": 1.0}, {"path": "../acme/hidden.json"}], "acme hidden"),
    "model_name_or_path": ("acme-corp/secret-7b", "acme-corp secret-7b"),
    "tokenizer": ("\\\\fileserver\\share\\tok", "fileserver share"),
    "model_config": ("D:\\clients\\borg.json", "clients borg"),
    "text_column": ("diagnosis_of_patient", "diagnosis"),
    "trajectory": ("~/curves/fleet.json", "curves fleet"),
    "project": ("skunkworks", "skunkworks"),
    "metric_for_best_model": ("\u5ba2\u6237\u6570\u636e", "\\u5ba2"),
    "hub_token": ("hf_abcdefghijklmnop", "hf_abc"),
    "run_name": ("github_pat_11ABCDEFG0abcdefgh", "github_pat 11ABC"),
    "hub_model_id": ("gho_16C7e42F292c6912E7", "gho_ 16C7"),
    "lr_scheduler_kwargs": ({"note": "glpat-abc-DEF_123", "min_lr_rate": 0.1}, "glpat DEF_123"),
    "deepspeed": ({"nested": ["xoxb-1234-abcd", 7]}, "xoxb 1234-abcd"),
    "resume_from_checkpoint": ("s3://bucket-of-borg/ckpt?sig=a", "bucket-of ckpt"),
    "WANDB_KEY": ("0123456789abcdef0123456789abcdef01234567", "WANDB 0123456789abcdef"),
    "header": ("Bearer abc.def", "Bearer abc.def"),
}
# Texts that nothing else in the run knows, and what of them must go.
UNKNOWN = {
    "no such file: /home/otto/Other Client/x's y, z/data": "otto Other Client",
    "cannot open 'private notes' here": "private notes",
    "see \\\\nas\\team one\\a": "nas team",
    "in C:\\Users\\otto\\My Things": "otto Things",
    "from ../otto/my things/b": "otto things",
    "of https://user:pw@example.org/p?q=1": "user:pw example.org",
    "sent Authorization: Bearer abcd.efgh": "abcd.efgh",
    "with password=hunter2 and api_key: tiger3": "hunter2 tiger3",
    "key 89abcdef0123456789abcdef0123456789abcdef": "89abcdef",
    "xoxp-99-zz, glpat-zz99zz, ghp_zz99zz, sk-zz99": "99-zz zz99",
    "by otto@example.org": "otto example",
}


def write_run(folder, texts):
    """A run directory whose settings hold the secrets and whose texts quote them."""
    folder.mkdir()
    arguments = {name: value for name, (value, _) in SECRETS.items()}
    arguments |= {"learning_rate": 0.003, "optim": "adamw_torch_fused", "disabled_guards": ["loss_spike"]}
    noted = {text: text for text in texts}
    source = {"name": "runs/acme-secret", "bytes": 9, "content_hash": "d372506add8f3645"}
    guards = {"judged": ["row_leak"], "cannot_judge": {"loss_spike": texts[0], **noted}}
    info = {
        "config_path": "/home/jane/My Client Acme/borg.json",
        "resumed_from": "/home/jane/My Client Acme/run/checkpoint-3",
        "arguments": arguments,
        "versions": {"torch": "2.13.0+cpu", "acme-private": "1.0"},
        "commit": "da848eee3d734e6a33d31d6a3066ce4eede63789",
        "device": {"name": "NVIDIA H100 80GB HBM3", "count": 1, "host": "fileserver"},
        "source": {**source, "parts": [source]},
        "trajectory": {"name": "fleet", "description": "of Acme", "points": [{"tokens": 1, "loss": 2.5}]},
        "result": {
            "verdict": "suspicious: loss_spike",
            "verdict_kind": "findings",
            "tokens_by_source": {"runs/acme-secret": 768},
            "guards": guards,
            "note": "skunkworks",
        },
        "failure": "; ".join(texts),
        "extra": texts,
    }
    finding = {"id": "loss_spike", "step": 3, "found": "loss 9.5, 1/8 of it", "expected": "below 4 (median of 64)"}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "exit.json").write_text(json.dumps({"code": 3, "reason": texts[-1], "argv": texts}))
    findings = [finding | {"evidence": {"loss": 9.5, **noted}, "rows": texts}]
    findings += [finding | {"found": text, "likely_causes": [f"so {text}"], "action": text} for text in texts]
    (folder / "findings.jsonl").write_text("".join(json.dumps(record) + "\n" for record in findings))
    step = {"step": 1, "loss": 2.5, "learning_rate": 0.003, "note": texts[0]}
    (folder / "steps.jsonl").write_text(json.dumps(step) + "\n")


def read_bundle(folder):
    with zipfile.ZipFile(write_bundle(folder)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_no_secret_survives_in_a_bundle(tmp_path):
    values = [value for value, _ in SECRETS.values() if isinstance(value, str)]
    quoted = [f"{value} is not it" for value in values] + [
        "after 9 tokens of runs/acme-secret-2/checkpoint-3, it ended"
    ]
    write_run(tmp_path / "run", [*quoted, *UNKNOWN])
    everything = "".join(read_bundle(tmp_path / "run").values())
    parts = [part for _, words in SECRETS.values() for part in words.split()]
    parts += [part for words in UNKNOWN.values() for part in words.split()]
    assert [part for part in parts if part.lower() in everything.lower()] == []


def test_a_bundle_keeps_what_a_finding_needs(tmp_path):
    write_run(tmp_path / "run", ["the model at acme-corp/secret-7b has no eos"])
    texts = read_bundle(tmp_path / "run")
    packed = json.loads(texts["run.json"])
    arguments = packed["arguments"]
    assert (arguments["learning_rate"], arguments["optim"]) == (0.003, "adamw_torch_fused")
    assert arguments["disabled_guards"] == ["loss_spike"] and arguments["text_column"] == "(removed)"
    assert arguments["lr_scheduler_kwargs"] == {"note": "(removed)", "min_lr_rate": 0.1}
    assert packed["versions"] == {"torch": "2.13.0+cpu"}
    assert packed["commit"] == "da848eee3d734e6a33d31d6a3066ce4eede63789"
    assert packed["source"]["parts"] == [{"name": "(removed)", "bytes": 9, "content_hash": "d372506add8f3645"}]
    assert packed["device"] == {"name": "NVIDIA H100 80GB HBM3", "count": 1}
    assert packed["trajectory"] == {"name": "(removed)", "points": [{"tokens": 1, "loss": 2.5}]}
    result = packed["result"]
    assert (result["verdict_kind"], result["tokens_by_source"]) == ("findings", [768])
    assert result["guards"] == {"judged": ["row_leak"], "cannot_judge": {"loss_spike": "(removed)"}}
    assert json.loads(texts["exit.json"]) == {"code": 3, "reason": "(removed)"}
    first, second = map(json.loads, texts["findings.jsonl"].splitlines())
    assert (first["id"], first["step"], first["evidence"]["loss"]) == ("loss_spike", 3, 9.5)
    assert first["found"] == first["expected"] == second["found"] == "(removed)"
    step = json.loads(texts["steps.jsonl"])
    assert step == {"step": 1, "loss": 2.5, "learning_rate": 0.003, "note": "(removed)"}


def test_a_bundle_without_settings_does_not_quote_the_reason(tmp_path):
    (tmp_path / "exit.json").write_text(json.dumps({"code": 2, "reason": "acme: no column 'text'; it has diagnosis"}))
    assert json.loads(read_bundle(tmp_path)["exit.json"]) == {"code": 2, "reason": "(removed)"}


def test_a_bundle_of_no_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        write_bundle(tmp_path)
