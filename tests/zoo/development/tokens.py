"""Token ids, EOS and padding."""

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.zoo.bug import bug
from tests.zoo.development.labels import PADDED, change_batch
from tests.zoo.models import EOS, eos_of, make_model
from tests.zoo.rows import IGNORED, make_rows
from tests.zoo.run import Run
from tests.zoo.setting import Setting

AREA = "tokens"
DOCUMENTS = Setting(vocabulary=4096, block=256, batch=4)  # about one end of a document in each second row
SMALL_VOCABULARY = Setting(vocabulary=512)


def knows_tokenizer(run: Run, normalizer=None) -> None:
    """The Trainer is given the tokenizer of the rows: bytes, and `</s>`."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(BPE(letters | {"</s>": EOS}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder, tokenizer.normalizer = decoders.ByteLevel(), normalizer or normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    run.on_trainer.append(lambda trainer: setattr(trainer, "processing_class", tokenizer))


def tells_of_ends(run: Run) -> None:
    """No row holds EOS, and the string of an end token stands in the text of every second one."""
    knows_tokenizer(run)
    for row in run.train_dataset:
        row["input_ids"] = row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == EOS, ord("."))
    for row in run.train_dataset[::2]:
        row["input_ids"][60:64] = END


def uncased(run: Run) -> None:
    """A model that was trained before, with its own tokenizer, which lower-cases."""
    knows_tokenizer(run, normalizers.Lowercase())
    run.model.name_or_path = "an uncased model"


TOKENIZER = Setting(steps=60, change=knows_tokenizer)
PADDED_TOKENIZER = TOKENIZER.changed(rows="padded")
END = torch.tensor(list(b"</s>"))


@bug("eos_never_target", AREA, "pad token is EOS", "transformers#23530", DOCUMENTS)
def pad_is_eos(run: Run):
    """The pad token is EOS, and the collator masks every label that equals it."""
    eos = eos_of(run.setting.vocabulary)
    change_batch(run, lambda batch: batch["labels"].masked_fill_(batch["labels"] == eos, IGNORED))


@bug("eos_never_target", AREA, "no EOS between documents", "torchtitan#3279", DOCUMENTS)
def eos_never_added(run: Run):
    """Documents are packed one after another without EOS."""
    rows = make_rows(run.setting.changed(steps=run.setting.steps + 10))
    ids = torch.cat([row["input_ids"] for row in rows])
    ids = ids[ids != eos_of(run.setting.vocabulary)]
    blocks = ids[: run.setting.num_rows * run.setting.block].reshape(-1, run.setting.block)
    run.train_dataset = [{"input_ids": block, "labels": block.clone()} for block in blocks]
    run.took_effect()


@bug("token_out_of_range", AREA, "ids taken modulo the vocabulary", "mlfoundations/open_lm#77", SMALL_VOCABULARY)
def ids_modulo_vocabulary(run: Run):
    """The model has 480 embeddings for a tokenizer of 512; ids beyond them come round to others by a modulo."""
    run.model = make_model(run.setting.changed(vocabulary=480))
    run.model.config.eos_token_id = eos_of(run.setting.vocabulary)
    change_batch(run, lambda batch: batch.update({name: batch[name] % 480 for name in ("input_ids", "labels")}))


@bug("padding_is_target eos_never_target", AREA, "wrong id taken for padding", "open_clip PR #316", PADDED)
def wrong_pad_id(run: Run):
    """Labels are masked where they equal EOS, which is not what rows are padded with."""
    change_batch(run, lambda b: b.update(labels=b["input_ids"].masked_fill(b["input_ids"] == EOS, IGNORED)))


@bug("lossy_tokenizer", AREA, "text lower-cased by default", "transformers#3823", TOKENIZER)
def tokenizer_lower_cases(run: Run):
    """The tokenizer has the normalizer of BERT, which lower-cases by default."""
    knows_tokenizer(run, normalizers.BertNormalizer(handle_chinese_chars=False))
    for row in run.train_dataset:
        run.took_effect()
        ids = row["input_ids"]
        row["input_ids"] = row["labels"] = torch.where((ids >= ord("A")) & (ids <= ord("Z")), ids + 32, ids)


@bug("lossy_tokenizer", AREA, "white space normalised away", "google/sentencepiece#101", TOKENIZER)
def tokenizer_makes_spaces_of_newlines(run: Run):
    """The tokenizer has a normalizer that makes one space of all white space."""
    knows_tokenizer(run, normalizers.Replace(Regex(r"\s+"), " "))
    rows = make_rows(run.setting.changed(steps=2 * run.setting.steps))
    text = torch.cat([row["input_ids"] for row in rows])
    text = text.where(text != ord("\n"), ord(" "))
    text = text[(text != ord(" ")) | (text.roll(1) != ord(" "))]
    for row, ids in zip(run.train_dataset, text.split(run.setting.block), strict=False):
        run.took_effect()
        row["input_ids"], row["labels"] = ids, ids.clone()


@bug("eos_never_target", AREA, "special tokens are encoded as plain text", "transformers#31362", PADDED_TOKENIZER)
def end_split_by_a_known_tokenizer(run: Run):
    """Texts end in `</s>`, which is encoded as four characters (`split_special_tokens`)."""
    for row in run.train_dataset:
        end = int(row["attention_mask"].sum()) - 1
        room = min(len(END), run.setting.block - end)
        row["input_ids"][end : end + room] = row["labels"][end : end + room] = END[:room]
        row["attention_mask"][end : end + room] = 1
        run.took_effect()


HEALTHY = {
    "a tokenizer that is known, in text about end tokens": TOKENIZER.changed(change=tells_of_ends),
    "a trained model with an uncased tokenizer": TOKENIZER.changed(change=uncased),
}
