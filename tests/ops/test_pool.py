"""The pool of activations: reuse, what is held, and that nothing alive is ever handed out again."""

import gc
import random
import threading

import pytest
import torch

from halfbyte.ops import pool
from halfbyte.ops.pool import SMALLEST, Pool, empty


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(pool, "pool", made)
    return made


def test_memory_is_reused_when_the_last_tensor_is_gone(fresh: Pool) -> None:
    first = empty((1024, 512), torch.bfloat16)
    place, view = first.data_ptr(), first[3:].t()
    del first
    other = empty((1024, 512), torch.bfloat16)  # a view of the first is alive
    apart = other.data_ptr() != place
    assert apart
    del view
    again = empty((1024, 500), torch.bfloat16)  # smaller by less than an eighth
    assert again.data_ptr() == place
    assert again.shape == (1024, 500)
    assert again.is_contiguous()


def test_small_tensors_are_torchs(fresh: Pool) -> None:
    empty((SMALLEST // 4 - 1,), torch.float32)
    assert fresh.held == 0
    assert empty((0, 5), torch.float32).shape == (0, 5)


def test_autograd_keeps_what_it_saved(fresh: Pool) -> None:
    x = empty((512, 512), torch.float32).fill_(2.0).requires_grad_()
    y = (x * x).sum()
    del x
    gc.collect()
    used = fresh.used
    assert used == 512 * 512 * 4
    y.backward()
    del y
    assert fresh.used == 0
    assert fresh.held == used


def test_no_more_is_held_than_was_used_at_once(fresh: Pool) -> None:
    random.seed(0)
    alive = []
    for _ in range(300):
        alive.append(empty((random.randint(1, 40), 1 << 16), torch.float32))
        while alive and (len(alive) > 6 or random.random() < 0.4):
            alive.pop(random.randrange(len(alive)))
        assert fresh.used <= fresh.held <= fresh.peak
    alive.clear()
    assert fresh.used == 0
    fresh.clear()
    assert fresh.held == 0


def test_live_tensors_never_share(fresh: Pool) -> None:
    failures = []

    def work(seed: int) -> None:
        rng, alive = random.Random(seed), []
        for step in range(200):
            tensor = empty((rng.randint(1, 3), 1 << 16), torch.float32).fill_(seed * 1000 + step)
            alive.append((tensor, seed * 1000 + step))
            if len(alive) > 4:
                alive.pop(rng.randrange(4))
            failures.extend(value for t, value in alive if not bool((t == value).all()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert fresh.used == 0
