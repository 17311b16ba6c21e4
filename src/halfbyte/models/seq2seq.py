"""Encoder-decoders (T5, Flan-T5, mT5, BART and their kin): transformers' model with our linears in it.

A document of a batch is a source, which the encoder reads whole, and an answer, which the decoder writes: behind the
model's own start token the answer moves one place to the right, so that the target of a source's last position is the
answer's first token. Both sides are padded on the right.

Inference has the interface of the language models, so that generating and scoring need not know the difference: what
an empty sequence is given first is its source, what follows is the answer so far.

Shape letters: T tokens of a packed batch, B documents, S tokens of the longest source, A of the longest answer, V
vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.models.fallback import Held, padded


class Seq2Seq(Held):
    """An encoder-decoder behind the interface of `models.decoder.Decoder`. Made by `Seq2Seq.build`."""

    auto = AutoModelForSeq2SeqLM
    task = "seq2seq"
    start: int
    """The id that the decoder begins with."""

    def begin_with(self, *configs: Mapping[str, Any]) -> None:
        """Take the start token from config.json or generation_config.json.

        UsageError where neither has one, and for models that begin with another: mBART with the answer's language.
        """
        values = [config.get("decoder_start_token_id") for config in configs]
        found = next((value for value in values if isinstance(value, int)), None)
        if found is None:
            raise UsageError(
                "config.json and generation_config.json have no decoder_start_token_id: nothing says what this "
                "model's decoder begins with"
            )
        self.start = found
        self._require_start()

    @torch.no_grad()
    def _require_start(self) -> None:
        """Refuse models that shift answers in another way, by looking what transformers itself makes of one."""
        answer = (torch.arange(3, 9, device=self.device) % self.model.config.vocab_size)[None]
        before = torch.cat([answer.new_tensor([[self.start]]), answer[:, :-1]], 1)
        theirs = self.model(input_ids=answer, labels=answer, use_cache=False).logits.float()
        ours = self.model(input_ids=answer, decoder_input_ids=before, use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, atol=0.02 * float(theirs.std())):
            raise UsageError(
                f"{type(self.model).__name__} begins an answer with another token than its decoder_start_token_id (the "
                "answer's language, as mBART does), which halfbyte does not: use T5 or BART"
            )

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the supervised tokens' negative log-likelihoods, float32 with a graph; their number)."""
        logits_PV, targets_P = self._supervised(batch)
        return nn.functional.cross_entropy(logits_PV, targets_P, reduction="sum"), targets_P.numel()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        """The log-probability of each supervised token, float32, in the batch's order."""
        logits_PV, targets_P = self._supervised(batch)
        return -nn.functional.cross_entropy(logits_PV, targets_P, reduction="none")

    def _supervised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [P, V] in float32 and targets [P] of the supervised positions, in the batch's order."""
        if len(batch.sources) != len(batch.lengths):
            raise ValueError(f"{len(batch.lengths)} documents and {len(batch.sources)} sources: not of this task")
        ids, targets = (t.to(self.device).split(batch.lengths) for t in (batch.input_ids, batch.targets))
        sources = torch.cat([d[:s] for d, s in zip(ids, batch.sources, strict=True)])
        start = ids[0].new_tensor([self.start])
        # The answer's last token predicts nothing, and the source's last position stands for the start token.
        before = torch.cat([torch.cat([start, d[s:-1]]) for d, s in zip(ids, batch.sources, strict=True)])
        wanted = torch.cat([d[s - 1 : -1] for d, s in zip(targets, batch.sources, strict=True)])
        sizes = tuple(n - s for n, s in zip(batch.lengths, batch.sources, strict=True))
        ids_BS, mask_BS = padded(sources, batch.sources, 0)
        before_BA, answers_BA = padded(before, sizes, 0)
        logits_BAV = self._run(ids_BS, mask_BS, before_BA, answers_BA)
        chosen = wanted != IGNORE
        return logits_BAV[answers_BA][chosen].float(), wanted[chosen]

    def _run(self, ids_BS: Tensor, mask_BS: Tensor, before_BA: Tensor, answers_BA: Tensor) -> Tensor:
        # The decoder is causal, so its padding on the right is seen by nobody and needs no mask.
        self._require_positions(max(ids_BS.shape[1], before_BA.shape[1]))
        logits_BAV: Tensor = self.model(
            input_ids=ids_BS, attention_mask=mask_BS.long(), decoder_input_ids=before_BA, use_cache=False
        ).logits
        return logits_BAV

    # -- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        lengths: tuple[int, ...] | None = None,
        cache: "AnswerCache | None" = None,
        last_only: bool = False,
    ) -> Tensor:
        """float32 logits [T, V]; with `last_only` of each sequence's last token, [B, V]. Inference only.

        input_ids  int64 [T], sequences end to end; `lengths` says how many tokens each has (default: one sequence)
        cache      one slot a sequence: what an empty one is given is its source, for which there are the logits of the
                   answer's first token alone (`last_only` is needed); later ids are appended to the answer

        Without a cache the text is source and answer at once: how likely is each token to be said again?
        """
        sizes = (input_ids.numel(),) if lengths is None else tuple(lengths)
        input_ids = input_ids.to(self.device)
        if cache is not None:
            return cache.step(self, input_ids, sizes, last_only)
        start = input_ids.new_tensor([self.start])
        before = torch.cat([torch.cat([start, document[:-1]]) for document in input_ids.split(sizes)])
        (ids_BS, mask_BS), (before_BA, _) = padded(input_ids, sizes, 0), padded(before, sizes, 0)
        logits_TV = self._run(ids_BS, mask_BS, before_BA, mask_BS)[mask_BS].float()
        return logits_TV[torch.tensor(sizes, device=self.device).cumsum(0) - 1] if last_only else logits_TV

    def new_cache(self, capacity: int, batch: int = 1) -> "AnswerCache":
        """Empty sequences, `batch` of them, of up to `capacity` tokens each, source and answer together."""
        return AnswerCache(capacity, batch)

    def encode(self, source: Tensor) -> Tensor:
        """The encoder's hidden states of one source [S]: [1, S, D]."""
        self._require_positions(source.numel())
        hidden: Tensor = self.model.get_encoder()(input_ids=source[None])[0]
        return hidden

    def _require_positions(self, tokens: int) -> None:
        """UsageError for a text longer than the model has positions (BART; T5's are relative and never end)."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and tokens > limit:
            raise UsageError(
                f"{type(self.model).__name__} reads and writes at most {limit:,} tokens, and here are {tokens:,}: set "
                f"max_seq_length to {limit:,} or shorten the text"
            )


class AnswerCache:
    """Several sources, read once, and the answers to them so far, with what the decoder keeps of them."""

    def __init__(self, capacity: int, batch: int) -> None:
        self.capacity = capacity
        self.sources: list[Tensor | None] = [None] * batch  # the encoder's states, [1, S, D]
        self.answers: list[Tensor] = [torch.empty(0, dtype=torch.int64) for _ in range(batch)]
        self.states: list[Any] = [None] * batch

    @property
    def lengths(self) -> list[int]:
        return [(0 if s is None else s.shape[1]) + a.numel() for s, a in zip(self.sources, self.answers, strict=True)]

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these (finished ones leave the batch)."""
        self.sources = [self.sources[i] for i in sequences]
        self.answers = [self.answers[i] for i in sequences]
        self.states = [self.states[i] for i in sequences]

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens of the answers behind `lengths`. ValueError where that would cut a source."""
        for i, length in enumerate(lengths):
            source = self.sources[i]
            kept = length - (0 if source is None else source.shape[1])
            if not 0 <= kept <= self.answers[i].numel():
                raise ValueError(f"cannot truncate a cache of lengths {self.lengths} to {lengths}")
            if kept < self.answers[i].numel():
                self.answers[i], self.states[i] = self.answers[i][:kept], None

    def step(self, model: Seq2Seq, input_ids: Tensor, sizes: tuple[int, ...], last_only: bool) -> Tensor:
        documents = enumerate(input_ids.split(list(sizes)))
        return torch.cat([self._one(model, b, ids, last_only) for b, ids in documents if ids.numel()])

    def _one(self, model: Seq2Seq, index: int, new: Tensor, last_only: bool) -> Tensor:
        if self.lengths[index] + new.numel() > self.capacity:
            raise ValueError(f"{self.lengths[index] + new.numel()} tokens do not fit a cache of {self.capacity}")
        start = new.new_tensor([model.start])
        source, old = self.sources[index], self.answers[index].to(new.device)
        if source is None:
            if not last_only:
                raise ValueError("a source has no logits of its own: ask for the last ones only")
            source = self.sources[index] = model.encode(new)
            run, count = start, 1
        else:
            self.answers[index] = torch.cat([old, new])
            count = new.numel()
            run = new if self.states[index] is not None else torch.cat([start, self.answers[index]])
        out = model.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=source),
            decoder_input_ids=run[None],
            past_key_values=self.states[index],
            use_cache=True,
        )
        self.states[index] = out.past_key_values
        logits_NV: Tensor = out.logits[0, -(1 if last_only else count) :].float()
        return logits_NV
