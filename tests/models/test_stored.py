"""An embedding that stays in its file gives what a held one gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.models.source import open_source
from halfbyte.models.stored import StoredWeight
from halfbyte.quant import DenseWeight
from tests.models.families import config


@pytest.fixture
def stored(tmp_path: Path) -> tuple[StoredWeight, torch.Tensor]:
    made = config("llama2-mha-tied")
    made.save_pretrained(tmp_path)
    values = torch.randn(133, 96)
    save_file({"model.embed_tokens.weight": values}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    return StoredWeight(source, "model.embed_tokens.weight", torch.bfloat16), values


def test_rows_are_those_of_a_held_weight(stored: tuple[StoredWeight, torch.Tensor]) -> None:
    weight, values = stored
    held = DenseWeight(values.bfloat16())
    for index in ([0], [132, 0, 5, 6, 7, 5, 131], list(range(133)), []):
        for dtype in (torch.bfloat16, torch.float32):
            rows = torch.tensor(index, dtype=torch.int64)
            assert torch.equal(weight.look_up(rows, dtype), held.look_up(rows, dtype))
    assert torch.equal(weight.dequantize(torch.float32), held.dequantize(torch.float32))
    out = torch.empty(3, 96)
    assert weight.dequantize(torch.float32, out=out, rows=slice(4, 7)) is out
    assert torch.equal(out, held.dequantize(torch.float32, rows=slice(4, 7)))


def test_it_holds_nothing(stored: tuple[StoredWeight, torch.Tensor]) -> None:
    weight, _ = stored
    assert weight.nbytes == 0
    assert weight.shape == (133, 96)
    assert weight.native_view() is None
    assert weight.trainable_tensor() is None


def test_the_file_may_be_deleted_while_it_is_open(stored: tuple[StoredWeight, torch.Tensor]) -> None:
    weight, values = stored
    (weight.source.path / "model.safetensors").unlink()
    assert torch.equal(weight.look_up(torch.tensor([3]), torch.bfloat16)[0], values[3].bfloat16())


def test_rows_beyond_the_vocabulary_are_refused(stored: tuple[StoredWeight, torch.Tensor]) -> None:
    weight, _ = stored
    with pytest.raises(IndexError, match="133 words"):
        weight.look_up(torch.tensor([133]), torch.float32)
    with pytest.raises(IndexError, match="133 words"):
        weight.look_up(torch.tensor([-1]), torch.float32)
