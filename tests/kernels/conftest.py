"""Fixtures that run the Triton kernels on a CPU through Triton's interpreter, and on a GPU if there is one.

Triton decides at import whether a function is interpreted. These fixtures replace the Triton functions while a test
module runs and restore them afterwards, so the tests do not depend on the environment or on the order of imports.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import dit_rewrite.kernels


def kernel_modules() -> list[ModuleType]:
    """Import and return every module under `dit_rewrite.kernels`."""
    found = pkgutil.walk_packages(dit_rewrite.kernels.__path__, "dit_rewrite.kernels.")
    return [importlib.import_module(module.name) for module in found]


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Replace each Triton function of the kernels and of Triton's own library by its interpreted version."""
    import triton.experimental.gluon  # noqa: F401  otherwise the first launch imports it and fails on the replacements
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    interpreted = quicker(patch)
    for module in (tl, tl.standard, *kernel_modules()):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                patch.setattr(module, name, interpreted(value.fn))
    correct_bfloat16(patch)


def quicker(patch: pytest.MonkeyPatch) -> Any:
    """Return a class that interprets a function without two needless costs, which are more than half of the time.

    The interpreter patches Triton's language at each call of a device function, although its launch has done so. And
    it computes whether integers overflow, for an assertion that is off unless the kernel is debugged.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import InterpretedFunction

    class PatchedOnce(InterpretedFunction):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if any(map(tl.core.is_builtin, (tl.load, tl.core.load))):
                return super().__call__(*args, **kwargs)
            return self.rewrite()(*args, **kwargs)

    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)
    return PatchedOnce


def correct_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Fix the interpreter's bfloat16: it multiplies the raw integer bits, and truncates where GPUs round."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        if dtype.scalar != tl.bfloat16:
            return truncate(self, source, dtype)
        bits = torch.from_numpy(np.asarray(source.data, np.float32)).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    patch.setattr(InterpreterBuilder, "create_dot", dot)
    patch.setattr(InterpreterBuilder, "create_fp_trunc", rounded)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the kernels under test. Uninitialised memory is filled with NaN (deterministic algorithms)."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("triton")
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            interpret(patch)
        yield request.param
    torch.use_deterministic_algorithms(False)
