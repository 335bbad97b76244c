"""The shipped tokenizers say what SentencePiece says, lose no text, and take no special token from the text itself."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tokenizer" / "train_tokenizer.py"
SIZES = {"llama-32k": 32_000, "llama-4k": 4_096}


def load_script(path: Path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


script = load_script(SCRIPT)
compare = load_script(ROOT / "tokenizer" / "compare.py")
TEXTS = (
    *script.HARD_TEXTS,
    SCRIPT.read_text(encoding="utf-8"),
    "class Fields:\n    '''</s> and <s>.'''\n\n\n    x = 12345.678e-9\n",
    "x" * 5000,
    " " * 100 + "y" + "\n" * 50 + "\t" * 9,
    "日本語" * 200,
)
SPECIALS_IN_TEXT = ["</s>", "<s>", "<unk>", "a</s>b", "end.</s>", "<s> begin", "pass</s>", "</s></s>", "\n</s>\n"]


@pytest.fixture(scope="module", params=sorted(SIZES))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name):
    return AutoTokenizer.from_pretrained(ROOT / "tokenizer" / name)


@pytest.fixture(scope="module")
def reference(name):
    return sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tokenizer" / name / "tokenizer.model"))


def test_sizes_and_specials(name, tokenizer, reference):
    assert len(tokenizer) == tokenizer.vocab_size == reference.vocab_size() == SIZES[name]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        None,
    )
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 1_000_000
    assert [tokenizer.convert_ids_to_tokens(id) for id in range(len(tokenizer))] == [
        reference.id_to_piece(id) for id in range(len(tokenizer))
    ]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_sentencepieces_and_the_text_comes_back(text, tokenizer, reference):
    ids = tokenizer(text)["input_ids"]
    assert ids == reference.encode(text) == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=script.SPACE_MARK), max_size=60))
def test_any_text_comes_back(text, tokenizer, reference):
    ids = tokenizer(text)["input_ids"]
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


FRAGMENTS = st.sampled_from(
    [
        "</s>",
        "<s>",
        "</",
        "s>",
        "<unk>",
        "<0x0A>",
        "<0x",
        "\n",
        "\n\n",
        "  ",
        " ",
        "\t",
        "\r",
        ".",
        "def",
        "7",
        "é",
        "🤗",
        ">",
    ]
)


@settings(max_examples=300)
@given(text=st.lists(FRAGMENTS, max_size=20).map("".join))
def test_any_mixture_of_markup_and_space_comes_back(text, tokenizer, reference):
    ids = tokenizer(text)["input_ids"]
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_the_space_mark_is_the_one_character_that_is_lost(tokenizer):
    assert tokenizer.decode(tokenizer("a\u2581b")["input_ids"]) == "a b"


@pytest.mark.parametrize("text", SPECIALS_IN_TEXT)
def test_special_tokens_written_in_a_document_are_text(text, tokenizer):
    for ids in (tokenizer(text)["input_ids"], tokenizer([text, "x"])["input_ids"][0], tokenizer.encode(text)):
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_byte_tokens_written_in_a_document_are_text(tokenizer):
    byte_a = tokenizer.convert_tokens_to_ids("<0x41>")
    assert byte_a == 3 + 0x41
    assert byte_a not in tokenizer("<0x41>")["input_ids"]
    assert tokenizer.decode([byte_a]) == "A"


def test_nothing_is_added_to_a_document_and_eos_is_skipped_on_decoding(tokenizer):
    ids = tokenizer("A document.")["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([*ids, 2], skip_special_tokens=True) == "A document."
    assert tokenizer.decode([*ids, 2]) == "A document.</s>"


def test_no_merge_makes_a_special_or_byte_piece_of_text(name, tokenizer):
    backend = json.loads((ROOT / "tokenizer" / name / "tokenizer.json").read_text(encoding="utf-8"))
    reserved = set(tokenizer.convert_ids_to_tokens(list(range(3 + 256))))
    assert {"</s>", "<0x41>"} < reserved
    assert [merge for merge in backend["model"]["merges"] if "".join(merge) in reserved] == []


def test_digits_are_split(tokenizer):
    assert tokenizer.tokenize("1234567890") == list("1234567890")
    assert not [
        piece for piece in tokenizer.get_vocab() if sum(map(str.isdigit, piece)) > 1 and not piece.startswith("<0x")
    ]


def test_no_piece_joins_two_lines(tokenizer):
    joined = [piece for piece in tokenizer.get_vocab() if "\n" in piece.rstrip("\n")]
    assert joined == []
    assert {"\n", "\n\n", ".\n\n"} <= set(tokenizer.get_vocab())


def test_long_documents_give_no_warning(tokenizer, capfd):
    tokenizer("word " * 5_000)
    assert "longer than" not in capfd.readouterr().err


def test_a_saved_copy_keeps_ids_and_settings(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    assert [copy(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert not {0, 1, 2} & set(copy("</s>")["input_ids"])
    assert (copy.eos_token_id, copy.model_max_length) == (2, 1_000_000)


def test_no_setting_of_this_machine_is_shipped(name):
    folder = ROOT / "tokenizer" / name
    assert {path.name for path in folder.iterdir()} == set(script.FILES)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == script.CONFIG
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_500_000


def test_a_model_folder_loads_and_generates(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    generate = pipeline(
        "text-generation", model=AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer=loaded, device="cpu"
    )
    text = generate("Once\n  upon </s> a time", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once\n  upon </s> a time")


# --- the script ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    # Its own sources: words, code, markup; the pieces "</" and "s>" would merge to "</s>" in a naive conversion.
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    documents = [
        SCRIPT.read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
        "</a </b xs> ys> zs> qs> </s> 1997\n" * 300,
    ]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    assert script.main([str(folder), "--vocab_size", "700", "--input", str(corpus)]) == 0
    return folder


def test_training_is_deterministic(corpus, trained, tmp_path):
    assert script.main([str(tmp_path), "--vocab_size", "700", "--input", str(corpus)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(script.FILES)
    for file in script.FILES:
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes()


def test_markup_in_the_corpus_makes_no_special_token(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert not {0, 1, 2} & set(tokenizer("</s> xs></s> </s")["input_ids"])


def test_numbers_in_the_corpus_make_no_piece(trained):
    assert AutoTokenizer.from_pretrained(trained).tokenize(" 1997") == ["▁", "1", "9", "9", "7"]


def test_a_conversion_that_differs_is_refused(trained, tmp_path):
    # Without add_prefix_space false, transformers puts a space before the text and nothing warns.
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(RuntimeError, match="differ from SentencePiece"):
        script.check_tokenizer(tmp_path, ["a text"])


def test_special_tokens_in_text_are_refused_without_the_setting(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**script.CONFIG, "split_special_tokens": False}))
    with pytest.raises(RuntimeError, match="differ from SentencePiece"):
        script.check_tokenizer(tmp_path, ["a</s>b"])


def test_long_lines_are_learned_too(tmp_path):
    # One line of about 60 KB, which SentencePiece would drop without a word.
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "zyzzyva quokka " * 4000}), encoding="utf-8")
    assert script.main([str(tmp_path / "out"), "--vocab_size", "290", "--input", str(tmp_path / "long.jsonl")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize(" zyzzyva quokka") == ["▁zyzzyva", "▁quokka"]


@pytest.mark.parametrize("text", [*TEXTS, "a" * 2500 + " b\n", "word " * 900 + "\n\nx"], ids=range(len(TEXTS) + 2))
def test_lines_lose_nothing_and_fit(text):
    lines = list(script.read_lines([text]))
    assert "".join(line.removesuffix(" ") for line in lines) == text
    assert all(len(line.encode()) <= 4192 for line in lines)


def test_held_out_documents_are_not_read(tmp_path):
    documents = ["alpha beta gamma delta\n" * 20] * 9 + ["quizzical\n" * 500]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8"
    )
    arguments = ["--vocab_size", "285", "--input", str(tmp_path / "c.jsonl")]
    assert script.main([str(tmp_path / "all"), *arguments]) == 0
    assert script.main([str(tmp_path / "held"), *arguments, "--hold_out", "1"]) == 0
    assert "z" in AutoTokenizer.from_pretrained(tmp_path / "all").get_vocab()
    assert "z" not in AutoTokenizer.from_pretrained(tmp_path / "held").get_vocab()


def test_a_missing_input_is_the_users_mistake(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        str(tmp_path / "out"),
        "--vocab_size",
        "300",
        "--input",
        str(tmp_path / "none.txt"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "none.txt" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", "9000"], "fill only"),
        (["--vocab_size", "100"], "need"),
        (["--vocab_size", "0"], "cannot train"),
        (["--vocab_size", "300", "--hold_out", "1"], "leave some"),
        (["--vocab_size", "300", "--hold_out", "-1"], "--hold_out -1"),
    ],
)
def test_sizes_that_cannot_be_are_the_users_mistake(arguments, message, tmp_path, capsys):
    (tmp_path / "c.txt").write_text("a few words, a few more words")
    assert script.main([str(tmp_path / "out"), *arguments, "--input", str(tmp_path / "c.txt")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unusable_paths(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("a few words, a few more words")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    train = ["--vocab_size", "280", "--input"]
    assert script.main([str(tmp_path / "c.txt"), *train, str(tmp_path / "c.txt")]) == 2
    assert script.main([str(tmp_path / "c.txt" / "under"), *train, str(tmp_path / "c.txt")]) == 2
    assert script.main([str(tmp_path), *train, str(tmp_path / "c.txt")]) == 2
    assert script.main([str(tmp_path / "out"), *train, str(tmp_path / "empty.txt")]) == 2
    assert script.main([str(tmp_path / "out"), *train, str(tmp_path / "torn.parquet")]) == 4
    errors = capsys.readouterr().err.splitlines()
    assert [
        part in error
        for part, error in zip(
            ("is a file", "cannot write", "other files", "no text", "torn.parquet"), errors, strict=True
        )
    ] == [True] * 5


# --- the comparison ---


def test_compare_counts_bytes_per_token(tmp_path, capsys, tokenizer, name):
    text = "Bytes per token,\nfor example: é.\n"
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    (tmp_path / "b.py").write_text("not read", encoding="utf-8")
    folder = ROOT / "tokenizer" / name
    paths = [str(folder), str(folder / "tokenizer.model")]
    assert compare.main(["--tokenizers", *paths, "--texts", f"code={tmp_path}/[a]*.py"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert f"code ({len(text.encode())} B)" in header
    expected = f"{len(text.encode()) / len(tokenizer(text)['input_ids']):.2f}"
    assert [row.split("|")[2].strip() for row in rows] == [expected] * 2


def test_compare_names_what_is_missing(tmp_path, capsys):
    assert compare.main(["--tokenizers", str(tmp_path)]) == 2
    assert compare.main(["--tokenizers", str(tmp_path), "--texts", f"x={tmp_path}/*.py"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no tokenizer there" in errors[0] and "no such file" in errors[1]
