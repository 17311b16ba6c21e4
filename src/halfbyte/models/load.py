"""From options to a model in memory: tensor by tensor, quantized on the way in.

Peak memory is the finished model plus at most two tensors in their source type: each is read, cast or
quantized, and dropped before the next.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.heap import give_back
from halfbyte.models.classifier import Classifier, HeadOptions, make_head
from halfbyte.models.decoder import Decoder
from halfbyte.models.dtype import fast_dtype
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.models.stored import StoredWeight
from halfbyte.ops import native
from halfbyte.quant import DTYPES, DenseWeight, QuantOptions, Weight, quantize

log = logging.getLogger(__name__)


EMBEDDING = "model.embed_tokens.weight"
LARGE = 1 << 23  # elements


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for adapters or inference. `spec` is None for architectures that the fallback serves."""

    model: nn.Module
    tokenizer: Any
    spec: ModelSpec | None
    source: ModelSource


def load_model(
    options: ModelOptions,
    quant: QuantOptions | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: torch.device | str | None = None,
    source: ModelSource | None = None,
    head: HeadOptions | None = None,
) -> LoadedModel:
    """Open `options.model` and build it, its linears quantized when `quant` is given.

    dtype   type of computation and of what stays unquantized; None: the options'; "auto": see `resolve_dtype`
    device  None: the options'
    source  `options.model`, where it has been opened before: its tokenizer is not made a second time
    head    make a classifier with this head of it; None: a language model

    Raises UsageError for files that are not a whole model.
    """
    source = source or open_source(options.model, options.revision)
    target = resolve_device(options.device) if device is None else torch.device(device)
    kind = resolve_dtype(options.dtype if dtype is None else dtype, target)
    tokenizer = source.tokenizer()  # first: building one takes memory that is given back before the weights come
    give_back()
    if ModelSpec.serves(source.config):
        spec = ModelSpec.from_config(source.config)
        spec = spec if head is None else spec.without_head()
        decoder = build_decoder(source, spec, quant, kind, target)
        give_back()
        return LoadedModel(_with_head(decoder, spec.hidden_size, head, source), tokenizer, spec, source)
    # Imports transformers' models: memory that the decoder does without.
    from halfbyte.models.fallback import Fallback, FallbackBody
    from halfbyte.models.seq2seq import Seq2Seq

    share = 1 - options.allow_unquantized_share
    if head is not None:
        body = FallbackBody.build(source, quant, kind, target, share)
        return LoadedModel(_with_head(body, body.width, head, source), tokenizer, None, source)
    if source.config.get("is_encoder_decoder"):
        pair = Seq2Seq.build(source, quant, kind, target, share)
        pair.begin_with(source.config, source.generation)
        return LoadedModel(pair, tokenizer, None, source)
    return LoadedModel(Fallback.build(source, quant, kind, target, share), tokenizer, None, source)


def _with_head(body: Any, width: int, head: HeadOptions | None, source: ModelSource) -> nn.Module:
    """The body itself, or the classifier that it is the body of."""
    if head is None:
        return body  # type: ignore[no-any-return]
    return Classifier(body, make_head(source, width, head, body.device), head.labels)


def build_decoder(
    source: ModelSource,
    spec: ModelSpec,
    quant: QuantOptions | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """The decoder with this source's weights. Shapes are checked against the config before a weight is read."""
    check_tensors(source, spec)
    if quant is not None:
        check_pattern(quant, spec)

    def tensor(name: str) -> Tensor:
        # Norms and biases keep the file's type: they are small, and rounding them is not the base that was asked for.
        return source.read(name).to(device)

    def weight(name: str, quantizable: bool) -> Weight:
        if name == EMBEDDING and not spec.tied and device.type == "cpu" and source.reads_rows(name):
            return StoredWeight(source, name, dtype)
        made = read_weight(source, name, quant, dtype, device, quantizable)
        if made.shape[0] * made.shape[1] >= LARGE:
            give_back()  # of quantizing it: tens of such leftovers would be on top of the finished model
        return made

    return Decoder.build(spec, weight, tensor, dtype)


def check_pattern(quant: QuantOptions, spec: ModelSpec) -> None:
    """UsageError for a key of `quant_pattern` that is no module of this model."""
    others = {name.rsplit(".", 1)[0] for name, _ in spec.tensors()} | {"lm_head"}
    quant.require_modules([linear.name for linear in spec.linears()], others)


def check_tensors(source: ModelSource, spec: ModelSpec) -> None:
    """UsageError for the first tensor that the config promises and the files lack or have in another shape."""
    for name, shape in spec.tensors():
        found = source.info(name)
        if found.shape != shape:
            raise UsageError(
                f"{source.path}: tensor {name} is {list(found.shape)}, and the config says {list(shape)}: config and "
                "weights are not of the same model"
            )
        if not found.dtype.is_floating_point or found.dtype.itemsize == 1:
            raise UsageError(
                f"{source.path}: tensor {name} holds {str(found.dtype).removeprefix('torch.')}; weights in bfloat16, "
                "float16 or float32 (or bitsandbytes 4-bit) can be read: use the unquantized model"
            )


def read_weight(
    source: ModelSource,
    name: str,
    quant: QuantOptions | None,
    dtype: torch.dtype,
    device: torch.device,
    quantizable: bool = True,
) -> Weight:
    """One matrix: as the file quantized it, quantized now, or dense in `dtype`.

    A file's own blocks are kept where `quant` is given, whatever its format says, unless it asks to `requantize`:
    quantizing twice loses twice. So is what such a file left unquantized. Without `quant` blocks are dequantized.
    Embeddings and heads are not `quantizable`.
    """
    module = name.removesuffix(".weight")
    if quant is not None and not quant.requantize and (not quantizable or quant.format_of(module) not in DTYPES):
        ready = source.prequantized(name)
        if ready is not None:
            return ready.to(device)
        if source.blocks is not None:
            quant = None
    where = f"{source.path}: {name}"
    return _held(where, module, source.read(name), quant if quantizable else None, dtype, device)


def _held(
    where: str, module: str, tensor: Tensor, quant: QuantOptions | None, dtype: torch.dtype, device: torch.device
) -> Weight:
    """`tensor` as `quant` wants it for this module, dense in `dtype` without; `where` is for the message."""
    tensor = tensor.to(device)
    if quant is None:
        return DenseWeight(tensor.to(held_dtype(tensor.dtype, dtype, device)))
    chosen = quant.format_of(module)
    if chosen in DTYPES:
        return DenseWeight(tensor.to(DTYPES[chosen]))
    options = quant if chosen == quant.quant_type else quant.model_copy(update={"quant_type": chosen})
    try:
        return quantize(tensor, options)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def held_dtype(file: torch.dtype, compute: torch.dtype, device: torch.device) -> torch.dtype:
    """What an unquantized matrix is held in.

    The native engine reads 16-bit matrices in place whatever it computes in, and as float32 they would only be twice as
    large; everybody else wants the type of the computation.
    """
    in_place = device.type == "cpu" and compute == torch.float32 and native.multiplies(compute)
    return file if in_place and file.itemsize == 2 else compute


def resolve_device(name: str) -> torch.device:
    """ "auto" takes CUDA where torch sees a GPU; asking for a GPU that is not there is an error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for, and torch sees no CUDA GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 where it is fast (measured on a CPU), else float32 or an old GPU's float16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
    if device.type == "cuda":
        kind = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        log.info("computing in %s on %s", kind, device)
        return kind
    kind, reason = fast_dtype()
    log.info("computing in %s", reason)
    return kind
