"""Paged state: bit for bit what state in memory does, whatever the budget; the file, its room and its end."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from halfbyte import files, rawfile
from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError
from halfbyte.optim import OptimOptions, adamw, held, paged
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.paged import PagedStates
from halfbyte.train import checkpoint

SHAPES = {"a": (90, 70), "norm": (33,), "b": (40, 130), "c": (257, 64), "scalar": (1,)}
KINDS = [("adamw", torch.float32), ("adamw", torch.bfloat16), ("adamw_8bit", torch.float32)]
KINDS += [("adamw_8bit", torch.bfloat16)]


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages, and tensors that are in several."""
    monkeypatch.setattr(adamw, "CHUNK", 1024)
    monkeypatch.setattr(paged, "PAGE_ELEMENTS", 2048)


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}


def backward(params: dict[str, nn.Parameter], step: int, leave_out: str = "") -> None:
    """A backward pass whose gradients are random: through autograd, so that hooks run and gradients accumulate."""
    generator = torch.Generator().manual_seed(step)
    total = torch.zeros((), dtype=torch.float32)
    for name, p in params.items():
        noise = torch.randn(p.shape, generator=generator)
        if name != leave_out:
            total = total + (p * noise.to(p.dtype)).sum()
    total.backward()


def make(params: dict[str, nn.Parameter], folder: Path | None, optim: str, **options: Any) -> AdamW:
    return AdamW(params, OptimOptions.model_validate({"optim": optim, "weight_decay": 0.1} | options), folder)


def train(optimizer: AdamW, params: dict[str, nn.Parameter], steps: range, micro_batches: int = 2) -> list[float]:
    norms = []
    for step in steps:
        optimizer.zero_grad()
        for index in range(micro_batches):
            backward(params, 10 * step + index, leave_out="b" if step == 1 else "")
        norms.append(optimizer.grad_norm())
        optimizer.step(1e-2, 0.5)
    return norms


def open_files() -> list[str]:
    return [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]


@pytest.mark.parametrize(("optim", "dtype"), KINDS)
@pytest.mark.parametrize("budget", [0, 60_000, 10**9])
def test_it_equals_memory_bit_for_bit(tmp_path: Path, optim: str, dtype: torch.dtype, budget: int) -> None:
    """Weights, norms and every tensor of the state, over steps with two micro-batches and a parameter left out."""
    plain, in_pages = parameters(dtype), parameters(dtype)
    first = make(plain, None, optim)
    second = make(in_pages, tmp_path, f"paged_{optim}", optim_memory=budget)
    assert isinstance(second.store, PagedStates)
    assert len(second.store.pages) > 5
    kept = sum(page.held is not None for page in second.store.pages)
    assert (kept == 0, kept == len(second.store.pages)) == (budget == 0, budget == 10**9)
    assert train(first, plain, range(4)) == train(second, in_pages, range(4))
    for name, p in plain.items():
        assert torch.equal(p, in_pages[name]), name
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
    assert first.nbytes == second.nbytes
    second.close()


@pytest.mark.parametrize(("optim", "dtype"), KINDS)
def test_checkpoints_go_both_ways(tmp_path: Path, optim: str, dtype: torch.dtype) -> None:
    """Paged state resumes as plain state and the other way round, bit for bit."""
    straight = parameters(dtype)
    reference = make(straight, None, optim)
    train(reference, straight, range(5))
    for i, (before, after) in enumerate([(f"paged_{optim}", optim), (optim, f"paged_{optim}")]):
        params = parameters(dtype)
        optimizer = make(params, tmp_path, before, optim_memory=0)
        train(optimizer, params, range(3))
        folder = checkpoint.save(tmp_path / str(i), 3, params, optimizer.planned(), {})
        optimizer.close()
        found = checkpoint.load(folder)
        resumed = parameters(dtype, seed=9)
        with torch.no_grad():
            for name, p in resumed.items():
                p.copy_(found.trainable[name])
        optimizer = make(resumed, tmp_path, after, optim_memory=0)
        optimizer.load_state_dict(found.optimizer)
        train(optimizer, resumed, range(3, 5))
        for name, p in straight.items():
            assert torch.equal(p, resumed[name]), (before, name)
        state = optimizer.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in reference.state_dict().items())
        optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_by_layer_it_equals_whole_gradients(tmp_path: Path, dtype: torch.dtype) -> None:
    plain, by_layer = parameters(dtype), parameters(dtype)
    first = make(plain, None, "adamw")
    second = make(by_layer, tmp_path, "paged_adamw", optim_memory=30_000, per_layer_updates=True)
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        backward(plain, step)
        first.step(1e-2)
        with second.updating(1e-2):
            backward(by_layer, step)
        assert all(p.grad is None for p in by_layer.values())
        assert second.grad_norm() == pytest.approx(first.grad_norm(), rel=1e-6)
    for name, p in plain.items():
        assert torch.equal(p, by_layer[name]), name
    second.close()


def test_gradients_do_not_stand_and_the_norm_is_of_the_sum(tmp_path: Path) -> None:
    params = parameters(torch.float32)
    optimizer = make(params, tmp_path, "paged_adamw", optim_memory=0)
    backward(params, 1)
    assert all(p.grad is None for p in params.values())
    one = optimizer.grad_norm()
    backward(params, 1)
    assert optimizer.grad_norm() == pytest.approx(2 * one, rel=1e-6)
    optimizer.zero_grad()
    assert optimizer.grad_norm() == 0.0
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step(1e-2)
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    optimizer.close()
    backward(params, 1)
    assert all(p.grad is not None for p in params.values())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="a system without /proc")
def test_the_file_has_no_name_its_room_is_taken_and_it_goes(tmp_path: Path) -> None:
    params = parameters(torch.float32)
    optimizer = make(params, tmp_path / "elsewhere", "paged_adamw", optim_memory=0)
    assert isinstance(optimizer.store, PagedStates)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (link,) = [name for name in open_files() if str(tmp_path) in name]
    assert link.endswith(".partial (deleted)")
    stat = os.fstat(optimizer.store._fd)
    elements = sum(p.numel() for p in params.values())
    assert stat.st_size == optimizer.store.file_bytes >= 12 * elements
    assert stat.st_blocks * 512 >= stat.st_size
    optimizer.close()
    assert not [name for name in open_files() if str(tmp_path) in name]


def test_memory_holds_two_pages_and_the_budget(tmp_path: Path) -> None:
    params = {"w": nn.Parameter(torch.zeros(200_000))}
    optimizer = make(params, tmp_path, "paged_adamw", optim_memory=500_000)
    store = optimizer.store
    assert isinstance(store, PagedStates)
    kept = sum(page.held.nbytes for page in store.pages if page.held is not None)
    largest = max(page.nbytes for page in store.pages)
    assert 500_000 - largest < kept <= 500_000
    assert [buffer.nbytes for buffer in store._buffers] == [largest, largest]
    optimizer.close()


def test_a_disk_without_room_is_said_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(DoesNotFit, match=r"the file of the optimizer's state .* needs 0\.00 GB"):
        make(parameters(torch.float32), tmp_path, "paged_adamw", optim_memory=0)
    monkeypatch.undo()

    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFit, match="the disk became full"):
        make(parameters(torch.float32), tmp_path, "paged_adamw", optim_memory=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["read_into", "write_from"])
def test_a_disk_that_fails_in_the_thread_is_an_error_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    params = parameters(torch.float32)
    optimizer = make(params, tmp_path, "paged_adamw", optim_memory=0)
    train(optimizer, params, range(1))
    backward(params, 5)
    original, calls = getattr(rawfile, function), 0

    def failing(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(*arguments)

    monkeypatch.setattr(rawfile, function, failing)
    with pytest.raises(HalfbyteError, match="Input/output error"):
        optimizer.step(1e-2)
    optimizer.close()


def test_without_a_folder_it_is_refused() -> None:
    with pytest.raises(UsageError, match="set optim_offload_dir"):
        make(parameters(torch.float32), None, "paged_adamw")


def test_on_a_gpu_large_tensors_are_managed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be seen without a GPU: who allocates what, and the interface through which CUDA would see it."""
    asked: list[tuple[int, torch.dtype]] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append((shape[0], dtype))
        return torch.zeros(shape, dtype=dtype)

    bnb = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(bnb, "get_paged", get_paged)
    seen: list[dict[str, Any]] = []

    def as_tensor(array: Any, device: torch.device) -> torch.Tensor:
        seen.append(array.__cuda_array_interface__)
        return array.host  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    cuda = torch.device("cuda", 0)
    kinds = {torch.float32: "<f4", torch.uint8: "|u1", torch.int16: "<i2"}
    for dtype, code in kinds.items():
        tensor = held.managed(200_000, dtype, cuda)
        assert asked[-1] == (200_000, dtype)
        assert (seen[-1]["typestr"], seen[-1]["shape"]) == (code, (200_000,))
        assert seen[-1]["data"] == (tensor.data_ptr(), False)
    held.managed(200_000, torch.float32, torch.device("cpu"))
    assert len(asked) == 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
