"""Whole runs through the command, on a tiny model and made-up text."""

import copy
import gc
import json
import logging
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from recipe.__main__ import run
from recipe.arguments import parse_config
from recipe.checkpoints import choose, commit, step_of
from recipe.data.pipeline import build_data
from recipe.data.source import Source, open_source
from recipe.errors import DataError
from recipe.guards.records import read_lines
from recipe.trainer import StreamCallback


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def trained(write_config, tmp_path, kept) -> str:
    """The path of a config whose run is over: trained once, copied for each test."""
    path = write_config()
    if kept.exists():
        shutil.copytree(kept, tmp_path / "run")
    else:
        assert run(["train", path]) == 0
        shutil.copytree(tmp_path / "run", kept)
    return path


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_lines(run_dir / "steps.jsonl")]


def test_a_run_leaves_everything_it_promises(write_config, tmp_path, capsys):
    assert run(["train", write_config(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    run_dir = Path(result["run_dir"])
    few = "no fault found, but nothing learned from context yet: too few tokens, 768 in 6 steps (final loss "
    assert (
        result["verdict"].startswith(few)
        and result["verdict_kind"] == "nothing_learned"
        and result["steps"] == 6
        and result["tokens_seen"] == 6 * 4 * 32
    )
    assert {path.name for path in run_dir.iterdir()} >= {
        "run.json", "steps.jsonl", "evals.jsonl", "findings.jsonl", "samples.jsonl", "exit.json", "report.html",
        "final", "checkpoint-3", "checkpoint-6",
    }  # fmt: skip
    assert json.loads((run_dir / "exit.json").read_text()) == {"code": 0, "reason": result["verdict"]}
    stored = json.loads((run_dir / "run.json").read_text())
    assert stored["arguments"]["block_size"] == 32 and stored["result"]["verdict"] == result["verdict"]
    assert [record["step"] for record in read_lines(run_dir / "evals.jsonl")] == [3, 6]
    assert len(read_lines(run_dir / "samples.jsonl")) >= 2
    report = (run_dir / "report.html").read_text()
    assert 'class="verdict info">No fault found' in report and "too few tokens" in report
    assert "too few tokens" in (run_dir / "final/README.md").read_text()


def test_the_final_model_loads_as_any_other(trained, tmp_path):
    final = str(tmp_path / "run/final")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("w1 w2", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("w1 w2")
    assert (tmp_path / "run/final/README.md").exists()


def test_eval_loss_is_the_plain_next_token_loss_of_the_hold_out(trained, tmp_path, tokenizer):
    from recipe.data.lanes import train_and_eval_splits
    from recipe.data.source import open_source
    from recipe.data.stream import HeldOutRows, Part

    source = open_source(json.loads(Path(trained).read_text())["source"])
    offsets = dict(train_skip=0, train_seed=42, eval_skip=280, eval_seed=1041, eval_documents=10)
    rows = HeldOutRows([Part(source, train_and_eval_splits(source, **offsets)[1])], tokenizer, 32)
    ids = torch.stack([torch.from_numpy(row.input_ids).long() for row in rows.rows])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = read_lines(tmp_path / "run/evals.jsonl")[-1]["eval_loss"]
    assert found == pytest.approx(expected.item(), rel=1e-5)  # another batch size: fp32 sums in another order


@pytest.mark.parametrize("changes", [{}, {"document_masking": True}, {"gradient_accumulation_steps": 2}])
def test_a_resumed_run_is_bit_equal_to_one_that_went_through(write_config, tmp_path, changes):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    path = write_config(**changes)
    assert run(["train", path, "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, halves)
    remove_after(halves, step=3)
    assert run(["train", path, "--output_dir", str(halves), "--resume_from_checkpoint", "latest"]) == 0
    assert losses(whole) == losses(halves)
    models = [AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (whole, halves)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def remove_after(run_dir: Path, step: int) -> None:
    """As a machine leaves it that dies after `step`: later checkpoints gone, records of later steps written."""
    for checkpoint in run_dir.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    with (run_dir / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "tokens_se')


def test_another_split_of_the_global_batch_gives_the_same_run(write_config, tmp_path):
    """Batch 4 x 1 and 2 x 2, also with two workers: the same rows in each step."""
    path = write_config(eval_strategy="no", eval_steps=None)
    options = ["--output_dir", str(tmp_path / "a")], [
        "--output_dir", str(tmp_path / "b"), "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2",
    ]  # fmt: skip
    for words in options:
        assert run(["train", path, *words]) == 0
    # The same sum over tokens in another order: fp32 rounds at 1e-7, Adam's first steps amplify it
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluating_changes_nothing_of_the_training(write_config, tmp_path, num_workers):
    """Trap 2 of the stack: no token crosses between train and eval, for the collator keeps no state."""
    path = write_config(dataloader_num_workers=num_workers)
    for name, steps in (("often", "1"), ("never", "1000")):
        assert run(["train", path, "--output_dir", str(tmp_path / name), "--eval_steps", steps]) == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_workers_end_with_the_training(write_config, monkeypatch):
    """Not when the garbage is collected, which would wait for each of them for 5 seconds."""
    before = {*multiprocessing.active_children()}
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    gc.disable()
    try:
        assert run(["train", write_config(dataloader_num_workers=2, eval_strategy="no")]) == 0
        assert {*multiprocessing.active_children()} <= before
    finally:
        gc.enable()


def test_resuming_at_the_end_trains_no_further_step(trained, tmp_path):
    before, final = losses(tmp_path / "run"), tmp_path / "run/final/model.safetensors"
    weights = final.read_bytes()
    final.unlink()  # as if it was killed between its last checkpoint and its results
    assert run(["train", trained, "--resume_from_checkpoint", "latest"]) == 0
    assert losses(tmp_path / "run") == before and final.read_bytes() == weights
    assert json.loads((tmp_path / "run/run.json").read_text())["result"]["verdict_kind"] == "nothing_learned"
    assert not (tmp_path / "run/checkpoint-7").exists()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "stream_state.json", "model.safetensors"])
def test_latest_passes_over_an_incomplete_checkpoint(trained, tmp_path, missing):
    whole = losses(tmp_path / "run")
    (tmp_path / f"run/checkpoint-6/{missing}").unlink()
    assert run(["train", trained, "--resume_from_checkpoint", "latest"]) == 0
    assert losses(tmp_path / "run") == whole


def test_a_named_incomplete_checkpoint_is_refused(trained, tmp_path, capsys):
    (tmp_path / "run/checkpoint-3/optimizer.pt").unlink()
    assert run(["train", trained, "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-3")]) == 2
    assert "optimizer.pt missing" in capsys.readouterr().err


def test_a_checkpoint_of_another_stream_is_refused_with_the_differences(trained, write_config, tmp_path, capsys):
    assert run(["train", write_config(train_seed=7), "--resume_from_checkpoint", "latest"]) == 2
    assert "train_seed: checkpoint 42, config 7" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"learning_rate": 0.1}, {"seed": 7}, {"adam_beta2": 0.9}])
def test_what_a_checkpoint_brings_back_cannot_be_changed_silently(trained, write_config, tmp_path, capsys, changes):
    assert run(["train", write_config(**changes), "--resume_from_checkpoint", "latest"]) == 2
    error = capsys.readouterr().err
    assert next(iter(changes)) in error and "was made with other settings" in error


def test_another_runs_checkpoint_is_not_written_into_this_one(write_config, tmp_path, capsys):
    path = write_config()
    for name in ("a", "b"):
        assert run(["train", path, "--output_dir", str(tmp_path / name)]) == 0
    words = ["--output_dir", str(tmp_path / "b"), "--resume_from_checkpoint", str(tmp_path / "a/checkpoint-3")]
    assert run(["train", path, *words]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert run(["train", path, "--output_dir", str(tmp_path / "c"), *words[2:]]) == 0
    whole, later = (read_lines(tmp_path / name / "steps.jsonl") for name in ("a", "c"))
    exact = ("step", "tokens_seen", "loss")
    assert [[record[key] for key in exact] for record in whole[3:]] == [[r[key] for key in exact] for r in later]


def test_a_checkpoint_comes_with_the_record_of_its_step(write_config, tmp_path, monkeypatch):
    """A run killed right after it saved must not lose a step: records are written a step late, but before a save."""
    seen = []

    def look(staged, *facts):
        seen.append((step_of(staged), read_lines(tmp_path / "run/steps.jsonl")[-1]["step"]))
        return commit(staged, *facts)

    monkeypatch.setattr("recipe.checkpoints.commit", look)
    assert run(["train", write_config()]) == 0
    assert seen == [(3, 3), (6, 6)]


def test_two_runs_cannot_share_a_directory(write_config, tmp_path, capsys):
    from recipe.rundir import claim

    with claim(tmp_path / "run", rank=0):
        assert run(["train", write_config()]) == 2
    assert "another run is writing into it" in capsys.readouterr().err


def test_the_command_to_resume_repeats_the_overrides():
    from recipe.results import _repeated

    words = ("--output_dir", "x", "--max_steps", "30", "--seed=3", "--resume_from_checkpoint=latest")
    assert _repeated(words) == " --max_steps 30 --seed=3"
    assert _repeated(()) == ""


def test_a_directory_that_holds_a_run_is_not_written_into(trained, capsys, tmp_path):
    before = (tmp_path / "run/steps.jsonl").read_text()
    assert run(["train", trained]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run/steps.jsonl").read_text() == before


def test_continued_pretraining_starts_from_the_checkpoints_loss(write_config, tmp_path):
    path = write_config(max_steps=30, eval_steps=30, save_steps=30)
    assert run(["train", path]) == 0
    words = ["--model_name_or_path", str(tmp_path / "run/final"), "--output_dir", str(tmp_path / "more")]
    assert run(["train", path, *words, "--train_seed", "7"]) == 0
    first, last = losses(tmp_path / "run")[0], losses(tmp_path / "run")[-1]
    assert losses(tmp_path / "more")[0] < (first + last) / 2


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_an_interrupted_run_saves_a_checkpoint_and_goes_on(trained, tmp_path, monkeypatch, number, code):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("started by nohup")
    path = trained
    (tmp_path / "run").rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        on_step_end = StreamCallback.on_step_end

        def interrupted_at_2(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(number)
            on_step_end(self, args, state, control, **kwargs)

        patch.setattr(StreamCallback, "on_step_end", interrupted_at_2)
        assert run(["train", path]) == code
    ended = json.loads((tmp_path / "run/exit.json").read_text())
    assert ended["code"] == code and ended["reason"].startswith(
        f"interrupted by {signal.Signals(number).name}, so far"
    )
    assert not (tmp_path / "run/final").exists()
    assert run(["train", path, "--resume_from_checkpoint", "latest"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_end_of_the_source_is_announced_once(write_config, tmp_path, write_parquet, caplog):
    path = write_config(eval_skip=50, eval_documents=8, max_steps=50, eval_steps=50, save_steps=50)
    write_parquet(60)
    with caplog.at_level(logging.INFO, "recipe.guards"):
        assert run(["train", path]) == 0
    assert sum("pass 2 begins" in record.getMessage() for record in caplog.records) == 1
    assert read_lines(tmp_path / "run/findings.jsonl") == []
    assert json.loads((tmp_path / "run/run.json").read_text())["result"]["passes"] > 1


# --- the first guard, on whole runs


def unshifted(self, logits, labels, vocab_size, **kwargs):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_missing_label_shift_is_named_before_step_1(write_config, tmp_path, monkeypatch, action):
    monkeypatch.setattr(LlamaForCausalLM, "loss_function", unshifted)
    assert run(["train", write_config(on_regression=action)]) == (3 if action == "stop" else 0)
    first, *others = read_lines(tmp_path / "run/findings.jsonl")
    assert (first["id"], first["step"]) == ("missing_label_shift", 0)
    assert all(finding["evidence"]["causes"] == ["missing_label_shift"] for finding in others)
    verdict = json.loads((tmp_path / "run/run.json").read_text())["result"]["verdict"]
    assert verdict == "not to be trusted: missing_label_shift"


def test_labels_shifted_twice_are_named(write_config, tmp_path, monkeypatch):
    from recipe.data.collator import DataCollatorForPackedRows

    collate = DataCollatorForPackedRows.__call__

    def shifted(self, rows):
        batch = collate(self, rows)
        batch["labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch

    monkeypatch.setattr(DataCollatorForPackedRows, "__call__", shifted)
    assert run(["train", write_config()]) == 0
    assert [finding["id"] for finding in read_lines(tmp_path / "run/findings.jsonl")] == ["double_label_shift"]


# --- users mistakes


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"learning_rat": 1}, 2, "did you mean learning_rate"),
        ({"source": "nowhere/*.parquet"}, 2, "no such file"),
        ({"source": "hf://HuggingFaceFW/fineweb-edu/sample-10BT"}, 4, "--source docstrings"),
        ({"eval_skip": 5000}, 2, "has 300 documents"),
        ({"block_size": 128}, 2, "max_position_embeddings 64"),
        ({"num_lanes": 4, "dataloader_num_workers": 3}, 2, "would do"),
        ({"resume_from_checkpoint": "latest"}, 2, "holds no checkpoint"),
        ({"output_dir": "/proc/nowhere"}, 2, "cannot be written"),
        ({"use_liger_kernel": True}, 2, "liger-kernel"),
    ],
)
def test_a_mistake_is_one_message_and_the_right_code(write_config, capsys, changes, code, message):
    assert run(["train", write_config(**changes)]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_unknown_command_names_those_that_exist(capsys):
    assert run(["trian"]) == run(["launch"]) == 2
    error = capsys.readouterr().err
    assert "no command 'trian'; did you mean train?" in error
    names = "train, check, plan, verify-data, tokenize, report, new, generate, evaluate, compare, explain, trajectory"
    assert f"there are {names}" in error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_breaks_during_the_run_is_code_4_and_leaves_its_reason(write_config, tmp_path, capsys, num_workers):
    """Bytes flipped inside a page: the reader, in a worker or not, says which documents, without a traceback."""
    path = write_config(dataloader_num_workers=num_workers, eval_strategy="no", eval_steps=None, max_steps=200)
    file = tmp_path / "part-00.parquet"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    file.write_bytes(data)
    assert run(["train", path]) == 4
    error = capsys.readouterr().err
    assert "cannot read documents" in error and "Traceback" not in error
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 4
    assert "cannot read documents" in json.loads((tmp_path / "run/run.json").read_text())["failure"]


def test_a_full_disk_is_code_4(write_config, monkeypatch, capsys):
    from recipe.trainer import PretrainTrainer

    def full(self, *args, **kwargs):
        raise RuntimeError("Error while serializing: IoError(Os { code: 28, message: No space left on device })")

    monkeypatch.setattr(PretrainTrainer, "save_model", full)
    assert run(["train", write_config()]) == 4
    assert "the disk is full" in capsys.readouterr().err


def test_a_resumed_run_does_not_forget_what_was_found_before(write_config, tmp_path, monkeypatch):
    path = write_config()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "loss_function", unshifted)
        assert run(["train", path]) == 0
    remove_after(tmp_path / "run", step=3)
    assert run(["train", path, "--resume_from_checkpoint", "latest"]) == 0
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    # the weights are those that were saved, but the loss of the pinned batch is computed in another way now
    assert result["verdict"] == "not to be trusted: missing_label_shift, resume_jump"


def test_without_a_compiler_it_runs_uncompiled_and_says_so(write_config, monkeypatch, caplog):
    monkeypatch.setattr("recipe.train.why_not_compile", lambda: "no C++ compiler found")
    assert run(["train", write_config(torch_compile=True, eval_strategy="no", eval_steps=None)]) == 0
    assert "torch_compile is on but does not work here: no C++ compiler found; running uncompiled" in caplog.text


@pytest.mark.slow
def test_a_compiled_run_is_judged_and_silent(write_config, tmp_path):
    """The probe runs the eager modules beside the compiled model; takes a minute of compilation."""
    assert run(["train", write_config(torch_compile=True)]) == 0
    result = json.loads((tmp_path / "run/run.json").read_text())["result"]
    assert result["verdict_kind"] == "nothing_learned" and "missing_label_shift" in result["guards"]["judged"]


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt(), 130), (KeyboardInterrupt(signal.SIGTERM), 143)])
def test_a_signal_during_the_last_evaluation_leaves_its_own_code(write_config, tmp_path, monkeypatch, interrupt, code):
    def interrupted(trainer):
        raise interrupt

    monkeypatch.setattr("recipe.results.final_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["train", write_config()])
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == code


def test_interrupted_in_an_evaluation_it_goes_on_with_the_next_rows(trained, tmp_path, monkeypatch):
    path = trained
    (tmp_path / "run").rename(tmp_path / "whole")

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.received is None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("recipe.signals.SignalCallback.on_prediction_step", interrupt)
    assert run(["train", path]) == 143
    monkeypatch.undo()
    assert len(losses(tmp_path / "run")) < 6
    assert run(["train", path, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", "2"]) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_mixture_trains_resumes_and_is_counted_by_source(write_config, tmp_path, capsys):
    from conftest import document

    sources = [{"path": str(tmp_path / "part-*.parquet"), "weight": 3}]
    sources += [{"path": str(tmp_path / "b.jsonl"), "weight": 1, "eval_skip": 60, "text_column": "body"}]
    lines = [json.dumps({"body": document(i) * 20}) for i in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    path = write_config(source=sources, max_steps=8)
    assert run(["train", path, "--output_dir", str(tmp_path / "whole"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    first, second = result["tokens_by_source"].values()
    assert first + second == 32 * 32 and abs(first - 24 * 32) <= 2 * 32  # three to one, to a row or two

    more = ["--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-3"), "--output_dir", str(tmp_path / "whole")]
    before = losses(tmp_path / "whole")
    assert run(["train", path, *more]) == 0
    assert losses(tmp_path / "whole") == before

    sources[1]["weight"] = 2
    assert run(["train", write_config(source=sources, max_steps=8), *more]) == 2
    assert "source 1.weight: checkpoint 1, config 2" in capsys.readouterr().err


def test_another_stream_is_taken_up_when_the_user_says_so(trained, write_config, tmp_path, capsys, caplog):
    resume = ["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-3"), "--output_dir", str(tmp_path / "run")]
    assert run(["train", write_config(train_seed=7), *resume, "--on_changed_stream", "continue"]) == 0
    assert "documents may be missed or read twice" in caplog.text
    state = json.loads((tmp_path / "run/checkpoint-6/stream_state.json").read_text())
    assert state["position"]["rows"] == 24

    resume[1] = str(tmp_path / "run/checkpoint-3")
    assert run(["train", write_config(num_lanes=8), *resume, "--on_changed_stream", "continue"]) == 2
    assert "use --on_changed_stream restart" in capsys.readouterr().err
    assert run(["train", write_config(num_lanes=8), *resume, "--on_changed_stream", "restart"]) == 0
    state = json.loads((tmp_path / "run/checkpoint-6/stream_state.json").read_text())
    assert state["position"]["rows"] == 12 and len(state["position"]["lanes"][0]) == 8


def test_a_file_that_changed_since_the_checkpoint_is_named(write_config, write_parquet, tmp_path, capsys, caplog):
    from conftest import document

    path = write_config()
    assert run(["train", path]) == 0
    file = tmp_path / "part-00.parquet"
    resume = ["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-3")]
    os.utime(file, (1, 1))  # touched, the same content
    assert run(["train", path, *resume]) == 0
    assert "another date" in caplog.text

    write_parquet(0, texts=[document(i).replace("w1", "w2") for i in range(300)])  # as many bytes of text
    assert run(["train", path, *resume]) == 2
    assert "source 0.files.part-00.parquet.content: checkpoint" in capsys.readouterr().err


def test_when_the_data_fails_the_last_checkpoint_is_named(write_config, tmp_path, monkeypatch, capsys):
    read = Source.read_chunk

    def failing(source, chunk):
        if (tmp_path / "run/checkpoint-3").exists():
            raise DataError("part-00.parquet: gone; replace the file")
        return read(source, chunk)

    monkeypatch.setattr(Source, "read_chunk", failing)
    assert run(["train", write_config(max_steps=200, eval_strategy="no", eval_steps=None)]) == 4
    expected = "error: part-00.parquet: gone; replace the file; --resume_from_checkpoint latest then continues from"
    assert expected in capsys.readouterr().err
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 4


def test_an_older_checkpoint_goes_when_the_new_one_is_complete(write_config, tmp_path, monkeypatch):
    """With one checkpoint kept, a run killed between Trainer's saving and the stream's must still have the last."""

    def killed(staged, *facts):
        if step_of(staged) == 6:
            raise KeyboardInterrupt
        return commit(staged, *facts)

    monkeypatch.setattr("recipe.checkpoints.commit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(["train", write_config(save_total_limit=1)])
    monkeypatch.undo()
    assert choose("latest", tmp_path / "run").name == "checkpoint-3"
    resume = ["--resume_from_checkpoint", "latest"]
    assert run(["train", write_config(save_total_limit=1), *resume]) == 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


class DyingSource(Source):
    """Kills the worker that reads it."""

    def read_chunk(self, chunk):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read_chunk(chunk)


def test_a_killed_worker_is_a_data_error(write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("recipe.data.pipeline.open_source", lambda *given: DyingSource(**vars(open_source(*given))))
    assert run(["train", write_config(), "--dataloader_num_workers", "2"]) == 4
    error = capsys.readouterr().err
    assert "a data worker was killed" in error and "Traceback" not in error


def test_the_end_of_a_pass_on_another_rank_is_announced_at_the_next_checkpoint(write_config, tmp_path):
    config = parse_config(write_config(), ["--use_cpu", "true", "--bf16", "false"])
    loader, announced = build_data(config).loader, []
    guards = SimpleNamespace(begin_pass=lambda tokens, source, message: announced.append(source))
    callback = StreamCallback(loader, {}, guards)
    callback._announce(loader.position)
    assert announced == []
    merged = copy.deepcopy(loader.position)
    merged["lanes"][0][1]["pass"] = 1  # a lane that another rank reads
    for _ in range(2):
        callback._announce(merged)
    assert len(announced) == 1
    assert loader.position["is_exhausted"] == merged["is_exhausted"] == [True]
