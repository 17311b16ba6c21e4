"""Sequence classification: a decoder's body and a trained head that reads the last token of each text.

It is what transformers calls LlamaForSequenceClassification and the like: a linear `score` without bias over the final
hidden state of a text's last token. The body is either of our two, without its output head. The head is held and
computed in float32 whatever the body is held in: it is small, and trained from nothing.

Shape letters: T tokens of a packed batch, B documents, D hidden size, C classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.models.decoder import Decoder
from halfbyte.models.model_source import ModelSource

SCORE = "score.weight"
_INITIAL_STD = 0.02  # of transformers' configurations that do not say another


@dataclass(frozen=True)
class HeadOptions:
    """The head that a model is loaded with: its classes in order, and the seed of its first values."""

    labels: tuple[str, ...]
    seed: int = 0


class Classifier(nn.Module):
    """A body with a head, behind the interface of `Decoder` as far as training and evaluation need it.

    body     Decoder or `models.fallback.FallbackBody`
    score    the head, [C, D] in float32
    labels   the classes' names, in the head's order
    """

    task = "classification"

    def __init__(self, body: nn.Module, score: Tensor, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.body = body
        self.labels = labels
        self.score = nn.Linear(score.shape[1], score.shape[0], bias=False, device="meta")
        self.score.weight = nn.Parameter(score.float(), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.score.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the body computes in."""
        return self.body.dtype  # type: ignore[return-value]

    @property
    def transposed(self) -> frozenset[str]:
        return getattr(self.body, "transposed", frozenset())

    @property
    def total_parameters(self) -> int:
        """Parameters of body and head."""
        body: Any = self.body
        held = body.spec.total_parameters if isinstance(body, Decoder) else body.total_parameters
        return int(held) + self.score.weight.numel()

    @property
    def checkpointing(self) -> bool:
        """Recompute the body's activations in the backward pass instead of keeping them."""
        return bool(self.body.checkpointing)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.body.checkpointing = on  # type: ignore[assignment]

    # -- forward --------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(summed cross-entropy of the documents that have a class, float32 with a graph; how many there are)."""
        logits_BC, targets_B = self._supervised(batch)
        return nn.functional.cross_entropy(logits_BC, targets_B, reduction="sum"), targets_B.numel()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        """The log-probability of each document's own class, float32, in the batch's order."""
        logits_BC, targets_B = self._supervised(batch)
        return -nn.functional.cross_entropy(logits_BC, targets_B, reduction="none")

    def class_logits(self, batch: Batch) -> Tensor:
        """float32 [B, C] of every document, whether its class is known or not; with a graph."""
        return self._of(batch, self._last(batch))

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """float32 [T, C]: what the head would say if the text [T] ended at each of its tokens. Inference only."""
        count = input_ids.numel()
        batch = Batch(input_ids, torch.arange(count), torch.full_like(input_ids, IGNORE), (count,))
        return self._of(batch, torch.arange(count, device=self.device))

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        last = self._last(batch)
        targets = batch.targets.to(self.device)[last]
        known = targets != IGNORE
        return self._of(batch, last[known]), targets[known]

    def _last(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1

    def _of(self, batch: Batch, rows: Tensor) -> Tensor:
        hidden_ND: Tensor = self.body.hidden_of(batch, rows)  # type: ignore[operator]
        logits_NC: Tensor = self.score(hidden_ND.float())
        return logits_NC

    # -- the tensors ----------------------------------------------------------------------------------------------

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Make every tensor trainable; returns them by Hugging Face name. UsageError where the body cannot be."""
        if not isinstance(self.body, Decoder):
            raise UsageError("method full is built for the decoder's families only: use lora or qlora with this model")
        trainable = self.body.unfreeze()
        self.score.requires_grad_(True)
        return trainable | dict(self.score.named_parameters(prefix="score"))

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """The body's tensors that may be exchanged whole; see `Decoder.places`. The head is always trained whole."""
        for name, owner, attribute in self.body.places():  # type: ignore[operator]
            if name != "lm_head.weight":  # the decoder's name for its tied embeddings: this model writes no words
                yield name, owner, attribute

    def named_tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(Hugging Face name, a function that returns the dense tensor as it is held, adapters left out)."""
        yield from self.body.named_tensors()  # type: ignore[operator]
        yield SCORE, lambda: self.score.weight.detach()


def head_of_file(source: ModelSource) -> tuple[str, ...] | None:
    """The classes' names of a model that has a head; None for one that has none. UsageError where they disagree."""
    if SCORE not in source.tensors():
        return None
    shape = source.info(SCORE).shape
    names = source.config.get("id2label") or {}
    if len(shape) != 2 or not isinstance(names, dict):
        raise UsageError(f"{source.path}: {SCORE} is {list(shape)} and id2label {names!r:.60}: damaged")
    if names and len(names) != shape[0]:
        raise UsageError(f"{source.path}: {SCORE} has {shape[0]} rows and id2label {len(names)} names: damaged")
    labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(shape[0]))
    if len(set(labels)) < len(labels):
        raise UsageError(f"{source.path}: id2label gives two classes one name: give each its own in config.json")
    return labels


def make_head(source: ModelSource, width: int, options: HeadOptions, device: torch.device) -> Tensor:
    """The head's first values, float32 [C, D]: the file's own where it has one, else as transformers draws them.

    UsageError for a head of the file that is of other classes.
    """
    shape = (len(options.labels), width)
    if SCORE in source.tensors():
        found = source.info(SCORE).shape
        if found != shape:
            raise UsageError(
                f"{source.path}: its head tells {found[0]} classes apart, and {shape[0]} are asked for "
                f"({', '.join(options.labels[:5])}): use the model without a head, or its own labels"
            )
        return source.read(SCORE).to(device, torch.float32)
    config = source.config.get("text_config") or source.config
    std = config.get("initializer_range") if isinstance(config, dict) else None
    std = float(std) if isinstance(std, int | float) and 0 < std < 1 else _INITIAL_STD
    generator = torch.Generator().manual_seed(options.seed)
    return (torch.randn(shape, generator=generator) * std).to(device)
