"""safetensors files in pieces: what safetensors reads of ours, and we of its, and what is no such file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.rawfile import CutOff
from halfbyte.tensorfile import Planned, TensorFile, largest_items_first, layout_of, part_of, write_file

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "short": torch.arange(-3, 2, dtype=torch.int16),
    "step": torch.tensor(17),
    "float": torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1)),
    "empty": torch.zeros(0, 4),
}


def test_both_ways(tmp_path: Path) -> None:
    write_file(tmp_path / "ours", largest_items_first([Planned.of(name, t) for name, t in TENSORS.items()]))
    save_file(TENSORS, tmp_path / "theirs")
    for read in (load_file(tmp_path / "ours"), TensorFile(tmp_path / "ours"), TensorFile(tmp_path / "theirs")):
        assert set(read) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name


def test_parts_and_layouts_without_the_rest(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    for tensors in (TENSORS, TensorFile(tmp_path / "file")):
        assert torch.equal(part_of(tensors, "float", 5, 23), TENSORS["float"].view(-1)[5:23])
        assert layout_of(tensors, "half") == (torch.Size([3, 5]), torch.bfloat16)
    with pytest.raises(IndexError, match="has 15 elements"):
        TensorFile(tmp_path / "file").part("half", 3, 16)


def test_pieces_are_joined_and_counted(tmp_path: Path) -> None:
    pieces = Planned("w", (6, 2), torch.float32, lambda: iter(torch.arange(12.0).view(6, 2).split(4)))
    heard: list[int] = []
    write_file(tmp_path / "file", [pieces], heard.append)
    assert heard == [32, 16]
    assert torch.equal(TensorFile(tmp_path / "file")["w"], torch.arange(12.0).view(6, 2))
    with pytest.raises(ValueError, match="8 bytes came, 48 were planned"):
        write_file(tmp_path / "file", [Planned("w", (6, 2), torch.float32, lambda: iter((torch.zeros(2),)))])
    with pytest.raises(ValueError, match=r"a piece in torch\.float64"):
        write_file(tmp_path / "file", [Planned("w", (1,), torch.float32, lambda: iter((torch.zeros(1).double(),)))])


def test_damaged_files_are_refused_in_words(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header changed: an error of the kinds that the docstring names."""
    save_file(TENSORS, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        if generator.random() < 0.5:
            del damaged[generator.randrange(len(whole)) :]
        else:
            damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            for tensor in TensorFile(tmp_path / "damaged").values():
                assert tensor.numel() < 100
        except (ValueError, OSError, CutOff):
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("entry", [{"shape": [2]}, {"data_offsets": [-4, 0]}, {"dtype": "F8_E4M3"}, {"shape": "xy"}])
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="header"):
        TensorFile(tmp_path / "file")


@pytest.mark.parametrize("kind", ["halfbyte.models.pread.OpenFile", "halfbyte.tensorfile.TensorFile"])
def test_files_that_are_open_at_exit_are_closed_without_a_word(kind: str, tmp_path: Path) -> None:
    """A module that is needed for it may be taken apart before the last objects go."""
    path = tmp_path / "tensors.safetensors"
    write_file(path, [Planned.of("a", torch.zeros(3))])
    module, name = kind.rsplit(".", 1)
    program = f"import os; from pathlib import Path; from {module} import {name}\nos.kept = {name}(Path({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
