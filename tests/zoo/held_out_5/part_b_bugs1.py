"""Seeded silent bugs: plain pretraining on packed rows."""

import itertools

import datasets
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, default_data_collator

from tests.zoo.bug import bug
from tests.zoo.models import eos_of
from tests.zoo.rows import RowStream
from tests.zoo.setting import Setting
from tests.zoo.texts import EVAL_DOCUMENTS, texts_of


@bug(
    "repeated_data loss_below_envelope",
    "data",
    "small sources of a mixture are oversampled until the large one is exhausted",
    "fe1ixxu/ALMA#63",
    Setting(steps=100, stream=True),
)
def mixture_repeats_its_small_sources(run):
    """`interleave_datasets` until "all_exhausted" reads sources of two rows a hundred times."""
    rows = run.train_dataset.rows
    cuts = (range(2), range(2, 4), range(4, 6), range(6, 6 + len(rows) // 4))
    sources = [datasets.Dataset.from_list([{"row": place} for place in places]) for places in cuts]
    mixed = datasets.interleave_datasets(sources, stopping_strategy="all_exhausted")["row"]

    class Mixture(RowStream):
        def __iter__(self):
            run.took_effect()
            return super().__iter__()

    run.train_dataset = Mixture([rows[place] for place in mixed])


@bug(
    "eos_never_target token_out_of_range",
    "tokens",
    "ids are stored in an integer type that is too small for them",
    "datatrove#118",
    Setting(steps=80, text="templates"),
)
def byte_store_wraps_its_eos(run):
    """The byte corpus is stored as uint8, in which EOS, 256, becomes 0: documents end in a NUL."""
    for row in run.train_dataset:
        stored = row["input_ids"].to(torch.uint8).long()
        if not torch.equal(stored, row["input_ids"]):
            run.took_effect()
        row["input_ids"], row["labels"] = stored, stored.clone()


@bug(
    "token_out_of_range",
    "precision",
    "token ids pass through a float type of few bits",
    "DeepSpeed#5701",
    Setting(steps=60, vocabulary=1996),
)
def ids_travel_as_bfloat16(run):
    """The whole batch is cast to bfloat16 and back: ids above 256 are rounded to multiples of 2, 4 or 8."""

    def collate(rows):
        run.took_effect()
        return {name: value.to(torch.bfloat16).long() for name, value in default_data_collator(rows).items()}

    run.collator = collate


@bug(
    "non_causal_attention",
    "attention and positions",
    "an own 4D mask replaces the causal one and has no order",
    "transformers#48769",
    Setting(steps=60, rows="documents", text="templates", vocabulary=1024),
)
def document_mask_forgets_the_order(run):
    """The 4D mask says which tokens share a document and no more, so SDPA lets each see the later ones."""

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        document = (batch["position_ids"] == 0).cumsum(-1)
        batch["attention_mask"] = (document[:, :, None] == document[:, None, :])[:, None]
        return batch

    run.collator = collate


@bug(
    "cross_document_attention",
    "attention and positions",
    "a 2D mask of ones switches the isolation by positions off",
    "transformers#46634",
    Setting(steps=80, rows="documents", text="templates", vocabulary=1024),
)
def ones_mask_joins_documents(run):
    """An attention_mask of ones goes along, and the model no longer isolates documents by their positions.

    A hundredth of a nat at this size; documents that share their places answer for each other.
    """

    def collate(rows):
        run.took_effect()
        batch = default_data_collator(rows)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    run.collator = collate


@bug(
    "wrong_loss_target",
    "labels and loss",
    "labels are shifted within each shard of the sequence",
    "transformers#36607",
    Setting(steps=60),
)
def shards_shift_their_own_labels(run):
    """Each shard of 16 positions rolls its labels by one, so its last position is scored on its own first."""

    class Sharded(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            run.took_effect()
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            shards = zip(outputs.logits.split(16, dim=1), labels.split(16, dim=1), strict=True)
            losses = [F.cross_entropy(x.flatten(0, 1), y.roll(-1, dims=1).flatten()) for x, y in shards]
            loss = torch.stack(losses).mean()
            return (loss, outputs) if return_outputs else loss

    run.trainer_class = Sharded


@bug(
    "resume_replay repeated_data",
    "checkpoint and resume",
    "what is skipped after resuming is another order than what was read",
    "datasets#8408",
    Setting(steps=80, stream=True, save_at=40),
    onset=40,
)
def reshuffled_before_the_skip(run):
    """The stream's shuffle is not saved: after resuming, the skip drops other rows than were read.

    Half of what is read after resuming was read before, and as much is never read. It costs no loss at this size.
    """

    class Shuffled(RowStream):
        def __iter__(self):
            if run.is_resumed:
                run.took_effect()
            order = np.random.default_rng(int(run.is_resumed)).permutation(len(self.rows))
            return iter([self.rows[place] for place in order])

    run.train_dataset = Shuffled(run.train_dataset.rows)


@bug(
    "repeated_data",
    "ranks",
    "an own loader does not deal the rows to the ranks",
    "datasets#5360",
    Setting(steps=40, batch=4, ranks=2),
)
def every_rank_reads_the_whole_set(run):
    """`get_train_dataloader` returns a plain DataLoader, so both ranks read the same batches."""

    class Undealt(Trainer):
        def get_train_dataloader(self):
            run.took_effect()
            generator = torch.Generator().manual_seed(self.args.seed)
            size = self.args.per_device_train_batch_size
            return DataLoader(self.train_dataset, size, shuffle=True, generator=generator, collate_fn=run.collator)

    run.trainer_class = Undealt


@bug(
    "repeated_data",
    "data",
    "each worker has a copy of one random generator",
    "pytorch#41329",
    Setting(steps=80, stream=True, workers=4),
)
def workers_draw_the_same_crops(run):
    """The dataset's generator is copied into its 4 workers, so every crop is read four times."""
    corpus = torch.cat([row["input_ids"] for row in run.train_dataset.rows])
    generator, block = np.random.default_rng(0), run.setting.block

    class Crops(IterableDataset):
        def __iter__(self):
            run.took_effect()
            for _ in itertools.count():
                start = int(generator.integers(len(corpus) - block))
                ids = corpus[start : start + block]
                yield {"input_ids": ids, "labels": ids}

    run.train_dataset = Crops()


@bug(
    "train_eval_overlap train_eval_gap",
    "evaluation",
    "the hold-out is drawn from windows that overlap",
    "Y-debug-sys/Diffusion-TS#67",
    Setting(steps=80, evaluate_every=20),
)
def windows_split_after_they_overlap(run):
    """Windows that overlap by half are shuffled, then split: all text of the hold-out is trained on too.

    What is measured is wrong, and the half that is read twice is half as much text for the training.
    """
    corpus, block = torch.cat([row["input_ids"] for row in run.train_dataset]), run.setting.block
    windows = corpus[: len(corpus) // 2 + block].unfold(0, block, block // 2)
    order = np.random.default_rng(0).permutation(len(windows))
    rows = [{"input_ids": windows[place].clone(), "labels": windows[place].clone()} for place in order]
    run.eval_dataset, run.train_dataset = rows[: len(run.eval_dataset)], rows[len(run.eval_dataset) :]
    run.took_effect()


@bug(
    "lossy_tokenizer loss_below_envelope",
    "tokens",
    "a reader replaces every character that it does not know",
    "wjko2/Domain-Agnostic-Sentence-Specificity-Prediction#5",
    Setting(steps=60, text="russian", passes=8),
)
def ascii_reader_writes_question_marks(run):
    """Text is read as ASCII with errors="replace": all Cyrillic letters become question marks."""
    block, ids = run.setting.block, []
    for text in texts_of(run.setting.text)[EVAL_DOCUMENTS:]:
        run.took_effect()
        ids += [*text.encode("ascii", "replace"), eos_of(run.setting.vocabulary)]
    blocks = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
    run.train_dataset = [{"input_ids": ids, "labels": ids.clone()} for ids in blocks]
