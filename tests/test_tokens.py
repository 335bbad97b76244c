"""The guards that count tokens, on counts and on rows made by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from recipe.guards.batches import SCORED, VALID, SeenTokens, send_tokens
from recipe.guards.double_bos import DoubleBos, count_bos
from recipe.guards.eos import EosNeverTarget
from recipe.guards.padding import PaddingIsTarget, holes
from recipe.guards.run import Run, bos_token_id_of, tokenizer_sizes_of
from recipe.guards.token_range import TokenRange, chosen_eos_ids, occurring


def seen(rows, valid=True, scored=False):
    """Of equal rows; `valid` and `scored` of each position or of all."""
    ids = np.array(rows)
    return SeenTokens(ids, (VALID * np.broadcast_to(valid, ids.shape) + SCORED * np.broadcast_to(scored, ids.shape)))


def step_of(*tokens):
    return SimpleNamespace(of_ranks=lambda guard: [guard.measure_tokens(1, tokens)] if tokens else [])


def verdict(guard, *tokens):
    (only,) = guard.observe(step_of(*tokens))
    return only


def set_up(guard, **facts):
    guard = guard()
    guard.setup(SimpleNamespace(**{"world_size": 1, **facts}))
    return guard


# --- on counts


def test_ids_outside_of_the_embedding():
    assert TokenRange.judge(0, 99, rows=100) is None
    assert TokenRange.judge(0, 100, rows=100).severity == "error"
    assert TokenRange.judge(-200, 99, rows=100).severity == "warning"


def test_padding_among_the_targets():
    def judge(**changes):
        return PaddingIsTarget.judge(
            **{"targets": 9_000, "padding": 0, "hidden": 0, "rows": 0, "filled": 0, "holes": 0, **changes}
        )

    assert judge() is judge(targets=0) is judge(targets=2_000) is None
    assert judge(padding=99) is None
    assert judge(targets=10**6, padding=101) is None
    assert judge(padding=101).severity == "warning"
    assert judge(rows=300, filled=3) is judge(rows=1000, filled=9) is None
    assert "4 of 300 rows" in judge(rows=300, filled=4).found


def test_eos_that_is_never_a_target():
    enough = EosNeverTarget.MIN_SEEN
    assert EosNeverTarget.judge(tokens=10_000, in_text=100, scored=100) is None
    assert EosNeverTarget.judge(tokens=10_000, in_text=200, scored=100) is None  # prompts are masked
    assert EosNeverTarget.judge(tokens=0, in_text=0, scored=0) is None
    assert EosNeverTarget.judge(tokens=10_000, in_text=enough - 1, scored=0) is None
    assert EosNeverTarget.judge(tokens=10_000, in_text=enough, scored=0).severity == "warning"
    assert EosNeverTarget.judge(tokens=10_000, in_text=0, scored=0) is None
    assert EosNeverTarget.judge(tokens=2_000_000, in_text=0, scored=0).severity == "info"


def test_most_texts_begin_with_two_bos():
    enough = DoubleBos.MIN_TEXTS
    assert DoubleBos.judge(enough, enough).severity == "warning"
    assert DoubleBos.judge(enough - 1, enough - 1) is DoubleBos.judge(0, 0) is None
    assert DoubleBos.judge(enough, int(DoubleBos.MIN_SHARE * enough)) is None


# --- counting


def test_ids_are_kept_in_mind():
    guard = set_up(TokenRange, embedding_rows=100, eos_token_ids=())
    assert verdict(guard, seen([[1, 99]])) == guard.clear()
    assert verdict(guard, seen([[1, 2]]), seen([[1, 100]])).severity == "error"
    assert verdict(guard, seen([[1, 2]])).evidence == {"lowest": 0, "highest": 100, "embedding_rows": 100}
    assert list(guard.observe(step_of())) == []


def test_scored_padding_and_rows_of_one_token_are_counted():
    guard, length = set_up(PaddingIsTarget), PaddingIsTarget.FILLED_TOKENS
    known = {"padding": 0, "hidden": 0, "holes": 0}
    scored = np.arange(length) > 0
    text = np.arange(length) % 7
    verdict(guard, seen([text, [5] * length], scored=scored), seen([[5] * length], scored=scored & (text < 6)))
    assert guard.state == {"targets": 3 * (length - 1) - 9, "rows": 3, "filled": 1, **known}
    verdict(guard, seen([text], valid=text < 6, scored=scored), seen([[5] * 8], scored=True))
    assert guard.state == {"targets": 4 * (length - 1) - 1, "rows": 5, "filled": 1, **known, "padding": 9, "holes": 9}


def test_padding_is_known_by_its_token_where_there_is_no_mask():
    """The first of a row's last padding tokens may be an EOS that is scored; what is not scored is padding."""
    ids = torch.tensor([[5, 6, 0, 0, 0], [5, 0, 6, 7, 0], [5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    labels = ids.clone()
    labels[3, 3:] = -100

    def valid(pad, mask=None):
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return (send_tokens(inputs, pad).read().flags & VALID).tolist()

    assert valid(0) == [[1, 1, 1, 0, 0], [1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert valid(None) == [[1] * 5] * 4 == valid(0, torch.ones_like(ids))
    inputs = {"input_ids": ids, "labels": labels}
    assert PaddingIsTarget.count(send_tokens(inputs, 0).read())["padding"] == 2


@pytest.mark.parametrize(("tokenizer", "config", "pad"), [(3, 4, 3), (None, 4, 4), (None, None, None), (0, 4, 0)])
def test_the_pad_token_is_the_tokenizers_or_the_models(tokenizer, config, pad):
    own, model = SimpleNamespace(pad_token_id=tokenizer), SimpleNamespace(config=SimpleNamespace(pad_token_id=config))
    assert Run.pad_token_id.func(SimpleNamespace(tokenizer=own, model=model)) == pad


def test_eos_is_counted_in_the_text_and_among_the_targets():
    guard = set_up(EosNeverTarget, eos_token_ids=(3, 4), tokenizer=None)
    valid, scored = np.array([1, 1, 1, 1, 0, 0]), np.array([0, 1, 0, 1, 1, 0])
    verdict(guard, seen([[3, 3, 4, 7, 3, 3]], valid=valid != 0, scored=scored != 0))
    ends = {"rows": 1, "spelled": 0, "ends": [[3, 4, 7]]}
    assert guard.state == {"tokens": 4, "in_text": 2, "scored": 1, **ends}


WORDS = "The answer is short, and number {} ends here".format


@pytest.mark.parametrize(
    ("end", "is_found"),
    [
        (lambda row: "</s>", True),
        (lambda row: "<|endoftext|>", True),
        (lambda row: "; `</s>` is what a text ends with", False),  # a text about such tokens
        (lambda row: "<|im_end|>\n" if row % 2 else "", True),
        (lambda row: "", False),
        (lambda row: "</s>" if row % 5 == 0 else "", False),
        (lambda row: "<s> <|user|> </div> </span>", False),
    ],
)
@pytest.mark.parametrize("spaces", [str, " ".join])
def test_an_end_that_the_tokenizer_spells(tokenizer, end, is_found, spaces):
    guard = set_up(EosNeverTarget, eos_token_ids=(256,), tokenizer=tokenizer)
    texts = [WORDS(number) + spaces(end(number)) for number in range(24)]
    rows = tokenizer(texts, split_special_tokens=True)["input_ids"]
    found = [list(guard.observe(step_of(seen([row])))) for row in rows]
    assert (found[-1][0] != guard.clear()) == is_found and found[6] == [guard.clear()]
    assert not is_found or "its string ends" in found[-1][0].found
    verdict(guard, seen([[5, 256]], scored=True))
    assert guard.judge(**guard.state) is None  # EOS is there, and the text only tells of it


@pytest.mark.parametrize("name", ["llama-4k", "llama-32k"])
def test_tokenizers_of_the_recipe_spell_what_stands_in_a_text(name):
    """TRL appends the string of EOS to each text."""
    known = AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "tokenizer" / name)
    guard = set_up(EosNeverTarget, eos_token_ids=(known.eos_token_id,), tokenizer=known)
    assert guard.is_spelled(np.array(known("It ends.</s>")["input_ids"]))
    assert not guard.is_spelled(np.array(known("It ends.</s>", split_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize(
    ("ends", "padding", "is_found"),
    [([9, 8, 7], 2, True), ([9, 8, 7], 0, False), ([7, 7, 7], 2, False), ([], 2, False)],
)
def test_texts_without_eos_that_end_alike(ends, padding, is_found):
    guard, texts = set_up(EosNeverTarget, eos_token_ids=(3,), tokenizer=None), np.random.default_rng(0)
    for _ in range(EosNeverTarget.MIN_SEEN):
        row = [*texts.integers(10, 60, 20).tolist(), *ends]
        found = verdict(guard, seen([row + [0] * padding], valid=np.arange(len(row) + padding) < len(row)))
    assert (found != guard.clear()) == is_found


@pytest.mark.parametrize(
    ("row", "texts", "doubled"),
    [
        ([1, 1, 7, 8, 9], 1, 1),
        ([7, 1, 1, 8, 1, 1, 9], 2, 2),  # packed
        ([1, 7, 8, 1, 9, 9], 2, 0),
        ([1, 1, 1, 7, 7, 7], 1, 0),  # no template does this; an ordinary token may
        ([7, 7, 7, 1, 1], 0, 0),  # the row ends too soon to tell
        ([7, 7], 0, 0),
    ],
)
def test_texts_that_begin_with_bos_are_counted(row, texts, doubled):
    guard = set_up(DoubleBos, bos_token_id=1)
    verdict(guard, seen([row]))
    assert guard.state == {"texts": texts, "doubled": doubled}
    verdict(guard, seen([[1, 1, 1, 1, 5, 6]], valid=np.array([0, 0, 1, 1, 1, 1]) != 0))  # padded on the left, by BOS
    assert guard.state == {"texts": texts + 1, "doubled": doubled + 1}


@pytest.mark.parametrize(("begin", "is_found"), [([9, 9], True), ([9], False), ([9, 9, 9], False), ([], False)])
def test_rows_that_begin_with_a_token_twice_are_found_without_a_known_bos(begin, is_found):
    guard, texts = set_up(DoubleBos, bos_token_id=None), np.random.default_rng(0).integers(10, 60, (6, 4, 16))
    found = [list(guard.observe(step_of(seen([[*begin, *row] for row in rows.tolist()])))) for rows in texts]
    assert [bool(each) for each in found] == [is_found and number >= 3 for number in range(6)]


@pytest.mark.parametrize("tokens", [3, 64])
def test_an_ordinary_token_taken_for_bos_is_silent(tokens):
    guard, ids = set_up(DoubleBos, bos_token_id=1), np.random.default_rng(0).integers(tokens, size=(500, 8, 32))
    assert all(verdict(guard, seen(rows)) == guard.clear() for rows in ids)
    assert guard.state["texts"] > DoubleBos.MIN_TEXTS and count_bos(ids[0] == 1)[0] < guard.state["texts"]


# --- facts


def test_bos_is_the_tokenizers_or_the_configs_unless_it_ends_documents_or_pads():
    def bos(tokenizer, **config):
        return bos_token_id_of(SimpleNamespace(config=SimpleNamespace(**config)), tokenizer)

    tokenizer = SimpleNamespace(bos_token_id=5, eos_token_id=6, pad_token_id=None)
    assert bos(tokenizer, bos_token_id=1) == bos(SimpleNamespace(tokenizer=tokenizer)) == 5
    assert bos(None, bos_token_id=1) == bos(SimpleNamespace(bos_token_id=None), bos_token_id=1) == 1
    for config in ({"eos_token_id": [5, 7]}, {"pad_token_id": 5}):
        assert bos(tokenizer, **config) is None
    assert bos(None) is bos(object(), bos_token_id=None) is bos_token_id_of(object(), None) is None


class Vocabulary:
    vocab_size = 100

    def __len__(self):
        return 104


@pytest.mark.parametrize(
    ("rows", "severity"), [(99, "warning"), (100, "info"), (103, "info"), (104, None), (128, None)]
)
def test_a_tokenizer_larger_than_the_embedding(rows, severity):
    for processor in (Vocabulary(), SimpleNamespace(tokenizer=Vocabulary())):
        finding = TokenRange.judge_sizes(*tokenizer_sizes_of(processor), rows)
        assert (finding and finding.severity) == severity


def test_an_eos_beyond_the_embedding():
    def judge(config):
        return TokenRange.judge_eos(chosen_eos_ids(SimpleNamespace(config=config)), rows=config.vocab_size)

    assert judge(LlamaConfig(vocab_size=480, eos_token_id=511)).severity == "warning"
    assert judge(LlamaConfig(vocab_size=480, eos_token_id=[5, 511])) is None
    assert judge(LlamaConfig(vocab_size=480, eos_token_id=None)) is judge(LlamaConfig(vocab_size=480)) is None
    assert judge(GPT2Config(vocab_size=480)) is None  # its default is 50,256
    assert chosen_eos_ids(torch.nn.Linear(1, 1)) == []


def test_an_eos_that_a_byte_does_not_hold():
    def judge(ids, tokens=20_000, eos=256):
        return TokenRange.judge_wrapped(occurring([np.array(ids)], 300), tokens, [eos])

    assert judge([0, 32, 97]).severity == "warning" and judge([1, 32], eos=257).severity == "warning"
    assert judge([32, 97]) is judge([0, 32, 256]) is judge([0, 32], tokens=9) is judge([0, 32], eos=2) is None
    assert judge([0, 65]) is judge(range(64)) is None  # no text


def test_holes_in_the_mask():
    valid = np.array([[0, 0, 1, 0, 1, 1, 0], [1, 0, 1, 0, 0, 1, 1], [0] * 7, [1] * 7], bool)
    assert holes(SeenTokens(np.zeros((4, 7), int), VALID * valid)) == 1 + 2
    assert holes(SeenTokens(np.arange(28).reshape(4, 7), VALID * valid)) == 0  # different tokens: hidden on purpose
    assert PaddingIsTarget.judge_holes(rows=8, holes=31) is PaddingIsTarget.judge_holes(rows=3, holes=90) is None
    assert PaddingIsTarget.judge_holes(rows=8, holes=40).id == "padding_attended"


def test_padding_of_an_evaluation():
    assert PaddingIsTarget.judge_eval(9_000, 99) is None
    assert PaddingIsTarget.judge_eval(10**6, 101) is None
    assert "900 of 2,000" in PaddingIsTarget.judge_eval(2_000, 900).found


def test_what_is_no_tokenizer_has_no_size():
    others = (
        None,
        object(),
        SimpleNamespace(vocab_size=3),
        SimpleNamespace(vocab_size="all"),
        SimpleNamespace(size=3),
    )
    assert [tokenizer_sizes_of(other) for other in others] == [None] * len(others)


# --- ids that were rounded or cut on the way

ZIPF = np.minimum(np.random.default_rng(0).zipf(1.2, 60_000), 3999)
LARGE = np.minimum(np.random.default_rng(0).zipf(1.05, 400_000), 151_000)


def rounded(kind: torch.dtype) -> np.ndarray:
    return torch.from_numpy(ZIPF).to(kind).long().numpy()


@pytest.mark.parametrize(
    ("ids", "rows", "cause"),
    [
        (rounded(torch.float16), 4001, "cast to float16"),
        (rounded(torch.bfloat16), 4001, "cast to bfloat16"),
        (ZIPF % 256, 1024, "stored in uint8"),
        (LARGE % 65_536, 151_936, "stored in uint16"),
    ],
)
def test_ids_that_lost_bits_are_found(ids, rows, cause):
    finding = TokenRange.judge_kinds(occurring([ids], rows))
    assert finding.severity == "warning" and cause in finding.likely_causes[0]


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        (ZIPF, 4001),
        (LARGE, 151_936),
        (ZIPF // 2 * 2, 4001),  # even ones by design
        (np.arange(5000), 151_936),  # a few of many
        (np.arange(256), 257),  # bytes, as the vocabulary says
        (np.frombuffer("bytes of text: äöü".encode() * 9, np.uint8).astype(np.int64), 512),
        (np.arange(65_000), 65_536),
    ],
)
def test_ids_that_lost_none_are_silent(ids, rows):
    assert TokenRange.judge_kinds(occurring([ids], rows)) is None
