"""Label scores against transformers' log-likelihoods of prompt and label written out."""

import numpy as np
import pytest
import torch

import halfbyte.evaluate.generate as generate_module
from halfbyte.evaluate.labels import distinct_parts, score_labels
from tests.evaluate.conftest import Tiny

EOS = 256
PROMPTS = [[72, 105, 33], [9] * 17, [5, 4, 3, 2, 1], [200]]


def reference(tiny: Tiny, prompt: list[int], label: list[int]) -> float:
    """log p(label | prompt) by one uncached forward of transformers' model."""
    ids = torch.tensor([[*prompt, *label]])
    with torch.no_grad():
        logprobs = tiny.reference(ids, use_cache=False).logits[0].log_softmax(-1)
    positions = range(len(prompt) - 1, len(prompt) + len(label) - 1)
    return float(sum(logprobs[at, token] for at, token in zip(positions, label, strict=True)))


@pytest.mark.parametrize(
    ("labels", "shared", "scored"),
    [
        ([[65, EOS], [66, EOS]], [], [[65], [66]]),
        ([[32, 65, 70, EOS], [32, 66, EOS], [32, 67, 68, 69, EOS]], [32], [[65, 70], [66], [67, 68, 69]]),
        ([[53, EOS], [53, 48, EOS]], [53], [[EOS], [48, EOS]]),  # "5" begins "50": where it ends decides
    ],
)
def test_scores_are_transformers(
    tiny: Tiny, labels: list[list[int]], shared: list[int], scored: list[list[int]]
) -> None:
    expected = [[reference(tiny, [*prompt, *shared], ending) for ending in scored] for prompt in PROMPTS]
    found = score_labels(tiny.model, PROMPTS, labels, batch_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_batches_and_progress(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [[65, 1, EOS], [66, EOS]]
    whole = score_labels(llama.model, PROMPTS, labels)
    monkeypatch.setattr(generate_module, "BATCH_TOKENS", 20)
    seen: list[int] = []
    np.testing.assert_allclose(
        score_labels(llama.model, PROMPTS, labels, on_done=seen.append), whole, rtol=1e-4, atol=1e-5
    )
    assert seen[-1] == 4
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("labels", "shared", "endings"),
    [
        ([[1, 9], [2, 9]], (), [(1,), (2,)]),
        ([[7, 1, 9], [7, 2, 9]], (7,), [(1,), (2,)]),
        ([[7, 9], [7, 8, 9]], (7,), [(9,), (8, 9)]),
        ([[7, 8], [7, 9]], (7,), [(8,), (9,)]),  # no common end to drop
        ([[1], [2], [3]], (), [(1,), (2,), (3,)]),  # dropping it would leave nothing
        ([[1, 2, 9], [1, 9], [3, 9]], (), [(1, 2, 9), (1, 9), (3, 9)]),
    ],
)
def test_distinct_parts(labels: list[list[int]], shared: tuple[int, ...], endings: list[tuple[int, ...]]) -> None:
    assert distinct_parts(labels) == (shared, endings)


@pytest.mark.parametrize("labels", [[], [[1, 2]], [[1, 2], [1, 2]], [[1], []]])
def test_what_is_no_choice(labels: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least two different labels"):
        distinct_parts(labels)
