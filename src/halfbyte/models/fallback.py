"""Any other architecture that transformers knows, with its linear layers replaced by ours.

For what `models.decoder` does not serve: GPT-2, GPT-NeoX, OPT, StableLM, Granite, Falcon and some hundred more.
Slower than the decoder (documents are padded, the logits of supervised positions exist) and exact: every linear
but the output head becomes a `GroupedLinear` of one segment under its Hugging Face name, so quantization, LoRA,
merging and PEFT's files work as they do with the decoder. Nothing is patched: the modules of one instance are
exchanged with setattr, and what lies between them is transformers' own code.

What is left out on purpose: the base model's own dropout, which is set to zero. A run's result must not depend
on how its rows were cut into micro-batches, and LoRA has a dropout of its own.

Shape letters: T tokens of a packed batch, B documents, S tokens of the longest one, P kept positions, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.fallback_load import (
    HEAD,
    MIN_SHARE,
    Coverage,
    Loader,
    coverage_of,
    empty_model,
    linears_of,
    recompute,
)
from halfbyte.models.model_source import ModelSource
from halfbyte.quant import QuantOptions, Weight

_log = logging.getLogger(__name__)


class Held(nn.Module):
    """transformers' model with our linears in it: what all kinds of fallback have in common.

    coverage    which share of the parameters our linears hold
    transposed  names of segments whose checkpoint tensor is [in, out] (GPT-2's Conv1D); ours are [out, in] always
    """

    auto: Any = None
    """transformers' class that makes this kind of model from a configuration."""
    unwanted: tuple[str, ...] = ()
    """Patterns of tensors in a model's files that this kind has no use for."""

    def __init__(self, model: Any, coverage: Coverage, transposed: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.coverage = coverage
        self.transposed = transposed
        self.dtype = dtype
        self._checkpointing = False

    @classmethod
    def build(
        cls,
        source: ModelSource,
        quant: QuantOptions | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        min_share: float = MIN_SHARE,
    ) -> Self:
        """Build from a source, tensor by tensor, the linears quantized where `quant` is given.

        min_share  the least coverage of a quantized model; 0 accepts any

        Raises UsageError, before a tensor is read, for an architecture that transformers does not know as this kind
        of model or whose coverage is below `min_share`; later for a tensor that is missing or has a wrong shape.
        """
        model = empty_model(source.config, dtype, cls.auto)
        cls._prepare(model)
        linears = linears_of(model)
        coverage = coverage_of(model, linears)
        if quant is not None:
            quant.require_modules(linears, [name for name, _ in model.named_modules()])
        if quant is not None and coverage.share < min_share:
            raise UsageError(
                f"{source.name}: only {coverage}. Fused experts and other matrices that are not linear layers would "
                f"silently stay 16-bit and without adapters; at least {min_share:.0%} is asked for. Choose another "
                "model, or raise allow_unquantized_share to accept this"
            )
        _log.info("%s runs as transformers' own model: %s", source.name, coverage)
        transposed = frozenset(name for name, linear in linears.items() if isinstance(linear, Conv1D))
        Loader(model, linears, quant, dtype, torch.device(device), cls.unwanted).load(source)
        made = cls(model, coverage, transposed, dtype).to(device).eval()
        made._check()
        return made

    @classmethod
    def _prepare(cls, model: Any) -> None:
        """Change the empty model before its weights are read."""

    def _check(self) -> None:
        """UsageError for a model that turns out to be of another kind."""

    @property
    def total_parameters(self) -> int:
        """Parameters of the base model, embeddings included."""
        return self.coverage.total

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def checkpointing(self) -> bool:
        """Whether a training forward keeps only the inputs of each layer and recomputes the rest."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on and not self.model.supports_gradient_checkpointing:
            raise UsageError(
                f"{type(self.model).__name__} in transformers cannot recompute activations: "
                "set gradient_checkpointing to false"
            )
        if on != self._checkpointing:
            recompute(self.model, on)
        self._checkpointing = on

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(Hugging Face tensor name, the module that has it, its attribute there): what may be exchanged whole.

        The attribute is a `Weight` or a parameter; tied embeddings are one object in two places. Linears that the
        files keep turned around (Conv1D) are left out: a whole one would have another shape than its file's.
        """
        ours: set[int] = set()
        for name, segment in segments(self.model).items():
            ours.update(id(parameter) for parameter in segment.parameters())
            if name not in self.transposed:
                yield f"{name}.weight", segment, "weight"
            if segment.bias is not None:
                yield f"{name}.bias", segment, "bias"
        for prefix, module in self.model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in ours:
                    yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf

    def named_tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(Hugging Face name, a function that returns the dense tensor as it is held, adapters left out)."""
        ours: set[int] = set()
        for name, segment in segments(self.model).items():
            ours.update(id(parameter) for parameter in segment.parameters())
            turned = name in self.transposed
            yield f"{name}.weight", lambda w=segment.weight, t=turned: _dense(w, t)  # type: ignore[misc]
            if segment.bias is not None:
                yield f"{name}.bias", lambda bias=segment.bias: bias.detach()  # type: ignore[misc]
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in ours:
                yield name, lambda p=parameter: p.detach()  # type: ignore[misc]


class Fallback(Held):
    """A decoder behind the interface of `models.decoder.Decoder`. Made by `Fallback.build`."""

    auto = AutoModelForCausalLM

    def __init__(self, model: Any, coverage: Coverage, transposed: frozenset[str], dtype: torch.dtype) -> None:
        super().__init__(model, coverage, transposed, dtype)
        # Whether the architecture can project chosen positions alone to the vocabulary; most can.
        self._selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the supervised tokens' negative log-likelihoods, float32 with a graph; their number)."""
        logits_PV, targets_P = self._supervised(batch)
        return nn.functional.cross_entropy(logits_PV, targets_P, reduction="sum"), targets_P.numel()

    def token_nll(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every supervised token in the batch's order, float32, with a graph."""
        logits_PV, targets_P = self._supervised(batch)
        return nn.functional.cross_entropy(logits_PV, targets_P, reduction="none")

    # -- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        """The log-probability of each supervised token, float32, in the batch's order."""
        return -self.token_nll(batch)

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        lengths: tuple[int, ...] | None = None,
        cache: "SequenceCache | None" = None,
        last_only: bool = False,
    ) -> Tensor:
        """float32 logits [T, V]; with `last_only` of each sequence's last token, [B, V]. Inference only.

        input_ids  int64 [T], sequences end to end; `lengths` says how many tokens each has (default: one sequence)
        cache      one slot a sequence: the ids continue what it holds, and are appended to it. A length may be 0
                   (nothing new for that sequence) unless `last_only`.
        """
        sizes = (input_ids.numel(),) if lengths is None else tuple(lengths)
        input_ids = input_ids.to(self.device)
        if cache is not None:
            return cache.step(self.model, input_ids, sizes, last_only, self._selects)
        ids_BS, mask_BS = padded(input_ids, sizes, 0)
        logits_TV: Tensor = self._run(ids_BS, mask_BS).logits[mask_BS].float()
        return logits_TV[torch.tensor(sizes, device=self.device).cumsum(0) - 1] if last_only else logits_TV

    def new_cache(self, capacity: int, batch: int = 1) -> "SequenceCache":
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        return SequenceCache(capacity, batch)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits with a graph, for one's own loop: [T] -> [T, V], or [B, L] -> [B, L, V] (float32)."""
        ids = input_ids if input_ids.ndim == 2 else input_ids[None]
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits.float()
        return logits.view(*input_ids.shape, -1)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _run(self, ids_BS: Tensor, mask_BS: Tensor, **keywords: Any) -> Any:
        # Without padding no mask is given: attention may then take its causal fast path.
        mask = None if bool(mask_BS.all()) else mask_BS.long()
        return self.model(input_ids=ids_BS, attention_mask=mask, use_cache=False, **keywords)

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [P, V] in float32 and targets [P] of the supervised positions, in the batch's order.

        transformers projects to the vocabulary only positions that some document supervises.
        """
        ids_BS, mask_BS = padded(batch.input_ids.to(self.device), batch.lengths, 0)
        targets_BS, _ = padded(batch.targets.to(self.device), batch.lengths, IGNORE)
        wanted_BS = targets_BS != IGNORE
        columns = wanted_BS.any(0).nonzero()[:, 0]
        if columns.numel() == 0:  # nothing supervised: a loss of zero that still has a graph
            columns = columns.new_zeros(1)
        if self._selects:
            logits_BPV: Tensor = self._run(ids_BS, mask_BS, logits_to_keep=columns).logits
        else:
            logits_BPV = self._run(ids_BS, mask_BS).logits[:, columns]
        return logits_BPV[wanted_BS[:, columns]].float(), targets_BS[wanted_BS]

    def _check(self) -> None:
        _require_causal(self, lambda ids_BS: self.model(input_ids=ids_BS, use_cache=False).logits)


class FallbackBody(Held):
    """A decoder without its output head: the hidden states that a classifier's head reads.

    It is the body of transformers' model for sequence classification, so that names in files are that model's.

    width   features of a hidden state
    """

    auto = AutoModelForSequenceClassification
    unwanted = (rf"^{HEAD}\.", r"(^|\.)(lm_head|embed_out)\.")
    width: int

    @classmethod
    def _prepare(cls, model: Any) -> None:
        """The head is trained in float32 and by its own rules: `models.classifier` has it."""
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise UsageError(
                f"{type(model).__name__} in transformers has no linear head of the name {HEAD!r}: decoders can be "
                "trained to classify, this is another kind of model"
            )
        delattr(model, HEAD)

    def hidden_of(self, batch: Batch, rows: Tensor) -> Tensor:
        """Final hidden states [N, D] of N positions (int64) of the batch."""
        return self._hidden(*padded(batch.input_ids.to(self.device), batch.lengths, 0)).index_select(0, rows)

    def _hidden(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        mask = None if bool(mask_BS.all()) else mask_BS.long()
        hidden_BSD: Tensor = self.model.base_model(input_ids=ids_BS, attention_mask=mask, use_cache=False)[0]
        hidden_TD: Tensor = hidden_BSD[mask_BS]
        return hidden_TD

    def _check(self) -> None:
        hidden = _require_causal(self, lambda ids_BS: self.model.base_model(input_ids=ids_BS, use_cache=False)[0])
        self.width = hidden.shape[-1]


@torch.no_grad()
def _require_causal(held: Held, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Refuse models that look ahead (encoders with a language-model head), by looking whether they do.

    Returns what `run` made of a few tokens.
    """
    ids = torch.arange(8, device=held.device) % held.model.config.get_text_config().vocab_size
    pair = torch.stack([ids, torch.cat([ids[:6], ids[:2]])])
    before, after = run(pair)[:, :6].float().unbind()
    rounding = 1e-4 if held.dtype == torch.float32 else 0.02
    if float((before - after).abs().max()) > rounding * float(before.std()):
        raise UsageError(
            f"{type(held.model).__name__} lets a token see those after it: it is an encoder, and halfbyte trains "
            "decoders"
        )
    return before


class SequenceCache:
    """What the earlier tokens of several sequences left behind, in whatever form the architecture keeps it.

    Sequences are run apart from each other. One whose state is gone (after `truncate`), or of an architecture that
    keeps none, is run again from its first token.
    """

    def __init__(self, capacity: int, batch: int) -> None:
        self.capacity = capacity
        self.ids: list[Tensor] = [torch.empty(0, dtype=torch.int64) for _ in range(batch)]
        self.states: list[Any] = [None] * batch

    @property
    def lengths(self) -> list[int]:
        return [ids.numel() for ids in self.ids]

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these (finished ones leave the batch)."""
        self.ids = [self.ids[i] for i in sequences]
        self.states = [self.states[i] for i in sequences]

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens behind `lengths` (to score several continuations of one prompt)."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate a cache of lengths {self.lengths} to {lengths}")
        for i, length in enumerate(lengths):
            if length < self.ids[i].numel():
                self.ids[i], self.states[i] = self.ids[i][:length], None

    def step(self, model: Any, input_ids: Tensor, sizes: tuple[int, ...], last_only: bool, selects: bool) -> Tensor:
        """Logits [T, V] of new tokens, `sizes[b]` of them for sequence b; or only of each sequence's last, [B, V]."""
        documents = enumerate(input_ids.split(list(sizes)))
        return torch.cat([self._one(model, b, ids, last_only, selects) for b, ids in documents if ids.numel()])

    def _one(self, model: Any, index: int, new: Tensor, last_only: bool, selects: bool) -> Tensor:
        old, count = self.ids[index].to(new.device), new.numel()
        if old.numel() + count > self.capacity:
            raise ValueError(f"{old.numel() + count} tokens do not fit a cache of {self.capacity}")
        self.ids[index] = torch.cat([old, new])
        run = new if self.states[index] is not None else self.ids[index]
        kept = 1 if last_only else count
        keywords = {"logits_to_keep": kept} if selects else {}
        out = model(input_ids=run[None], past_key_values=self.states[index], use_cache=True, **keywords)
        self.states[index] = out.get("past_key_values")
        logits: Tensor = out.logits[0, -kept:].float()
        return logits


def _dense(weight: Weight, transposed: bool) -> Tensor:
    dense = weight.dequantize(weight.source_dtype)
    return dense.t() if transposed else dense


def padded(values_T: Tensor, lengths: tuple[int, ...], fill: int) -> tuple[Tensor, Tensor]:
    """[T] end to end -> ([B, S] padded on the right, [B, S] true where there is a token).

    On the right, so that every architecture's own way of counting positions is right as it is.
    """
    sizes = torch.tensor(lengths, device=values_T.device)
    mask_BS = torch.arange(max(lengths), device=values_T.device)[None] < sizes[:, None]
    padded_BS = values_T.new_full(mask_BS.shape, fill)
    padded_BS[mask_BS] = values_T
    return padded_BS, mask_BS
