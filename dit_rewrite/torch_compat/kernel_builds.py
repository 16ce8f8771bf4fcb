"""Kernels that Inductor builds while it generates the code of further graphs.

Inductor starts a C++ compiler or a Triton worker for each kernel of a graph, and waits for them when it loads the code
of the graph. Several graphs that are lowered one after the other would each wait for their own kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from dit_rewrite.torch_compat.names import find, get

_lock = threading.Lock()
_started = threading.local()  # ``builds``: those of this thread, within `KernelBuilds.started`


class _Kernel:
    """A kernel that may still be built. Its first use waits for it, and puts it in its own place."""

    def __init__(self, scope: dict[str, Any], name: str, future: Any) -> None:
        self._scope, self._name, self._future = scope, name, future
        self._kernel: Any = None

    def wait(self) -> Any:
        """Return the built kernel. Raises the error of the build."""
        if self._future is not None:
            self._kernel, self._future = self._future.result(), None  # asked once: a result may be made anew
            if self._scope.get(self._name) is self:
                self._scope[self._name] = self._kernel
        return self._kernel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wait()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wait(), name)


class KernelBuilds:
    """The kernels of several graphs, which are built at the same time."""

    _installed = 0  # contexts that are open in all threads
    _original: Callable[..., None]

    def __init__(self) -> None:
        self._kernels: list[_Kernel] = []

    @contextmanager
    def started(self) -> Iterator[None]:
        """Within this context, Inductor does not wait for kernels in this thread."""
        compiler = find("torch._inductor.async_compile.AsyncCompile")
        outer, _started.builds = getattr(_started, "builds", None), self
        with _lock:
            KernelBuilds._installed += 1
            if KernelBuilds._installed == 1:
                KernelBuilds._original = get(compiler, "AsyncCompile.wait")
                compiler.wait = _wait
        try:
            yield
        finally:
            _started.builds = outer
            with _lock:
                KernelBuilds._installed -= 1
                if not KernelBuilds._installed:
                    compiler.wait = KernelBuilds._original

    def finish(self) -> None:
        """Wait until all kernels are built. Raises the error of a kernel that was not."""
        for kernel in self._kernels:
            kernel.wait()
        self._kernels.clear()

    def hold(self, scope: dict[str, Any]) -> None:
        """Replace the kernels that are being built in the globals of a graph's code."""
        pending = (Future, find("torch._inductor.codecache.CodeCacheFuture"))
        for name, value in scope.items():
            if isinstance(value, pending):
                scope[name] = _Kernel(scope, name, value)
                self._kernels.append(scope[name])


def _wait(compiler: Any, scope: dict[str, Any]) -> None:
    """`AsyncCompile.wait`, which waits only for the kernels that are not held."""
    builds: KernelBuilds | None = getattr(_started, "builds", None)
    if builds is not None:
        builds.hold(scope)
    KernelBuilds._original(compiler, scope)
