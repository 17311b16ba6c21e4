"""A model that is in memory one layer at a time, and the calibration tokens on their way through it.

Quantization after training asks of each layer what its linears are given. The layers are built from the planned
tensors of a merged model as their turn comes, all tokens pass one layer before the next is made, and what is held is
a layer, the tokens' hidden states, and whatever the listeners keep.

Shape letters: T tokens, D hidden features, I input features of a linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.safetensors_file import Planned
from halfbyte.linear import GroupedLinear
from halfbyte.models.decoder import Context, Decoder, Layer, Norm
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight

MIN_TOKENS = 256
"""Fewer calibration tokens say nothing about hundreds of input features; some ten thousand are usual."""
_TOGETHER = 2048  # tokens in one forward pass

Listener = Callable[[Tensor], None]
"""Hears what a group of linears is given, [T, I], in the compute dtype; it must not be changed or kept."""


class LayerByLayer:
    """The model of `planned`, and `documents` (token ids, int64 [T] each) that have come as far as the next layer.

    dtype  the type of computation; the weights keep the one that is planned

    Raises UsageError for documents that cannot calibrate this model.
    """

    def __init__(
        self, planned: Sequence[Planned], spec: ModelSpec, documents: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self._planned = {tensor.name: tensor for tensor in planned}
        documents = check_documents(documents, spec.vocab_size)
        self.tokens = sum(document.numel() for document in documents)
        embed = DenseWeight(self.tensor("model.embed_tokens.weight"))
        norm = Norm("model.norm", self.tensor("model.norm.weight"), spec.norm_eps, spec.norm_plus_one)
        start = Decoder(spec, embed, [], norm, embed)
        start.dtype = dtype
        self._contexts: list[Context] = []
        self._states: list[Tensor] = []
        with torch.no_grad():
            for batch in _batches(documents):
                lengths = tuple(document.numel() for document in batch)
                positions = torch.cat([torch.arange(length) for length in lengths])
                x_TD, context = start.begin(torch.cat(batch), positions, lengths)
                self._states.append(x_TD)
                self._contexts.append(context)

    def tensor(self, name: str) -> Tensor:
        """The planned tensor, whole."""
        return torch.cat(list(self._planned[name].rows()))

    def layer(self, index: int) -> Layer:
        """The layer with its 16- or 32-bit weights; nothing else holds it."""
        return Layer(self.spec, index, lambda name, _: DenseWeight(self.tensor(name)), self.tensor)

    @torch.no_grad()
    def feed(self, layer: Layer, group: GroupedLinear, listener: Listener) -> None:
        """Let `listener` hear what `group` is given; the layer runs no further, and the tokens stay where they are."""

        def hear_and_stop(x_TI: Tensor) -> None:
            listener(x_TI)
            raise _Reached

        with _hearing({group: hear_and_stop}):
            for x_TD, context in zip(self._states, self._contexts, strict=True):
                try:
                    layer(x_TD, context)
                except _Reached:
                    continue

    @torch.no_grad()
    def advance(self, layer: Layer, listeners: Mapping[GroupedLinear, Listener] | None = None) -> None:
        """Take the tokens through the layer; the listeners hear what its groups are given on the way."""
        with _hearing(listeners or {}):
            for i, context in enumerate(self._contexts):
                self._states[i] = layer(self._states[i], context)


class _Reached(Exception):
    """What was to be heard has been heard."""


@contextmanager
def _hearing(listeners: Mapping[GroupedLinear, Listener]) -> Iterator[None]:
    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, GroupedLinear)
        if not bool(torch.isfinite(args[0]).all()):
            raise HalfbyteError(
                f"the calibration tokens give {module.parts[0].name} inputs that are not finite: the model's weights "
                "are broken (has the adapter diverged?)"
            )
        listeners[module](args[0])

    handles = [group.register_forward_pre_hook(hook) for group in listeners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_documents(documents: Sequence[Tensor], vocab_size: int) -> list[Tensor]:
    """The documents as int64, empty ones left out; UsageError where they cannot calibrate."""
    held = [document.long() for document in documents if document.numel()]
    for document in held:
        low, high = int(document.min()), int(document.max())
        if document.dim() != 1 or low < 0 or high >= vocab_size:
            raise UsageError(
                f"calibration: token ids {low} to {high} where the model has {vocab_size}: they are another tokenizer's"
            )
    tokens = sum(document.numel() for document in held)
    if tokens < MIN_TOKENS:
        raise UsageError(
            f"calibration: {tokens} tokens are too few to measure what the model's linears are given; at least "
            f"{MIN_TOKENS} are needed, and some ten thousand are usual: give more rows"
        )
    return held


def _batches(documents: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbouring documents, together at most `_TOGETHER` tokens unless one alone is longer."""
    batch: list[Tensor] = []
    tokens = 0
    for document in documents:
        if batch and tokens + document.numel() > _TOGETHER:
            yield batch
            batch, tokens = [], 0
        batch.append(document)
        tokens += document.numel()
    if batch:
        yield batch
