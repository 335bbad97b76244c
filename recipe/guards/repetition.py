"""Text that comes twice: in training, after a resume, in training and evaluation."""

import logging
import math
import time
from collections.abc import Iterator, Sized

import numpy as np
from transformers import Trainer

from recipe.guards import ledger, sandbox
from recipe.guards.batches import SeenTokens, scored_part, send_tokens
from recipe.guards.copies import least_tokens
from recipe.guards.fingerprints import PLACE, Fingerprints, Rates, fingerprint
from recipe.guards.guard import PROBE, CannotJudge, Finding, Guard, NotApplicable, Skip, Verdict
from recipe.guards.ledger import Ledger
from recipe.guards.train_set import TrainSet, knows_passes
from recipe.internals import samplers_of

logger = logging.getLogger("recipe.guards")

REPEATED, REPLAYED, OVERLAP = "repeated_data", "resume_replay", "train_eval_overlap"
# Rows of each eval set that are read before step 1, and for how long. Chosen, not measured: 2 % of a set is reported,
# which a thousand rows show.
EVAL_ROWS, EVAL_SECONDS = 1024, 2.0


class Repetition(Guard):
    """Training reads the same text again, or text of the evaluation.

    When: before step 1 on packed rows of a list or a `datasets.Dataset` (its first 2M tokens, read for at most a
        second), then at every step. Repetition: from 64 rows and 16,384 tokens on; a replay: from 16 rows after a
        resume on; eval rows: from step 1 on where the eval set can be indexed (its first 1,024 rows, read for at most
        2 seconds), else from the first evaluation on, for training before and after it.
    Measured (repeated_data): windows of 64 tokens of all ranks at any alignment, one in 16 kept (fewer from 67M tokens
        on, and of steps of more than 65,536), and whole rows, without masked prompts. Of the last 512 rows or 131,072
        tokens, a tenth copied is information, a quarter a warning: two workers that read the same give half, a stream
        that begins again all, natural corpora 0.8 to 7 % (RealNews 19 %). Also a warning: whole packed rows that come
        twice within 16 micro-steps, 8 of them or more, 2 % of the tokens, over half of the stretch; at any distance 4
        %, where a token tells 1.0 nats or more. After a declared pass only copies from within a tenth of a pass count:
        30 %. The evidence names step, rank and micro-step of both copies. Shared text (system prompts, several answers
        to one prompt, templates) does not count: it begins where it began earlier, at the same place of its row or
        after an EOS, and its row or document ends in a new way; or 5 recent rows have it beside new text, wherever it
        stands. Where the sampler draws with replacement, copies are information.
        Of the training set itself, a warning: rows of which most begin with a quarter or more of the row before (a
        tenth: information); a part of 4 % and more, 8 rows and 4 documents at least, that is in the set twice in one
        order; a pass that draws the same part of the set, in the same irregular order, as the pass before
        (information where neither sampler nor dataset has `epoch` or `set_epoch`).
    Measured (resume_replay): half or more of the tokens since the resume are copies, and were not before it.
    Measured (train_eval_overlap): eval rows of which more than half was in training, at any alignment. 2 rows and 2 %
        of them are a warning, 20 % an error: natural corpora hold near-copies of 0.7 to 5 % (RealNews 14 %). Sets with
        "train" in their name are left out.
    Try (repeated_data): counting what the loader gives out: `recipe verify-data`, or a set of document indices. One
        document with the same passage many times (a table, a licence) gives equal blocks too: clean it.
    Try (resume_replay): the sampler's or stream's state in the checkpoint; `ignore_data_skip` false.
    Try (train_eval_overlap): taking the held-out documents out of the training data; splitting before shuffling or
        multiplying.
    Cannot see: paraphrases; copies of under 64 tokens inside longer rows; repetitive text; single documents; one order
        of all rows in every declared pass; data skipped by a resume; checkpoints without the guards' state; eval sets
        never evaluated; of copies before the first evaluation those whose windows were not kept.
    """

    ids = {
        REPEATED: "The model was given text that it had already seen in this pass.",
        OVERLAP: "Text of the hold-out is in the training data.",
        REPLAYED: "After resuming, data was read again: its position was not restored.",
    }
    taps = ("tokens", "ngrams", "evaluation")
    of_one_resume = (REPLAYED,)

    # Tokens in 50-token strings that occur twice: 0.8 to 7 % of LM1B, Wiki-40B and C4, 19 % of RealNews, where papers
    # share agencies' news (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better"). Two workers
    # or ranks that read the same give 50 %, a stream that begins again 100 %. For severity info: `ledger.INFO_SHARE`.
    WARN_SHARE = 0.25
    # After a declared pass, of copies from within `ledger.NEAR` of it. Chosen, not measured, clear of that tenth.
    WARN_SHARE_NEAR = 0.30
    # Natural duplicates fall on the same place of two packed rows once in block_size times, and seldom lie within a
    # few micro-steps: one rank of 16 that reads another's rows is no accident at 6 %. Spread over half of the recent
    # tokens, so that one long document is not enough. Derived: with 25 % of the text doubled, rows of 64 tokens agree
    # by chance in 0.4 %; 5 % let a twentieth of the rows come again unseen (zoo, development).
    ALIGNED_SHARE, ALIGNED_ROWS, ALIGNED_SPREAD = 0.02, 8, 0.5
    # The same at any distance. Text that runs in loops meets itself at many places of a row (5 % of the rows of a
    # Markov source of 0.6 nats a token), so only where a token tells more. Chosen, measured for that source only.
    WHOLE_SHARE, WHOLE_NATS = 0.04, 1.0
    # Prefetching loaders seldom have more workers. Chosen, not measured.
    FEW_MICRO_STEPS = 16
    # Eval documents with a near-copy in train: 0.7 to 5 % of Wiki-40B, C4 and LM1B, 14 % of RealNews (same source). An
    # error is where no natural corpus reaches. Two rows at least: chosen, one may be an accident.
    OVERLAP_ROWS, OVERLAP_WARN, OVERLAP_ERROR = 2, 0.02, 0.20

    def setup(self, run) -> None:
        self.rates, self.rank = Rates.of(*run.step_size), run.rank
        self.ledger, self.num_workers = Ledger(self.rates), run.args.dataloader_num_workers
        self.eos_ids, self.guess = run.eos_token_ids, math.log(run.vocab_size or 256)
        self.novel = np.zeros(2)  # nats and tokens of what was no copy
        samplers = samplers_of(run.trainer.callback_handler.train_dataloader)
        self.is_drawn_again = any(getattr(each, "replacement", None) is True for each in samplers)
        self.train_set = TrainSet(knows_passes(samplers, run.trainer.train_dataset))

    def inspect(self, run) -> Iterator[Verdict]:
        if not run.step:
            yield Skip(REPLAYED, NotApplicable("not resumed"))
        elif run.is_main and self.ledger.resumed_at < 0:
            yield Skip(REPLAYED, CannotJudge("the checkpoint holds no state of the guards"))
        if run.max_steps * run.facts["tokens_per_step"] < ledger.MIN_TOKENS:
            yield Skip(REPEATED, NotApplicable(f"the run has fewer than {ledger.MIN_TOKENS:,} tokens"))
        elif run.is_main:
            with sandbox.undisturbed(run.model):  # rows may draw random numbers
                found = self.train_set.read(run.trainer.train_dataset, self.eos_ids)
            if found:
                yield self.finding(**found, id=REPEATED, check=PROBE)
        if not run.is_evaluated:
            yield Skip(OVERLAP, NotApplicable("no evaluation during training"))
        elif run.is_main:
            self._read_eval_rows(run)

    def _read_eval_rows(self, run) -> None:
        with sandbox.undisturbed(run.model):  # a collator or dataset may draw random numbers
            try:
                self.ledger.observe_eval(read_eval_rows(run.trainer, run.pad_token_id))
            except Exception as error:  # such as columns that Trainer would have dropped
                logger.debug("eval rows are known when they are evaluated: %s: %s", type(error).__name__, str(error))

    def measure_tokens(self, step: int, tokens: list[SeenTokens]) -> Fingerprints | None:
        pieces = [(micro, *piece) for micro, seen in enumerate(tokens) for piece in enumerate(seen.pieces)]
        learned = [(scored_part(*piece), (step, self.rank, micro, number)) for micro, number, piece in pieces]
        rows, places = [part for part, _ in learned], [place for _, place in learned]
        if self.rank == 0:
            self.ledger.match_own(rows, step)
        return fingerprint(rows, places, self.eos_ids, self.rates)

    def observe(self, step) -> Iterator[Verdict]:
        if not (parts := step.of_ranks(self)):
            return
        copied = self.ledger.observe_train(parts)
        if found := self.train_set.observe(parts[0].digest[parts[0].place[:, 1] == 0]):
            yield self.finding(**found, id=REPEATED, check=PROBE)
        new_share = 1 - copied / max(1, sum(part.tokens for part in parts))
        nats = self._measure(step.ngrams.loss if step.ngrams is not None else None, new_share)
        finding = self.judge_repetition(self.ledger, nats, self.num_workers, self.train_set.share, self.is_drawn_again)
        if finding is not None:
            yield finding
        found = finding.id if finding is not None else None
        has_enough = self.ledger.rows.size >= ledger.MIN_ROWS and self.ledger.tokens >= ledger.MIN_TOKENS
        if found == REPLAYED or (found is None and has_enough):
            yield self.clear(REPEATED)
        if found != REPLAYED and self.ledger.replay_rows >= ledger.REPLAY_ROWS:
            yield self.clear(REPLAYED)
        if len(self.ledger.eval_rows):
            yield self.judge_overlap(self.ledger, nats) or self.clear(OVERLAP)

    def _measure(self, loss, new_share: float) -> float:
        """What a token of this text tells: the mean `loss` of the n-gram model over steps of which most is no copy.
        `new_share`: of this step."""
        if loss is not None and new_share >= 0.5:
            self.novel += new_share * loss.tokens * np.array([loss.floor, 1.0])
        return float(self.novel[0] / self.novel[1]) if self.novel[1] else self.guess

    def observe_eval(self, evaluation) -> Iterator[Verdict]:
        names = [key for key in evaluation.metrics if key.startswith("eval_") and key.endswith("_loss")]
        if names and "train" not in names[0]:  # rows of the training data may be evaluated on purpose
            self.ledger.observe_eval([row for rank in evaluation.ranks for row in rank["learned"]])
        return iter(())

    def begin_pass(self, tokens_in_pass: int | None) -> None:
        self.train_set.begin_pass(self.ledger.begin_pass(tokens_in_pass))

    def save(self) -> dict[str, np.ndarray]:
        return {**self.ledger.state(), "novel": self.novel, **self.train_set.state()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.ledger, self.novel = Ledger.from_state(state, self.rates), np.array(state["novel"])
        self.train_set.load(state)

    def on_resume(self, step: int) -> None:
        self.ledger.mark_resume()

    @classmethod
    def judge_repetition(
        cls,
        seen: Ledger,
        nats_per_token: float,
        num_workers: int | None = None,
        set_share: float = 0.0,
        is_drawn_again: bool = False,
    ) -> Finding | None:
        """The share of the recent tokens that are copies of what was consumed before in this pass.

        `nats_per_token`: what a token of this text tells where it is no copy. `num_workers`: of the DataLoader, for
        the wording. `set_share`: what of them the training set itself explains. `is_drawn_again`: rows are drawn with
        replacement, on purpose.
        """
        since = seen.replay_since
        rows, copies = seen.recent(nats_per_token, since or 0)
        length, tokens = rows[:, 1], int(rows[:, 1].sum())
        enough = len(rows) >= ledger.MIN_ROWS and tokens >= ledger.MIN_TOKENS
        if not len(copies) or (since is None and not enough):
            return None
        copied, is_whole = copies[:, 1], copies[:, 4] == 1
        is_near = is_whole & (seen.micro_steps_apart(copies) < cls.FEW_MICRO_STEPS)
        share, whole, near = (copied[which].sum() / tokens - set_share for which in (copied > 0, is_whole, is_near))
        texts = None
        if (length == length[0]).all() and not seen.passes and not is_drawn_again:
            if nats_per_token >= cls.WHOLE_NATS:
                texts = cls._judge_whole_rows("again", copies[is_whole], tokens, whole, cls.WHOLE_SHARE)
            texts = texts or cls._judge_whole_rows("soon again", copies[is_near], tokens, near, cls.ALIGNED_SHARE)
        warn = cls.WARN_SHARE_NEAR if seen.passes else cls.WARN_SHARE
        least = warn if seen.passes else ledger.INFO_SHARE
        if share < least and texts is None:
            return None
        causes, evidence = find_origin(seen, copies, num_workers, is_drawn_again)
        shares = {"share": float(share), "whole_row_share": float(whole), "near_whole_row_share": float(near)}
        numbers = {"tokens": tokens, "nats_per_token": nats_per_token, "passes_declared": seen.passes}
        is_warning = texts is not None or since is not None or (share >= warn and not is_drawn_again)
        if texts is None or share >= warn:
            expected = f"under {least:.0%}" + (" (within a tenth of a pass)" if seen.passes else "")
            texts = f"{share:.0%} of {tokens:,} recent tokens copied", expected
        return cls.finding(
            "warning" if is_warning else "info",
            *texts,
            causes=causes,
            action="count the documents that the loader gives out: verify-data, or a set of their indices",
            evidence=evidence | shares | numbers,
            id=REPEATED if since is None else REPLAYED,
            cause=causes[0][:16],
        )

    @classmethod
    def _judge_whole_rows(cls, when, copies, tokens: int, share: float, least: float) -> tuple[str, str] | None:
        """Texts of a finding, where these copies are many, and over so much of the recent tokens that one document is
        not enough."""
        starts = copies[:, 0]
        if share < least or len(starts) < cls.ALIGNED_ROWS or starts[-1] - starts[0] < cls.ALIGNED_SPREAD * tokens:
            return None
        return f"whole rows {when}: {share:.0%} of recent tokens", f"under {least:.0%}"

    @classmethod
    def judge_overlap(cls, seen: Ledger, nats_per_token: float) -> Finding | None:
        """Eval rows of which more than half was in training, before or after the first evaluation."""
        level = seen.eval_rows[:, 2]
        covered = (level > least_tokens(seen.tokens * seen.eval_tokens, nats_per_token)).nonzero()[0]
        share = len(covered) / max(len(level), 1)
        if len(covered) < cls.OVERLAP_ROWS or share < cls.OVERLAP_WARN:
            return None
        return cls.finding(
            "error" if share >= cls.OVERLAP_ERROR else "warning",
            found=f"{share:.1%} of {len(level)} eval rows in training",
            expected=f"under {cls.OVERLAP_WARN:.0%}",
            causes=(
                "training reads the hold-out",
                "the data was split after it was shuffled or multiplied",
                "the corpus holds copies of its documents",
            ),
            action="do not trust the eval loss; take the held-out documents out of the training data",
            evidence={
                "share": share,
                "first_covered_eval_rows": covered[:10].tolist(),
                "steps_of_a_copy": seen.eval_rows[covered[:10], 3].tolist(),
                "nats_per_token": nats_per_token,
            },
            id=OVERLAP,
        )


def find_origin(seen: Ledger, copies: np.ndarray, num_workers: int | None, is_drawn_again: bool) -> tuple[tuple, dict]:
    """Where most of the copied tokens come from, as likely causes, and its numbers."""
    tokens, distance = copies[:, 1], copies[:, 3]
    now, then = seen.rows.places(copies[:, 0]), seen.rows.places(copies[:, 5])
    micro_steps, same_rank = seen.micro_steps_apart(copies), now[:, 1] == then[:, 1]
    near = micro_steps < (num_workers or Repetition.FEW_MICRO_STEPS)
    typical = float(np.median(distance))
    same_distance = abs(distance - typical) <= 0.01 * typical
    if seen.replay_since is not None:
        cause = "data position was not restored"
    elif is_drawn_again:
        cause = "on purpose: the sampler draws with replacement"
    elif tokens[near & ~same_rank].sum() > 0.5 * tokens.sum():
        cause = "ranks read the same data"
    elif tokens[near & same_rank & (micro_steps > 0)].sum() > 0.5 * tokens.sum():
        workers = f": {num_workers} DataLoader workers" if num_workers else ""
        cause = f"each worker reads all the data{workers}"
        if num_workers == 0:
            cause = "the iterator starts again; or it does not advance"
    elif tokens[same_distance].sum() > 0.9 * tokens.sum():
        cause = f"the stream restarted: in the same order, after {typical:,.0f} tokens"
    else:
        cause = "the stream restarted: in another order"
    first, again = (dict(zip(PLACE, map(int, place), strict=False)) for place in (then[-1], now[-1]))
    others = (
        "the stream restarted",
        "each worker reads all the data",
        "ranks read the same data",
        "the corpus holds its documents more than once",
    )
    causes = (cause, *(other for other in others if not cause.startswith(other[:16])))
    return causes, {"first_consumed": first, "again": again, "typical_distance_tokens": typical}


def read_eval_rows(trainer: Trainer, pad_token_id: int | None) -> list[np.ndarray]:
    """What evaluations will score: the first rows of eval sets that can be indexed, through the collator. Streams are
    left alone: their rows are known when they have been evaluated."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    sets = [dataset for name, dataset in sets.items() if "train" not in name and isinstance(dataset, Sized)]
    until, rows = time.monotonic() + EVAL_SECONDS, []
    for dataset in [dataset for dataset in sets if hasattr(dataset, "__getitem__")]:
        for number in range(min(len(dataset), EVAL_ROWS)):
            tokens = send_tokens(trainer.data_collator([dataset[number]]), pad_token_id)
            rows += [scored_part(*piece).astype(np.int32) for piece in tokens.read().pieces] if tokens else []
            if time.monotonic() > until:
                return rows
    return rows
