"""Release weights from memory: their contents move to a file that is mapped into memory, and stay readable.

A released parameter is the same object with the same metadata and version counter, so Dynamo's guards still hold. Its
storage maps a temporary file privately: the pages take no memory until something reads them, and the operating system
may drop them at any time afterwards. Whatever reads the parameter, such as `state_dict`, a copy or a LoRA adapter that
is fused, gets its values; writes stay in memory and never reach the file.
"""

from __future__ import annotations

import ctypes
import mmap
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dit_rewrite import torch_compat
from dit_rewrite.errors import TableReason
from dit_rewrite.runtime.stats import Stats
from dit_rewrite.runtime.tensors import storage_address, version

_ALIGNMENT = 64  # bytes, as torch's allocator aligns storages
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class Moved:
    """A weight whose storage at the address `address` maps a file, and its version counter when it was moved."""

    tensor: weakref.ref[Tensor]
    address: int
    version: int | None

    @property
    def is_mapped(self) -> bool:
        """Return whether the weight still has the storage that it was given."""
        tensor = self.tensor()
        return tensor is not None and storage_address(tensor) == self.address

    @property
    def is_released(self) -> bool:
        """Return whether the weight was not written since: pages that were written are in memory again."""
        tensor = self.tensor()
        return tensor is not None and self.is_mapped and version(tensor) == self.version


class Weights:
    """The weights of one model that step tables have released.

    A reader of weights that may be released must hold `lock`, because their storages are replaced.
    """

    def __init__(self, stats: Stats) -> None:
        self.lock = threading.RLock()
        self._stats = stats
        self._moved: dict[int, Moved] = {}  # by id of the weight

    @property
    def bytes(self) -> int:
        """The bytes that are released now."""
        with self.lock:
            return sum(tensor.untyped_storage().nbytes() for tensor in self._held(released=True))

    def release(self, tensors: Sequence[Tensor]) -> None:
        """Release weights, except those that are released already. The statistics count those that stay."""
        with self.lock:
            chosen: list[Tensor] = []
            for tensor in {id(tensor): tensor for tensor in tensors}.values():
                moved = self._moved.get(id(tensor))
                if moved is not None and moved.is_released and moved.tensor() is tensor:
                    continue
                why = _refusal(tensor, moved is not None and moved.is_mapped)
                if why is None:
                    chosen.append(tensor)
                else:
                    self._stats.dropped(why)
            self._map(chosen)

    def bring_back(self) -> None:
        """Copy the contents of all released weights back to memory."""
        with self.lock:
            for tensor in self._held():
                storage = torch.UntypedStorage(tensor.untyped_storage().nbytes())
                _rebind(tensor, storage.copy_(tensor.untyped_storage()))
            self._moved.clear()

    def _held(self, released: bool = False) -> Iterator[Tensor]:
        """Yield the weights that still have a mapped storage, or only those that were not written since."""
        for moved in self._moved.values():
            tensor = moved.tensor()
            if tensor is not None and (moved.is_released if released else moved.is_mapped):
                yield tensor

    def _map(self, tensors: Sequence[Tensor]) -> None:
        """Write weights to one file, and replace their storages by mappings of it."""
        if not tensors:
            return
        try:
            storages = _mapped([tensor.untyped_storage() for tensor in tensors])
        except OSError:  # the disk is full
            self._stats.dropped(TableReason.NO_SPACE, len(tensors))
            return
        for tensor, storage in zip(tensors, storages, strict=True):
            _rebind(tensor, storage)
            self._moved[id(tensor)] = Moved(weakref.ref(tensor), storage.data_ptr(), version(tensor))


def _refusal(tensor: Tensor, again: bool) -> TableReason | None:
    """Return why a weight cannot be released. `again`: it was released before, and written since."""
    if tensor.device.type != "cpu":
        return TableReason.OFF_CPU
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_inference():
        return TableReason.NOT_PLAIN
    storage = tensor.untyped_storage()
    whole = tensor.storage_offset() == 0 and storage.nbytes() == tensor.nbytes and storage.nbytes() > 0
    if not (whole and (again or storage.resizable()) and torch_compat.is_unshared(storage)):
        return TableReason.SHARED_STORAGE
    try:
        folder = tempfile.gettempdir()
    except OSError:  # the process can write to none
        return TableReason.NO_SPACE
    return TableReason.FILES_IN_MEMORY if _files_in_memory(folder) else None


def _mapped(storages: Sequence[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    """Return storages with the contents of `storages` that map a temporary file. The file has no name, so that nothing
    has to remove it, and exists as long as one of them does."""
    offsets: list[int] = []
    with tempfile.TemporaryFile() as file:
        for storage in storages:
            offsets.append(file.tell())
            file.write((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()))
            file.write(bytes(-file.tell() % _ALIGNMENT))
        file.flush()
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return [
        torch.frombuffer(pages, dtype=torch.uint8, count=storage.nbytes(), offset=offset).untyped_storage()
        for storage, offset in zip(storages, offsets, strict=True)
    ]


def _rebind(tensor: Tensor, storage: torch.UntypedStorage) -> None:
    """Give a tensor another storage with the same contents.

    Its metadata and version counter stay. In inference mode it would become an inference tensor, which has none.
    """
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype)
        tensor.data = empty.set_(storage, 0, tensor.shape, tensor.stride())  # type: ignore[call-overload]


def _files_in_memory(folder: str) -> bool:
    """Return whether the files in a folder are in memory themselves. False if the system does not say so."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    parents = {str(path) for path in (Path(folder).resolve(), *Path(folder).resolve().parents)}
    around = [(len(point), kind) for point, kind in mounts if point in parents]
    return bool(around) and max(around)[1] in _IN_MEMORY  # of two mounts at one place, either may be the visible one
