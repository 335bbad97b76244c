"""No credential leaves the process: unit tests of the boundary, and a search of every file that a run writes."""

import itertools
import json
import logging
import os
import shlex
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import document
from recipe import redact as module
from recipe.console import LineFormatter
from recipe.errors import message_of
from recipe.model_card import write_model_card
from recipe.plain_json import dumps
from recipe.publish import PUBLISHED
from recipe.redact import redact, redact_all, remember, remember_urls
from recipe.report import write_report

ROOT = Path(__file__).resolve().parent.parent
# With what ends a URL, what JSON escapes, and what is percent-encoded. A run must write no part of them.
PASSWORD, SIGNATURE = "hunter2'ö%2F%23%40planted", "sIg'é%22planted0123456789"
TOKEN = "hf_plantedPLANTEDplanted0123"
SECRETS = ("hunter2", "planted", "sIg", TOKEN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:secret@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("https://user:p@ss@h/a?X-Amz-Signature=ab%2Bc&v=1 x", "https://***@h/a?X-Amz-Signature=***&v=*** x"),
        ('{"a": "http://h/x.jsonl?tok", "b": 1}', '{"a": "http://h/x.jsonl?***", "b": 1}'),
        ("cannot get /a.parquet?sig=abc&se=2 (404)", "cannot get /a.parquet?sig=***&se=2 (404)"),
        ("Authorization: Bearer abcdefgh.ijk, basic arithmetic", "Authorization: Bearer ***, basic arithmetic"),
        (f"token {TOKEN}.", "token hf_***."),
        (
            "what? a=b; https://github.com/a/b#c, user@host, 1 < 2",
            "what? a=b; https://github.com/a/b#c, user@host, 1 < 2",
        ),
        ("postgres://u:p@h:5/d", "postgres://***@h:5/d"),
        ("s3://k:s/ecret@b/x", "s3://***@b/x"),
        ("opening http://u:it's@h/a?sig=o'ne: its index", "opening http://***@h/a?sig=***: its index"),
        ("'http://u:p@h/a?sig=b': no such file", "'http://***@h/a?sig=***': no such file"),
        ("http://h/a.parquet#sig=abc, [x](http://h/p#part)", "http://h/a.parquet#sig=***, [x](http://h/p#part)"),
        ("http%3A%2F%2Fu%3Ap%40h%2Fa and http%3A%2F%2Fh%2Fa", "http%3A%2F%2F*** and http%3A%2F%2Fh%2Fa"),
        *([text] * 2 for text in ("http://[::1]:8080/a@b http://h:80/a@b", "s3://b/day=1/x@v2", "file:///me@h/a")),
        *([text] * 2 for text in ('{"a":"http://h/x","b":"me@h"}', "see (https://h/a.), or me@h; 50% = half")),
    ],
)
def test_credentials_are_masked_and_nothing_else(text, expected):
    assert redact(text) == expected and redact(expected) == expected


def test_remembered_values_are_masked_anywhere(monkeypatch):
    monkeypatch.setattr(module, "_known", [])
    remember("correct-horse", None, "", "short")
    assert redact("x correct-horsey short") == "x ***y short"
    assert redact_all({"correct-horse": ["correct-horse", 1, None]}) == {"***": ["***", 1, None]}


ODD = ["pass7'wörd7", 'pass7"ote\\word7', "pass7%2Fcent7%27%C3%B6%23word7", "pass7+;=word7", "pass7/s'word7"]
URLS = ["https://us3r:{}@h/a.parquet", "https://h/a.parquet?x=1&sig={}", "https://h/a.parquet?{}", "s3://{}@bucket/a"]


@pytest.mark.parametrize(
    ("url", "password"),
    [
        *itertools.product(URLS[:2], ODD),
        *itertools.product(URLS[2:3], [*ODD[:3], ODD[4]]),
        *itertools.product(URLS[3:], ODD[:4]),
        *itertools.product(URLS[:1], ["pass7#word7", "pass7?word7", "pass7@7@word7", "pass7&x=word7"]),
    ],
)
def test_an_odd_credential_of_the_source_is_masked_in_any_text(monkeypatch, password, url):
    """Also where the URL is quoted, escaped, decoded, encoded or cut."""
    monkeypatch.setattr(module, "_known", [])
    source = url.format(password)
    remember_urls({"source": [{"path": source}], "block_size": 64})
    record = logging.LogRecord("recipe", 20, "", 0, "%r and %s, %s", (source, shlex.quote(source), password), None)
    texts = [LineFormatter(False).format(record), message_of(ValueError(f"no {password}!")), dumps([source, password])]
    texts += [redact(json.dumps({"source": source})), redact(f"cannot get {quote(source, safe='')}: 404")]
    texts += [redact(f"cannot get {unquote(source)}"), redact(f"{quote(unquote(password))} is refused")]
    assert [text for text in texts if "pass7" in text or "word7" in text or "wörd7" in text] == []


def test_ordinary_text_stays_as_it_is(monkeypatch):
    """Values of a query that are words, numbers or dates are no credentials, nor is the user's name."""
    monkeypatch.setattr(module, "_known", [])
    remember_urls("https://training:pw@h/a.parquet?format=parquet&sv=2024-11-04&part=12&raw=true")
    text = "training on part 12 of a.parquet since 2024-11-04, not raw text; pw"
    assert redact(text) == text


def test_json_stays_json():
    value = {"url": 'http://u:"p"@h/?a="b"&c=\\d', "nan": float("nan"), "more": ["http://a:b@c/d?e=f"]}
    assert json.loads(dumps(value))["more"] == ["http://***@c/d?e=***"]


def test_a_run_writes_no_credential_anywhere(write_config, tmp_path):
    """One run that fails over a signed URL with a password, and resumes over another signature."""
    served, run_dir = tmp_path / "served", tmp_path / "run"
    served.mkdir()
    table = pa.table({"text": [document(i) for i in range(300)]})
    pq.write_table(table, served / "a.parquet", row_group_size=10)
    words = ["train", write_config(save_steps=10, max_steps=30), "--hub_token", TOKEN, "--json"]
    address = f"http://user:{PASSWORD}@127.0.0.1:PORT/a.parquet?X-Amz-Signature={SIGNATURE}"
    first, second = (["--source", f"{address}{number}&token={TOKEN}"] for number in (1, 2))
    more = ["--resume_from_checkpoint", "latest", "--dataloader_num_workers", "2"]
    runs = [(45, 1000, [*words, *first]), (20, 2, [*words, *more, *second])]
    command = [sys.executable, "-c", RUNS, str(served), json.dumps(runs), str(run_dir)]
    environment = os.environ | {"RECIPE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, env=environment)
    printed = done.stdout + done.stderr
    assert done.stdout.splitlines()[-1:] == [b"[4, 0]"], printed.decode()
    assert b"trying again" in printed and b"?X-Amz-Signature=***" in printed and b"Traceback" not in printed
    with zipfile.ZipFile(run_dir / "bundle.zip") as bundle:
        bundle.extractall(tmp_path / "bundle")
    folders = run_dir, tmp_path / "bundle", tmp_path / "cache"
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"run.json", "stream_state.json", "report.html", "README.md", "training_args.bin", "steps.jsonl"} <= names
    assert [file for file in files if holds_secret(file.read_bytes())] == [] and not holds_secret(printed)
    nothing_private_is_published(run_dir, tmp_path)


# Both runs and the report in one process, with the log of the command line.
RUNS = """
import json, os, pathlib, sys
import recipe.data.files, recipe.data.packing, recipe.trainer
from recipe.__main__ import run
from recipe.data import formats
from recipe.console import configure_logging
from tests.range_server import RangeServer

recipe.data.files.RETRY_SECONDS = (0.01,) * 3
recipe.data.packing.FIRST_TOKENIZE_BYTES = recipe.data.packing.TOKENIZE_BYTES = 1
recipe.trainer.SampleCallback.__init__.__defaults__ = (4,)
configure_logging()
served, runs, run_dir = sys.argv[1:]
with RangeServer(pathlib.Path(served)) as server:
    codes = []
    for begin, count, words in json.loads(runs):
        server.reset()
        formats.close_parquet()
        server.fail_after(begin, "503", count=count)
        codes.append(run([word.replace("PORT", server.url.rsplit(":", 1)[1]) for word in words]))
    assert run(["report", run_dir, "--bundle"]) == 0
print(json.dumps(codes), flush=True)
os._exit(0)
"""


def holds_secret(data: bytes) -> bool:
    return any(secret.encode() in data for secret in SECRETS)


def nothing_private_is_published(run_dir: Path, tmp_path: Path) -> None:
    """`push_to_hub` uploads `final` or a checkpoint, by an allow list."""
    for folder in (run_dir / "final", run_dir / "checkpoint-30"):
        published = [file for file in folder.rglob("*") if any(fnmatch(file.name, mask) for mask in PUBLISHED)]
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in published}
        for file in published:
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_what_is_pushed_is_the_allow_list(write_config, tmp_path, monkeypatch):
    from recipe.__main__ import run

    uploads = []

    class Api:
        def whoami(self, token):
            assert token == TOKEN

        def upload_folder(self, **given):
            assert (Path(given["folder_path"]) / "config.json").exists()
            uploads.append(given)

    monkeypatch.setattr("recipe.publish.HfApi", Api)
    known = {"hub_model_id": "a/b", "push_in_progress": None}
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, *_, **__: vars(self).update(known))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: pytest.fail("Trainer's own upload"))
    monkeypatch.setenv("HF_TOKEN", "")
    assert run(["train", write_config(push_to_hub=True, hub_model_id="a/b", hub_token=TOKEN)]) == 0
    assert {Path(given["folder_path"]).name for given in uploads} == {"checkpoint-3", "checkpoint-6", "final"}
    assert all(given["allow_patterns"] == list(PUBLISHED) and "token" not in given for given in uploads)
    assert os.environ["HF_TOKEN"] == TOKEN


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_with_positions_are_not_pushed(write_config, capsys, strategy):
    from recipe.__main__ import run

    assert run(["train", write_config(push_to_hub=True, hub_strategy=strategy)]) == 2
    assert "hub_strategy" in capsys.readouterr().err


HOSTILE = '<script>alert("1")</script>\'"&<img src=x onerror=alert(1)>'


def test_nothing_from_data_or_config_is_markup_in_the_report(tmp_path):
    """Every string of the run's files is hostile."""
    names = ("started", "finished", "commit", "config_path", "failure", "resumed_from")
    arguments = {"output_dir": HOSTILE, HOSTILE: HOSTILE, "source": [{"path": HOSTILE}]}
    run = {name: HOSTILE for name in names} | {
        "arguments": arguments,
        "versions": {HOSTILE: HOSTILE},
        "device": {"name": HOSTILE, "type": HOSTILE, "kernels": HOSTILE, "count": HOSTILE},
        "model": {"parameters": HOSTILE, "flops_per_token": HOSTILE},
        "source": {"name": HOSTILE, "content_hash": HOSTILE, "documents": HOSTILE, "bytes": HOSTILE},
        "trajectory": {"name": HOSTILE, "points": [{"tokens": 1, "loss": 1, "low": 1, "high": 2}] * 2},
        "result": {
            "verdict": HOSTILE,
            "exit_code": HOSTILE,
            "passes": HOSTILE,
            "bad_documents_skipped": HOSTILE,
            "tokens_by_source": {HOSTILE: HOSTILE},
            "guards": {
                "judged": [HOSTILE],
                "judged_steps": {HOSTILE: HOSTILE},
                "cannot_judge": {HOSTILE: HOSTILE},
                "not_applicable": {HOSTILE: HOSTILE},
                "disabled": [HOSTILE],
            },
        },
    }
    finding = {
        **dict.fromkeys(("id", "severity", "found", "expected", "action"), HOSTILE),
        "likely_causes": [HOSTILE],
        "evidence": {HOSTILE: HOSTILE},
        "step": 1,
        "tokens_seen": 10,
    }
    sample = {"step": 1, "prompt": HOSTILE, "text": HOSTILE}
    step = {"step": 1, "tokens_seen": 10, "loss": 1.0, HOSTILE: HOSTILE}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for name, record in (("findings", finding), ("samples", sample), ("steps", step), ("evals", step)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps({**record, 'step': 2})}\n")
    page = write_report(tmp_path).read_text()
    num_own_scripts = 2
    assert page.count("alert(") >= 30 and page.count("<script") == num_own_scripts and "<img" not in page
    card = write_model_card(tmp_path, tmp_path / "final").read_text()
    assert "alert(" in card and "\n```\n<" not in card


def test_a_model_card_has_no_path_of_this_machine(tmp_path):
    arguments = {"output_dir": "/home/me/runs/x", "tokenizer": "/data/tok", "source": "/data/*.parquet", "seed": 1}
    run = {"arguments": arguments, "source": {"name": "/data/*.parquet + hf://a/b"}, "config_path": "/home/me/c.json"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    card = write_model_card(tmp_path, tmp_path / "final").read_text()
    assert "/home/me" not in card and "/data/" not in card and "*.parquet" in card and "hf://a/b" in card
