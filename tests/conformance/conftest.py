"""Each test that takes `route` runs twice: against halfbyte directly, and through bitsandbytes with its backend on."""

from collections.abc import Iterator

import pytest
import torch

from halfbyte import bnb_backend
from halfbyte.ops import native
from tests.conformance.routes import Direct, Reference, Registered


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registered() -> Iterator[Registered]:
    """bitsandbytes with halfbyte's kernels, given back afterwards."""
    if native.library() is None:
        pytest.skip("no native kernels here")
    route = Registered()
    bnb_backend.enable()
    assert bnb_backend.enabled()
    yield route
    bnb_backend.disable()


@pytest.fixture(params=["direct", "registered"])
def route(request: pytest.FixtureRequest) -> Direct | Registered:
    if request.param == "direct":
        return Direct()
    found: Registered = request.getfixturevalue("registered")
    return found


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
