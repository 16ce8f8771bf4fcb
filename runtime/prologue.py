"""The hoisted values of a graph at run time: computed once per trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_rewrite.runtime.cache import Cache
from dit_rewrite.runtime.segments import Executable, execute
from dit_rewrite.runtime.session import Session
from dit_rewrite.runtime.tensors import Memoized


@dataclass(frozen=True)
class Prologue:
    """Computes the hoisted values of a graph by ``executable``."""

    executable: Executable
    session: Session

    def values(self, args: list[Any], cache: Cache, explicit: bool) -> Sequence[Tensor]:
        """Return the hoisted values. Compute them, unless the cache has them for the same, unmodified inputs."""
        inputs = [args[i] for i in self.executable.inputs if isinstance(args[i], Tensor)]  # weights may be changed too
        if cache.hoisted is None or not cache.hoisted.valid_for(inputs, explicit):
            values = [value for _, value in execute(self.executable, args, ())]
            cache.hoisted = Memoized.of(inputs, values)
            self.session.stats.add("hoists")
            self.session.note_bytes()
        return cache.hoisted.values
