"""Classification by likelihood: which label would the model say next?

Each label's tokens are scored after the prompt, and the label with the largest sum of log-probabilities wins. The sum
is not divided by the label's length: it is the probability of saying that label and nothing else, which is what
training maximizes. The end-of-text token counts only where one label's tokens begin another's ("5" and "50"); else it
says nothing about which label it is.

What is shared is computed once: the prompt is read one time for all labels, tokens that all labels begin with belong
to the prompt, and labels of a single token need nothing more than the prompt's last logits.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.evaluate.generate import batches
from halfbyte.evaluate.session import Model, Session, inference
from halfbyte.models.seq2seq import Seq2Seq


def score_labels(
    model: Model,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    batch_size: int = 32,
    on_done: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Log-likelihood of every label after every prompt, [prompts, labels]; `labels` are token ids with their EOS.

    Tokens that all labels share at their beginning are left out of the sums. `on_done` hears how many prompts are done.
    """
    shared, endings = distinct_parts(labels)
    if isinstance(model, Seq2Seq):  # its prompt is another text, to which an answer's tokens cannot be moved
        shared, endings = (), [(*shared, *ending) for ending in endings]
    longest = max(map(len, endings))
    scores = np.zeros((len(prompts), len(labels)), dtype=np.float64)
    full = [[*map(int, prompt), *shared] for prompt in prompts]
    done = 0
    with inference(model):
        for batch in batches([len(ids) + longest for ids in full], batch_size):
            scores[batch] = _score_batch(model, [full[i] for i in batch], endings, longest)
            done += len(batch)
            if on_done is not None:
                on_done(done)
    return scores


def _score_batch(
    model: Model, prompts: list[list[int]], endings: list[tuple[int, ...]], longest: int
) -> NDArray[np.float64]:
    session = Session(model, max(map(len, prompts)) + longest, len(prompts))
    first_BV = session.feed(prompts)
    first_B = _normalizers(first_BV)
    columns = []
    for ending in endings:
        total_B = (first_BV[:, ending[0]] - first_B).double()
        if len(ending) > 1:
            with session.branch():
                total_B = total_B + _rest(session, ending, len(prompts))
        columns.append(total_B.cpu())
    return torch.stack(columns, 1).numpy()


def _rest(session: Session, ending: tuple[int, ...], count: int) -> Tensor:
    """Summed log-probability of a label's tokens after its first, for each of `count` prompts."""
    logits_BLV = session.feed_all([ending[:-1]] * count).unflatten(0, (count, len(ending) - 1))
    targets_L = torch.tensor(ending[1:], device=logits_BLV.device)
    chosen_BL = logits_BLV.gather(2, targets_L.expand(count, -1)[..., None])[..., 0]
    chosen_BL = chosen_BL - _normalizers(logits_BLV.flatten(0, 1)).unflatten(0, (count, -1))
    total_B: Tensor = chosen_BL.double().sum(1)
    return total_B


def _normalizers(logits_NV: Tensor) -> Tensor:
    """log sum exp of each row, [N]; row by row, because another copy of logits over a large vocabulary is large."""
    return torch.stack([row_V.logsumexp(-1) for row_V in logits_NV])


def distinct_parts(labels: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """(tokens that all labels begin with, what follows them in each), the common last token dropped where it may be."""
    if len(labels) < 2 or len(set(map(tuple, labels))) < len(labels) or not all(labels):
        raise ValueError(f"a choice needs at least two different labels of at least one token, not {labels}")
    parts = [tuple(map(int, label)) for label in labels]
    if len({part[-1] for part in parts}) == 1 and _tell_apart([part[:-1] for part in parts]):
        parts = [part[:-1] for part in parts]
    common = 0
    while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
        common += 1
    return parts[0][:common], [part[common:] for part in parts]


def _tell_apart(parts: Sequence[tuple[int, ...]]) -> bool:
    """Whether no label is empty or the beginning of another."""
    return all(parts) and not any(a != b and a == b[: len(a)] for a in parts for b in parts) and len(set(parts)) > 1
