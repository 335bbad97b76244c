"""A class under stock Trainer: two uneven micro-batches in a step."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

from tests.audit.checks import FAULT, LIMIT, LOSS_ERROR, PASS, Result, close
from tests.audit.subject import IGNORE, Subject, make_batch


def check_trainer(subject: Subject) -> Result:
    """Is the loss of the step the mean over the scored labels of both?"""
    batch, model = make_batch("plain"), subject.model.train()
    inputs = subject.inputs(batch, batch.labels)
    _, logits = subject.loss(batch, batch.labels)
    nats = [
        subject.cross_entropy(logits[rows], batch.labels[rows], 0 if subject.is_encoder_decoder else 1)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    wanted, means = float(torch.cat(nats).mean()), float(sum(part.mean() for part in nats) / 2)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, gradient_accumulation_steps=2, report_to="none", max_steps=1)
        trainer = Trainer(model, args)
        trainer.current_gradient_accumulation_steps = 2
        parts = [{n: v[rows] if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
                 for rows in (slice(0, 1), slice(1, 3))]  # fmt: skip
        samples, count = trainer.get_batch_samples(iter(parts), 2, torch.device("cpu"))
        total = float(sum(trainer.training_step(model, part, count) for part in samples))
    scored = sum(len(part) for part in nats)
    if close(total, wanted):
        return Result(PASS)
    if close(total, means):
        return Result(LIMIT, "the mean of the micro-batches' means: tokens of short micro-batches count more")
    labels = int((batch.labels != IGNORE).sum())
    told = f"; Trainer counted {int(count)} labels, {scored} are scored" if count is not None else ""
    if count is not None and abs(total * float(count) / scored / wanted - 1) < LOSS_ERROR and int(count) == labels:
        return Result(FAULT, f"the step's loss is {total / wanted:.4f} of the mean{told}")
    return Result(FAULT, f"the step's loss is {total / wanted:.3f} of the mean{told}")
