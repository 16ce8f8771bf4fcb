"""Compile Triton kernels for a GPU that is not there, and read figures from the machine code.

A launch is recorded with tensors on the meta device, compiled as Triton's JIT would specialise it, and disassembled by
the `cuobjdump` beside Triton's ptxas. Nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
SHARED = {90: 228, 80: 164}  # KiB of shared memory of a multiprocessor
REGISTERS, WARPS, SCHEDULERS = 65536, 64, 4  # of a multiprocessor
SCORES = 128 * 64  # issue is given for tiles of this many scores
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
TENSOR = re.compile(r"\b(?:HGMMA|HMMA|IMMA|DMMA)\b")
COPY = re.compile(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b")
LOAD = re.compile(r"\bLDG\b")
EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments, and what the tile computes."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """The arguments by name."""
        named = dict(zip(self.kernel.arg_names, self.args, strict=False))
        return {**named, **{name: value for name, value in self.kwargs.items() if name in self.kernel.arg_names}}


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code."""

    instructions: int
    tensor: int
    copies: int
    loads: int
    exponentials: int
    spills: int = 0  # loads and stores of local memory in the loop


@dataclass(frozen=True)
class Figures:
    """What the compiler made of one launch."""

    registers: int
    stack: int  # bytes of local memory; more than 0 means that registers spill, or that an array is indexed
    spills: int  # instructions that load or store local memory
    shared: int  # bytes
    warps: int
    programs: int  # that fit on one multiprocessor
    occupancy: float
    tensor: int
    copies: int
    wide_loads: int  # of 16 bytes, not counting asynchronous copies
    narrow_loads: int  # of 2 bytes or fewer
    instructions: int
    loops: tuple[Loop, ...]

    def main(self) -> Loop | None:
        """The loop with the fewest instructions among those with tensor-core instructions; else the largest."""
        tensor = [loop for loop in self.loops if loop.tensor]
        if tensor:
            return min(tensor, key=lambda loop: loop.instructions)
        return max(self.loops, key=lambda loop: loop.instructions, default=None)

    def issue(self, loop: Loop, scores: int) -> float:
        """Instructions that each scheduler issues in one turn of the loop, per `SCORES` scores."""
        return loop.instructions * self.warps / SCHEDULERS * SCORES / scores

    def content(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        return {**asdict(self), "loops": [asdict(loop) for loop in self.loops]}


class Recorder:
    """Stands in for a kernel and remembers its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Launch] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@contextmanager
def recorded(*kernels: tuple[ModuleType, str]) -> Iterator[list[Recorder]]:
    """Replace kernels, each given by its module and name, by recorders."""
    recorders = [Recorder(getattr(module, name)) for module, name in kernels]
    patches = [mock.patch.object(m, n, r) for (m, n), r in zip(kernels, recorders, strict=True)]
    for patch in patches:
        patch.start()
    try:
        yield recorders
    finally:
        for patch in patches:
            patch.stop()


def specialised(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Return the signature, the constants and the attributes with which the JIT would compile this launch."""
    signature, constants, attributes = {}, {}, {}
    values = launch.values()
    for i, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        kind, divisible = _kind(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        elif divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(value: Any, constant: bool) -> tuple[str, bool]:
    """Return the type of an argument, and whether it is known to be divisible by 16."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        return TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def build(launch: Launch, capability: int) -> Figures:
    """Compile a launch for a compute capability (90 or 80), and return its figures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch)
    options = {name: launch.kwargs[name] for name in OPTIONS if name in launch.kwargs}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = disassembled(compiled.asm["cubin"])
    return figures(usage, code, compiled.metadata.num_warps, compiled.metadata.shared, capability)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Return what cuobjdump says of the resources, and the machine code."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


def figures(usage: str, code: str, warps: int, shared: int, capability: int) -> Figures:
    """Read the figures from the two outputs of cuobjdump."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"cuobjdump printed no resources:\n{usage}"
    registers, stack = int(found[1]), int(found[2])
    lines = instructions(code)
    texts = [text for _, text in lines]
    programs = resident(registers, warps, shared, capability)

    def count(pattern: str | re.Pattern[str]) -> int:
        return sum(re.search(pattern, text) is not None for text in texts)

    return Figures(
        registers, stack, count(SPILL), shared, warps, programs, programs * warps / WARPS, count(TENSOR), count(COPY),
        count(r"\bLDG\.E\.128"), count(r"\bLDG\.E\.[US](?:8|16)\b"), len(lines), tuple(innermost_loops(lines)),
    )  # fmt: skip


def resident(registers: int, warps: int, shared: int, capability: int) -> int:
    """Return how many programs one multiprocessor holds, by registers, shared memory and warps."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED[capability] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, 32)


def instructions(code: str) -> list[tuple[int, str]]:
    """Return the address and the text of each instruction, without the padding at the end."""
    found = [(int(address, 16), text) for address, text in LINE.findall(code)]
    return [(address, text) for address, text in found if not text.startswith("NOP")]


def innermost_loops(lines: list[tuple[int, str]]) -> Iterator[Loop]:
    """Yield the loops that contain no other: from the target of a backward branch to the branch."""
    spans = []
    for address, text in lines:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    for start, end in spans:
        if any((a, b) != (start, end) and start <= a and b <= end for a, b in spans):
            continue
        body = [text for address, text in lines if start <= address <= end]
        patterns = (TENSOR, COPY, LOAD, EXPONENTIAL, SPILL)
        yield Loop(len(body), *(sum(pattern.search(text) is not None for text in body) for pattern in patterns))
