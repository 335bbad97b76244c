"""One tiny model, and how it is called on texts."""

import inspect
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

IGNORE = -100
FIRST_TOKEN, LAST_TOKEN = 5, 96  # ids of texts: no special tokens
ROWS, LENGTH = 3, 24
PADDED = (24, 17, 11)  # real tokens of each row
FIRST_DOCUMENT = (9, 13, 6)  # its length in each row; another follows
PROMPT = (0, 5, 9)  # labels left out at the beginning of each row, so that rows count differently


class NoLogits(Exception):
    """The model cannot be called on texts alone, or gives no logits for them."""


@dataclass
class Batch:
    """`real` bool: not padding. `documents`: number of the document of each position. All `[rows, positions]`.
    `extra`: arguments of the call beside ids and labels."""

    ids: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor
    documents: torch.Tensor
    extra: dict = field(default_factory=dict)

    def with_ids(self, ids: torch.Tensor) -> "Batch":
        return Batch(ids, self.labels, self.real, self.documents, self.extra)

    def rows(self, rows: slice) -> "Batch":
        extra = {name: value[rows] for name, value in self.extra.items()}
        return Batch(self.ids[rows], self.labels[rows], self.real[rows], self.documents[rows], extra)


def random_ids(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_batch(setting: str) -> Batch:
    """`plain`: full rows. `padded`: padding to the right, with a mask. `packed`: two documents in each row, told by
    `position_ids` that start again, without a mask."""
    ids, place = random_ids(ROWS, LENGTH, seed=1), torch.arange(LENGTH)
    labels = ids.clone()
    labels[place < torch.tensor(PROMPT)[:, None]] = IGNORE
    real, documents, extra = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), {}
    if setting == "padded":
        real = place < torch.tensor(PADDED)[:, None]
        ids, labels = ids.masked_fill(~real, 0), labels.masked_fill(~real, IGNORE)
        extra = {"attention_mask": real.long()}
    if setting == "packed":
        first = torch.tensor(FIRST_DOCUMENT)[:, None]
        documents = (place >= first).long()
        labels[place == first] = IGNORE
        extra = {"position_ids": torch.where(place < first, place, place - first)}
    return Batch(ids, labels, real, documents, extra)


class Subject:
    """A model with its way of being called. `is_encoder_decoder`: `ids` are the decoder's, and the encoder reads other
    random rows, with a mask where they are padded."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.config = model, model.config
        self.is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self.parameters = inspect.signature(model.forward).parameters
        self.takes_kwargs = any(each.kind == each.VAR_KEYWORD for each in self.parameters.values())
        self.encoder_ids = random_ids(ROWS, LENGTH, seed=2)

    def takes(self, name: str) -> bool:
        return name in self.parameters

    def inputs(self, batch: Batch, labels: torch.Tensor | None = None) -> dict:
        given = {"use_cache": False} if self.takes("use_cache") else {}
        if self.is_encoder_decoder:
            encoder = self.encoder_ids[: len(batch.ids)]
            given |= {"input_ids": encoder} | (
                {"attention_mask": batch.extra["attention_mask"]} if batch.extra else {}
            )
            given |= {"decoder_input_ids": batch.ids} if labels is None else {}
        else:
            given |= {"input_ids": batch.ids} | batch.extra
        return given | ({} if labels is None else {"labels": labels})

    def logits(self, batch: Batch) -> torch.Tensor:
        """`[rows, positions, vocabulary]` float32."""
        with torch.no_grad():
            return self._logits_of(self.model(**self.inputs(batch)), batch)

    def loss(self, batch: Batch, labels: torch.Tensor, **kwargs) -> tuple[float, torch.Tensor]:
        with torch.no_grad():
            output = self.model(**self.inputs(batch, labels), **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if loss is None:
            raise NoLogits("no loss is returned for labels")
        return float(loss.float().mean()), self._logits_of(output, batch)

    @staticmethod
    def _logits_of(output, batch: Batch) -> torch.Tensor:
        parts = [output.get("logits")] if isinstance(output, dict) else list(output)
        logits = next((part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 3), None)
        if logits is None or logits.shape[:2] != batch.ids.shape:
            raise NoLogits(
                f"logits {None if logits is None else tuple(logits.shape)} for ids {tuple(batch.ids.shape)}"
            )
        if not logits.isfinite().all():
            raise NoLogits("logits are not finite")
        return logits.float()

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor, shift: int) -> torch.Tensor:
        """Of each scored position, with targets `shift` places later."""
        length = labels.shape[1] - shift
        return F.cross_entropy(
            logits[:, :length].reshape(-1, logits.shape[-1]), labels[:, shift:].reshape(-1), reduction="none"
        )[labels[:, shift:].reshape(-1) != IGNORE]


def randomize(model: torch.nn.Module) -> None:
    """Noise on every parameter: gates, adapters and scales that begin at zero would hide what they let through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
