"""The audit of one class, in a process of its own."""

import resource
import time
import traceback
import warnings

import torch
import transformers

from tests.audit.checks import ERROR, NOT_APPLICABLE, Result, distance, judge, rounding, run_checks
from tests.audit.classes import Entry
from tests.audit.exceptions import CHANGES
from tests.audit.probes import disagreements, run_probes
from tests.audit.shrink import shrink
from tests.audit.stock_trainer import check_trainer
from tests.audit.subject import Subject, make_batch, randomize

MAX_PARAMETERS, MAX_BYTES = 60_000_000, 12 << 30
IMPLEMENTATIONS, SETTINGS = ("eager", "sdpa"), ("plain", "padded", "packed")


class CannotBuild(Exception):
    """No tiny model of this class runs on texts."""


def audit(entry: Entry) -> dict:
    """`{"parameters", "kind", "seconds" (of the processor), "results": {implementation: {setting: {check: [status,
    detail]}}}, "disagreements": [...]}`, and "problem" where nothing could be audited."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    begun, report = time.process_time(), {"results": {}, "disagreements": []}
    try:
        model, only_texts = build_first(entry)
        report["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        report["kind"] = "encoder-decoder" if Subject(model).is_encoder_decoder else "decoder"
        _audit_all(entry, model, only_texts, report)
    except CannotBuild as problem:
        report["problem"] = str(problem)
    return report | {"seconds": round(time.process_time() - begun, 1)}


def _audit_all(entry: Entry, eager: torch.nn.Module, only_texts: bool, report: dict) -> None:
    weights, eager_logits = eager.state_dict(), {}
    for implementation in IMPLEMENTATIONS:
        results = report["results"][implementation] = {}
        model = eager
        if implementation != "eager":
            try:
                model = build(entry, implementation, only_texts)
                model.load_state_dict(weights)
            except Exception as problem:
                results["plain"] = {"build": Result(NOT_APPLICABLE, short(problem))}
                continue
        subject = Subject(model)
        for setting in SETTINGS:
            direct = results[setting] = run_checks(subject, setting)
            if "causal" not in direct:
                continue
            if not subject.is_encoder_decoder:
                gaps = disagreements(direct, run_probes(subject, setting))
                report["disagreements"] += [f"{implementation}, {setting}, {gap}" for gap in gaps]
            compare(subject, setting, eager_logits, direct)
        results["plain"]["trainer"] = attempt(check_trainer, subject)


def compare(subject: Subject, setting: str, eager_logits: dict, direct: dict) -> None:
    """Logits of the same weights under another attention implementation. `eager_logits` is filled by the first."""
    batch = make_batch(setting)
    subject.model.eval()

    def equal() -> Result:
        logits, old = subject.logits(batch), eager_logits.get(setting)
        if old is None:
            eager_logits[setting] = logits
            return Result(NOT_APPLICABLE)
        return judge(distance(logits, old, batch.real), rounding(subject, batch), "logits differ from eager's")

    direct["equals_eager"] = attempt(equal)


def attempt(function, *args) -> Result:
    try:
        return function(*args)
    except Exception as problem:
        return Result(ERROR, short(problem))


def short(problem: Exception) -> str:
    frame = traceback.extract_tb(problem.__traceback__)[-1] if problem.__traceback__ else None
    where = f" ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})" if frame else ""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}{where}"


def build_first(entry: Entry) -> tuple[torch.nn.Module, bool]:
    """The first tiny model that runs: all sizes shrunk, or towers in depth only."""
    problems = []
    for only_texts in (False, True):
        try:
            model = build(entry, IMPLEMENTATIONS[0], only_texts)
            subject = Subject(model.eval())
            subject.logits(make_batch("plain"))
            return model, only_texts
        except Exception as problem:
            problems.append(short(problem))
    raise CannotBuild("; ".join(dict.fromkeys(problems)))


def find_class(name: str) -> type:
    return getattr(transformers, name)


def build(entry: Entry, implementation: str, only_texts: bool) -> torch.nn.Module:
    model_class = find_class(entry.name)
    config = shrink(model_class.config_class, CHANGES.get(entry.name, {}), only_texts)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters after shrinking")
    config = shrink(model_class.config_class, CHANGES.get(entry.name, {}), only_texts)
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=implementation)
    randomize(model.float())
    return model
