"""The setup of every test: one thread, an empty compile cache, and a generator with the same state."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("search")
settings.load_profile("fixed")


def pytest_report_header() -> str:
    """Print the torch version of the tests at the top of their output."""
    return f"torch: {torch.__version__}"


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """Sums of floating-point numbers depend on how they are split among threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of the machine go to a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """Exempt what is alive now from garbage collection.

    Most of it is the modules of torch, and a rewritten model collects garbage after each compile.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget compiled code, and restore the state of the random generator."""
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.compiler.reset()
