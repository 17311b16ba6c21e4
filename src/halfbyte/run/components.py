"""Where a run's memory went: the tensors that it holds are counted, and the rest of the measured peak is what is left.

    runtime                 the process before the model was loaded: Python, its libraries, the prepared rows
    base weights            the frozen model, or under full fine-tuning the trained one
    quantization constants  of the base weights; those among the codes, as in GGUF's blocks, are base weights
    adapters                what is trained on top, with whole modules where they are
    gradients, optimizer    as the loop counts them (`train.state.TrainResult`)
    activations and the rest  the peak at the end of training less all of these: activations, the loss, workspaces, and
                            where loading or an evaluation took more than an update, what that took

Bytes of a CPU's process that did nothing but this run, from its first update to its last: the peak of any other is not
only the run's, and nothing is told. Nor is it on a GPU, where the process holds something else than the card.
"""

from collections.abc import Mapping

import torch
from torch import nn

from halfbyte.quant.weight import Weight
from halfbyte.train.state import TrainResult

REST = "activations and the rest"


def of_model(model: nn.Module, trainable: Mapping[str, nn.Parameter], full: bool) -> dict[str, int]:
    """Bytes of the tensors in `model`, each counted once however many modules hold it. `full`: the base is trained."""
    ours = set() if full else {id(parameter) for parameter in trainable.values()}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    constants = sum({id(m): m.constants_nbytes for m in model.modules() if isinstance(m, Weight)}.values())
    adapters = sum(tensor.nbytes for key, tensor in tensors.items() if key in ours)
    base = sum(tensor.nbytes for key, tensor in tensors.items() if key not in ours)
    return {"base weights": base - constants, "quantization constants": constants, "adapters": adapters}


def measured(runtime: int, weights: Mapping[str, int], trained: TrainResult, device: torch.device) -> dict[str, int]:
    """All components, of the peak at the end of training; nothing where the weights are on another device."""
    if device.type != "cpu":
        return {}
    held = {"runtime": runtime, **weights, **trained.memory_by_component}
    return held | {REST: max(0, trained.peak_memory_bytes - sum(held.values()))}
