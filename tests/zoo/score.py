"""What records are worth: pure functions over plain values."""

import math
import re
import statistics
from collections.abc import Iterable

MATTERS = 0.02  # nats: the target speaks of bugs that change what is learned by more
SOON = 30  # steps after the onset
OURS = "guards"
ALARMS = ("warning", "error")
CONFIDENCE = 0.95


def score_bug(names: Iterable[str], onset: int, record: dict, twin: dict) -> dict:
    """One row of the table of bugs.

    `names`: ids that name the cause. Only what is said from `onset` on, and not of the twin, is a catch, for every
    tool; `early` holds alarms before it. `latency` in steps from the onset, 0: before the first step that the bug
    could spoil. `learned`, `reported`: nats by which the weights' loss on held-out rows, and the evaluation loss that
    Trainer reports, differ from the twin's; None where one has none, infinite where the weights are no numbers.
    """
    alarms = [finding for finding in record["findings"] if finding["severity"] in ALARMS]
    of_twin = {finding["id"] for finding in twin["findings"] if finding["severity"] in ALARMS}
    # What was said before the bug began is said of something else, unless it gets worse.
    before = {(each["id"], each["severity"]) for each in alarms if each["step"] < onset}
    news = [each for each in alarms if each["step"] >= onset and each["id"] not in of_twin]
    caught = [each for each in news if (each["id"], each["severity"]) not in before]
    first = caught[0] if caught else None
    learned = difference(record["learned_loss"], twin["learned_loss"])
    reported = difference(*((each["eval_losses"] or [None])[-1] for each in (record, twin)))
    return {
        "is_caught": first is not None,
        "first": first and first["id"],
        "is_named": first is not None and first["id"] in tuple(names),
        "step": first and first["step"],
        "tokens": first and first["tokens_seen"],
        "latency": first and first["step"] - onset,
        "found": first and first["found"],
        "all": [finding["id"] for finding in caught],
        "hints": [finding["id"] for finding in record["findings"] if finding["severity"] == "info"],
        "early": [finding["id"] for finding in alarms if finding["step"] < onset],
        "learned": learned,
        "reported": reported,
        "matters": learned is None or abs(learned) > MATTERS,
        "loss_when_caught": first and [loss_at(each["losses"], first["step"]) for each in (record, twin)],
        "loss_at_end": [mean_of_last(each["losses"]) for each in (record, twin)],
        "took_effect": record["effects"] > 0,
        "is_same_as_twin": is_same(record, twin),
        "others": {tool: first_step(own, twin["others"][tool], onset) for tool, own in record["others"].items()},
    }


def is_same(record: dict, twin: dict) -> bool:
    """To the last digit, in all that is compared."""
    return all(record[name] == twin[name] for name in ("losses", "learned_loss", "eval_losses"))


def score_healthy(record: dict) -> dict:
    alarms = [finding for finding in record["findings"] if finding["severity"] in ALARMS]
    return {
        "alarms": [(finding["id"], finding["step"], finding["found"]) for finding in alarms],
        "others": {tool: [alarm["what"] for alarm in alarms] for tool, alarms in record["others"].items()},
        "loss_at_end": mean_of_last(record["losses"]),
        "steps": record["steps"],
        "tokens": record["tokens"],
    }


def difference(loss: float | None, twin: float | None) -> float | None:
    if loss is None or twin is None:
        return None
    return loss - twin if math.isfinite(loss) else math.inf


def over_seeds(learned: list[float | None]) -> dict:
    """Of the differences of several seeds: their mean as `learned`, its standard error, and whether it matters."""
    values = [value for value in learned if value is not None]
    if not values:
        return {}
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    mean = statistics.fmean(values)
    return {"learned": mean, "learned_error": error, "seeds": len(values), "matters": abs(mean) > MATTERS}


def loss_at(losses: list[float], step: int) -> float | None:
    """The loss that was logged last when step `step` was over; the first one if it had not begun."""
    return losses[max(0, min(step, len(losses)) - 1)] if losses else None


def mean_of_last(losses: list[float], count: int = 10) -> float | None:
    last = losses[-count:]
    return sum(last) / len(last) if last else None


def first_step(alarms: list[dict], of_twin: list[dict], onset: int) -> int | None:
    known = {alarm["what"] for alarm in of_twin}
    return next((alarm["step"] for alarm in alarms if alarm["step"] >= onset and alarm["what"] not in known), None)


# --- shares and their bounds


def share_of(rows: Iterable[bool]) -> dict:
    """How many of how many, with one-sided 95 % bounds: `low` for a recall, `high` for false alarms."""
    rows = list(rows)
    hits, total = sum(rows), len(rows)
    low, high = bounds(hits, total) if total else (0.0, 1.0)
    return {"hits": hits, "of": total, "share": hits / total if total else None, "low": low, "high": high}


def bounds(hits: int, total: int) -> tuple[float, float]:
    """One-sided Clopper-Pearson bounds at 95 % each: 0 of 80 is under 3.7 %, 80 of 80 over 96.3 %."""
    miss = 1 - CONFIDENCE
    low = _root(lambda p: at_least(hits, total, p) - miss) if hits else 0.0
    high = _root(lambda p: miss - (1 - at_least(hits + 1, total, p))) if hits < total else 1.0
    return low, high


def at_least(hits: int, total: int, chance: float) -> float:
    """Chance of `hits` or more out of `total`."""
    terms = (math.comb(total, k) * chance**k * (1 - chance) ** (total - k) for k in range(hits, total + 1))
    return math.fsum(terms)


def _root(rising) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def summarize(bugs: list[dict], healthy: list[dict], tools: Iterable[str]) -> dict:
    """`bugs`, `healthy`: scored rows. By tool: recall (all bugs, and those that matter), latency, false alarms."""
    matter, with_id = [row for row in bugs if row["matters"]], [row for row in bugs if row["names"]]
    caught = [row for row in bugs if row["is_caught"]]
    ours = {
        "recall": share_of(row["is_caught"] for row in bugs),
        "recall_matters": share_of(row["is_caught"] for row in matter),
        "recall_with_id": share_of(row["is_caught"] for row in with_id),
        "named_first": share_of(row["is_named"] for row in caught),
        "before_step_1": share_of(row["latency"] == 0 for row in caught),
        "soon": share_of(row["latency"] <= SOON for row in caught),
        "false_alarms": share_of(bool(row["alarms"]) for row in healthy),
    }
    return {OURS: ours, **{tool: _summarize_other(tool, bugs, matter, with_id, healthy) for tool in tools}}


def _summarize_other(tool: str, bugs: list[dict], matter: list[dict], with_id: list[dict], healthy: list[dict]):
    """Of the runs that the tool watched: results that were recorded without it have none."""
    bugs, matter, with_id, healthy = (
        [row for row in rows if tool in row["others"]] for rows in (bugs, matter, with_id, healthy)
    )
    caught = [row for row in bugs if row["others"][tool] is not None]
    return {
        "recall": share_of(row["others"][tool] is not None for row in bugs),
        "recall_matters": share_of(row["others"][tool] is not None for row in matter),
        "recall_with_id": share_of(row["others"][tool] is not None for row in with_id),
        "named_first": None,
        "before_step_1": share_of(row["others"][tool] <= row["onset"] for row in caught),
        "soon": share_of(row["others"][tool] - row["onset"] <= SOON for row in caught),
        "false_alarms": share_of(bool(row["others"][tool]) for row in healthy),
    }


def summarize_all(parts: Iterable[dict], tools: Iterable[str]) -> dict:
    """Of all parts together. A twin that parts share was one run, and counts once."""
    parts = list(parts)
    bugs = [row for part in parts for row in part["bugs"]]
    healthy = {row["setting"]: row for part in parts for row in part["healthy"]}
    return summarize(bugs, list(healthy.values()), tools)


# --- how often each guard had enough to judge


def judged_shares(records: list[dict], ids: Iterable[str]) -> dict[str, dict]:
    """Over healthy runs. `runs`: of the runs in which there was something to judge; `steps`: of those runs' steps,
    the median share on which a guard that looks at steps judged. `reasons` of those that did not are counted, with
    their numbers left out."""
    shares = {}
    for name in ids:
        meant = [r for r in records if name not in r["not_applicable"] or r["judged_steps"].get(name)]
        judged = [record for record in meant if record["judged_steps"].get(name)]
        by_step = sorted(min(1.0, record["judged_steps"][name] / record["steps"]) for record in judged)
        without = [record for record in meant if not record["judged_steps"].get(name)]
        reasons = [re.sub(r"\d[\d,]*", "N", record["cannot_judge"].get(name, "too short")) for record in without]
        shares[name] = {
            "meant": len(meant),
            "runs": len(judged) / len(meant) if meant else None,
            "steps": by_step[len(by_step) // 2] if by_step else None,
            "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        }
    return shares
