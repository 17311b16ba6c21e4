"""The decoder: one definition of a decoder-only transformer, which the named families configure.

It replaces transformers' model classes for Llama, Mistral, Phi-3, Gemma and Qwen where speed and predictable
memory matter: projections that share an input are one call, documents lie end to end without padding, the
vocabulary projection and the loss are one chunked operator that never holds the logits, and only supervised
positions reach it. `models.spec.ModelSpec` holds the switches; this file has no `if family == ...`.

What it leaves out: dropout of the base model (fine-tuning sets it to zero), output of attention weights, and any
architecture that is not in `spec.FAMILIES` (those run through `models.fallback`).

Shape letters: T tokens, D hidden size, H query heads, K key-value heads, E head features, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.linear import GroupedLinear, Remake, Segment, linear_cross_entropy, linear_logits
from halfbyte.models import rope
from halfbyte.models.attention import KVCache, attend, attend_cached
from halfbyte.models.blocks import gated_unit, residual_add, residual_norm, rms_norm
from halfbyte.models.spec import LinearSpec, ModelSpec, RopeSpec
from halfbyte.models.stored import StoredWeight
from halfbyte.quant import DenseWeight, Weight

WeightProvider = Callable[[str, bool], Weight]
"""(Hugging Face tensor name, whether it may be quantized) -> the weight."""
TensorProvider = Callable[[str], Tensor]
"""Hugging Face tensor name -> a plain tensor (a norm's weight, a bias)."""


@dataclass
class Context:
    """What all layers of one forward pass share."""

    lengths: tuple[int, ...]
    tables: dict[RopeSpec, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cache: KVCache | None = None


class Norm(nn.Module):
    """RMSNorm; the weight is stored as the checkpoint has it (Gemma: minus one)."""

    def __init__(self, name: str, weight: Tensor, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.name, self.eps, self.plus_one = name, eps, plus_one
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.plus_one)

    def of_sum(self, x: Tensor, h: Tensor | None = None, after: "Norm | None" = None) -> tuple[Tensor, Tensor]:
        """(s = x + h, or x + after(h); its norm): the residual stream where a block ends and the next begins."""
        post = None if after is None else after.weight
        return residual_norm(x, h, post, self.weight, self.eps, self.plus_one)

    def remake(
        self, s: Tensor, x: Tensor | None = None, h: Tensor | None = None, after: "Norm | None" = None
    ) -> Remake:
        """The norm once more, for the linear that reads it: of s, or where h has a norm of its own of x and h."""
        weight, eps, plus_one = self.weight.detach(), self.eps, self.plus_one
        if x is None or h is None or after is None:
            return Remake(lambda kept: rms_norm(kept, weight, eps, plus_one), (s,))
        post = after.weight.detach()
        return Remake(lambda kept, of: residual_norm(kept, of, post, weight, eps, plus_one)[1], (x, h))


class Layer(nn.Module):
    """Attention and gated unit, each behind a norm (Gemma 2 and 3: also before the residual add)."""

    def __init__(self, spec: ModelSpec, index: int, weight: WeightProvider, tensor: TensorProvider) -> None:
        super().__init__()
        self.spec, self.index = spec, index
        self.window, self.rope = spec.windows[index], spec.rope_of(index)
        groups: dict[str, list[Segment]] = {}
        for linear in spec.layer_linears(index):
            groups.setdefault(linear.group, []).append(_segment(linear, weight, tensor))
        self.qkv, self.o = GroupedLinear(groups["qkv"]), GroupedLinear(groups["o"])
        self.gate_up, self.down = GroupedLinear(groups["gate_up"]), GroupedLinear(groups["down"])
        prefix = f"model.layers.{index}."

        def norm(name: str) -> Norm:
            return Norm(prefix + name, tensor(f"{prefix}{name}.weight"), spec.norm_eps, spec.norm_plus_one)

        self.input_norm = norm("input_layernorm")
        if spec.sandwich_norms:
            self.after_attention: Norm | None = norm("post_attention_layernorm")
            self.before_mlp = norm("pre_feedforward_layernorm")
            self.after_mlp: Norm | None = norm("post_feedforward_layernorm")
        else:
            self.after_attention, self.after_mlp = None, None
            self.before_mlp = norm("post_attention_layernorm")
        self.q_norm = norm("self_attn.q_norm") if spec.qk_norm else None
        self.k_norm = norm("self_attn.k_norm") if spec.qk_norm else None

    def forward(self, x_TD: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """The layer's output; only of `rows` (int64) where given: behind the attention, positions do not meet."""
        x_TD, y_TD = self.input_norm.of_sum(x_TD)
        qkv = self.qkv(y_TD, self.input_norm.remake(x_TD))
        out_TS = self._attention(qkv, context)
        if rows is not None:
            x_TD, out_TS = x_TD.index_select(0, rows), out_TS.index_select(0, rows)
        h = self.o(out_TS)
        s_TD, y_TD = self.before_mlp.of_sum(x_TD, h, self.after_attention)
        remake = self.before_mlp.remake(s_TD, x_TD, h, self.after_attention)
        gate_up, kind = self.gate_up(y_TD, remake), self.spec.activation
        unit = gated_unit(gate_up, kind, overwrite=not self.gate_up.keeps_output)
        h = self.down(unit, Remake(lambda kept: gated_unit(kept, kind), (gate_up,)))
        after = None if self.after_mlp is None else self.after_mlp.weight
        return residual_add(s_TD, h, after, self.spec.norm_eps, self.spec.norm_plus_one)

    def _attention(self, qkv: Tensor, context: Context) -> Tensor:
        spec = self.spec
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        sizes, tables = (spec.num_heads, spec.num_kv_heads), context.tables[self.rope]
        options = sizes, tables, norms, spec.norm_eps, spec.norm_plus_one
        q, k, v = rope.heads(qkv, *options, overwrite=not self.qkv.keeps_output)
        scale, cap = spec.attention_scale, spec.attention_softcap
        if context.cache is None:
            # With norms the projection is kept for their gradients; queries and keys are one pass over it away.
            remake = None if norms is None else Remake(lambda kept: rope.heads(kept, *options), (qkv,))
            out = attend(q, k, v, context.lengths, scale, self.window, cap, remake)
        else:
            new = list(context.lengths)
            context.cache.append(self.index, k, v, new)
            out = attend_cached(q, context.cache, self.index, new, scale, self.window, cap)
        return out.flatten(1)


def _segment(linear: LinearSpec, weight: WeightProvider, tensor: TensorProvider) -> Segment:
    bias = tensor(f"{linear.name}.bias") if linear.bias else None
    return Segment(linear.name, weight(f"{linear.name}.weight", True), bias)


def _rounded_up(batch: Batch) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(input ids, positions, lengths) with a last, unsupervised document that rounds T up by at most an eighth.

    Row counts that repeat are worth more than the rows they cost: for every new one oneDNN compiles and keeps new
    kernels (2 MB each), and activations of ever new sizes fragment the heap. Measured: docs/experiments.md.
    """
    tokens = batch.tokens
    granule = max(16, 1 << max(0, tokens.bit_length() - 4))
    extra = -tokens % granule
    if extra == 0:
        return batch.input_ids, batch.position_ids, batch.lengths
    filler = torch.arange(extra, dtype=torch.int64, device=batch.input_ids.device)
    ids = torch.cat([batch.input_ids, torch.zeros_like(filler)])
    return ids, torch.cat([batch.position_ids, filler]), (*batch.lengths, extra)


class Decoder(nn.Module):
    """A causal language model. Make one with `Decoder.build` or `models.load.load_model`.

    dtype          the compute dtype: activations are held in it and weights are dequantized to it
    checkpointing  recompute each layer's activations in the backward pass instead of keeping them
    """

    def __init__(self, spec: ModelSpec, embed: Weight, layers: list[Layer], norm: Norm, head: Weight) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.head = embed, head
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.dtype = torch.float32
        self.checkpointing = False

    @classmethod
    def build(
        cls, spec: ModelSpec, weight: WeightProvider, tensor: TensorProvider, dtype: torch.dtype = torch.float32
    ) -> "Decoder":
        """Pull every tensor, in the checkpoint's order, from the providers. Nothing is held twice."""
        embed = weight("model.embed_tokens.weight", False)
        layers = [Layer(spec, index, weight, tensor) for index in range(spec.num_layers)]
        norm = Norm("model.norm", tensor("model.norm.weight"), spec.norm_eps, spec.norm_plus_one)
        head = embed if spec.tied else weight("lm_head.weight", False)
        decoder = cls(spec, embed, layers, norm, head)
        decoder.dtype = dtype
        return decoder

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    # -- forward --------------------------------------------------------------------------------------------------

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        lengths: tuple[int, ...],
        cache: KVCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states after the last norm, [T, D], of documents laid end to end; [N, D] of N `rows` only."""
        x, context = self.begin(input_ids, position_ids, lengths, cache)
        recompute = self.checkpointing and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            wanted = rows if index == len(self.layers) - 1 else None
            x = checkpoint(layer, x, context, wanted, use_reentrant=False) if recompute else layer(x, context, wanted)
        if cache is not None:
            cache.advance(list(lengths))
        result: Tensor = self.norm(x)
        return result

    def begin(
        self, input_ids: Tensor, position_ids: Tensor, lengths: tuple[int, ...], cache: KVCache | None = None
    ) -> tuple[Tensor, Context]:
        """(the embedded tokens [T, D], what all layers of this pass share): where `hidden` begins.

        Quantization after training goes on from here by itself, one layer at a time.
        """
        x = self._embed(input_ids)
        context = Context(lengths, cache=cache)
        held = cache.lengths if cache is not None else [0] * len(lengths)
        totals = [old + new for old, new in zip(held, lengths, strict=True)]
        for kind in {self.spec.rope, self.spec.local_rope} - {None}:
            assert kind is not None
            context.tables[kind] = rope.table(kind, position_ids, totals, x.dtype, lengths)
        return x, context

    def _embed(self, input_ids: Tensor) -> Tensor:
        table = self.embed.trainable_tensor()
        x = self.embed.look_up(input_ids, self.dtype) if table is None else F.embedding(input_ids, table).to(self.dtype)
        if self.spec.embed_scale is not None:
            # The families were trained with the scale rounded to the activations' dtype.
            x = x * torch.tensor(self.spec.embed_scale, dtype=self.dtype, device=x.device)
        return x

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(summed negative log-likelihood of the supervised tokens, float32 scalar; how many there are).

        Divide by the tokens of the whole update, not of the micro-batch: that is what makes accumulation exact.
        """
        nll = self.token_nll(batch)
        return nll.sum(), nll.numel()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        """Log-probability of every supervised token in order, float32 [supervised tokens]."""
        return -self.token_nll(batch)

    def hidden_of(self, batch: Batch, rows: Tensor) -> Tensor:
        """Final hidden states [N, D] of N positions (int64) of the batch."""
        return self.hidden(*_rounded_up(batch), rows=rows)

    def token_nll(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of every supervised token in order, float32 [supervised tokens], with a graph."""
        supervised = (batch.targets != IGNORE).nonzero()[:, 0]
        hidden = self.hidden_of(batch, supervised)
        return linear_cross_entropy(hidden, self.head, batch.targets[supervised], self.spec.final_softcap)

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        lengths: tuple[int, ...] | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """float32 logits [T, V]; with `last_only` of each sequence's last token, [B, V]. Inference only.

        input_ids  int64 [T], sequences end to end; `lengths` says how many tokens each has (default: one sequence)
        cache      one slot a sequence: the ids continue what it holds, and are appended to it. A length may be 0
                   (nothing new for that sequence) unless `last_only`.
        """
        sizes = (input_ids.numel(),) if lengths is None else tuple(lengths)
        start = cache.lengths if cache is not None else [0] * len(sizes)
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(start, sizes, strict=True)])
        hidden = self.hidden(input_ids.to(self.device), positions.to(self.device), sizes, cache)
        if last_only:
            hidden = hidden[torch.tensor(sizes, device=self.device).cumsum(0) - 1]
        return linear_logits(hidden, self.head, self.spec.final_softcap)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""
        s = self.spec
        return KVCache(s.num_layers, batch, s.num_kv_heads, s.head_dim, capacity, self.dtype, str(self.device))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits with a graph, for one's own loop: [T] -> [T, V], or [B, L] -> [B, L, V] (float32)."""
        ids = input_ids if input_ids.ndim == 2 else input_ids[None]
        count, length = ids.shape
        positions = torch.arange(length, device=ids.device).repeat(count)
        hidden = self.hidden(ids.flatten(), positions, (length,) * count)
        logits = F.linear(hidden, self.head.dequantize(hidden.dtype)).float()
        cap = self.spec.final_softcap
        if cap is not None:
            logits = (logits / cap).tanh() * cap
        return logits.view(*input_ids.shape, -1)

    # -- full fine-tuning -----------------------------------------------------------------------------------------

    def unfreeze(self) -> dict[str, nn.Parameter]:
        """Make every tensor trainable, matrices in the compute dtype; returns them by Hugging Face name.

        For full fine-tuning of a 16- or 32-bit base. UsageError if a weight is quantized: it has no gradient.
        """
        trainable: dict[str, nn.Parameter] = {}

        def train(name: str, weight: Weight) -> Weight:
            if isinstance(weight, StoredWeight):
                weight = DenseWeight(weight.dequantize(weight.dtype))
            if not isinstance(weight, DenseWeight):
                raise UsageError(f"{name} is held in {weight.format}: full fine-tuning needs a 16- or 32-bit base")
            made = DenseWeight(weight.tensor.to(self.dtype), trainable=True)
            parameter = made.trainable_tensor()
            assert isinstance(parameter, nn.Parameter)
            trainable[name] = parameter
            return made

        tied = self.head is self.embed
        self.embed = train("model.embed_tokens.weight", self.embed)
        for module in self.modules():
            if isinstance(module, Segment):
                module.weight = train(f"{module.name}.weight", module.weight)
                if module.bias is not None:
                    trainable[f"{module.name}.bias"] = module.bias
            elif isinstance(module, Norm):
                trainable[f"{module.name}.weight"] = module.weight
        self.head = self.embed if tied else train("lm_head.weight", self.head)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        return trainable

    # -- the tensors ----------------------------------------------------------------------------------------------

    def places(self) -> Iterator[tuple[str, nn.Module, str]]:
        """(Hugging Face tensor name, the module that has it, its attribute there): what may be exchanged whole.

        The attribute is a `Weight` or a parameter; tied embeddings are one object in two places.
        """
        yield "model.embed_tokens.weight", self, "embed"
        for module in self.modules():
            if isinstance(module, Segment):
                yield f"{module.name}.weight", module, "weight"
                if module.bias is not None:
                    yield f"{module.name}.bias", module, "bias"
            elif isinstance(module, Norm):
                yield f"{module.name}.weight", module, "weight"
        yield "lm_head.weight", self, "head"

    def named_tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """(Hugging Face name, a function that returns the dense tensor as it is held, adapters left out)."""

        def dense(weight: Weight) -> Callable[[], Tensor]:
            return lambda: weight.dequantize(weight.source_dtype)

        yield "model.embed_tokens.weight", dense(self.embed)
        for module in self.modules():
            if isinstance(module, Segment):
                yield f"{module.name}.weight", dense(module.weight)
                if module.bias is not None:
                    yield f"{module.name}.bias", lambda bias=module.bias: bias.detach()  # type: ignore[misc]
            elif isinstance(module, Norm):
                yield f"{module.name}.weight", lambda norm=module: norm.weight.detach()  # type: ignore[misc]
        if not self.spec.tied:
            yield "lm_head.weight", dense(self.head)
