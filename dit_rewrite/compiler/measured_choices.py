"""Choices between implementations, measured once on this machine and kept on disk.

A process that measures again may choose differently, and so give other bits. Each choice is a file of its own in
`$DIT_REWRITE_CACHE`, by default ~/.cache/dit_rewrite, so that processes do not overwrite each other's choices.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from dit_rewrite.kernels import common, window_attention
from dit_rewrite.policy.files import write_whole


def choose(
    what: str,
    depends_on: Mapping[str, object],
    runs: Mapping[str, Callable[[], object]],
    may_fail: Collection[str] = (),
) -> str | None:
    """Return the name of the fastest of `runs`, or None if none of them runs on this device.

    Those in `may_fail` may also raise any error, and are then left out: they are other libraries'.

    `depends_on` must have everything that the time of the runs depends on, apart from the device, the versions of torch
    and Triton, and the source of the kernels, which are added here.
    """
    key = json.dumps({"what": what, **_machine(), **depends_on}, sort_keys=True, default=str)
    path = folder() / f"{what}_{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("key") == key and content.get("choice") in (*runs, None):
            found: str | None = content["choice"]
            return found
    times: dict[str, float] = {}
    for name, run in runs.items():
        with contextlib.suppress(*((Exception,) if name in may_fail else ())):
            if (time := _milliseconds(run)) is not None:
                times[name] = time
    choice = min(times, key=times.__getitem__, default=None)
    with contextlib.suppress(OSError):  # a read-only disk: the choice holds for this process
        write_whole(path, json.dumps({"key": key, "choice": choice, "milliseconds": times}, indent=1) + "\n")
    return choice


def folder() -> Path:
    """Return the folder that holds the choices."""
    return Path(os.environ.get("DIT_REWRITE_CACHE") or Path.home() / ".cache" / "dit_rewrite")


def _milliseconds(run: Callable[[], object]) -> float | None:
    """Return the median time of a run; None if the device has too little memory for it, shared or global."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, return_mode="median"))
    except (OutOfResources, torch.OutOfMemoryError):
        return None


def _machine() -> dict[str, object]:
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "kernels": _source()}


@functools.cache
def _source() -> str:
    """Return a digest of the source of the window kernel and its parts."""
    folders = [Path(next(iter(package.__path__))) for package in (common, window_attention)]
    files = sorted(file for each in folders for file in each.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
