"""Classification of a denoiser's inputs as latent, timestep and conditioning."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")

_BY_VALUE = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, type,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, slice, range,
)  # fmt: skip
_MAX_DEPTH = 8  # nesting depth beyond which objects are not read


class Inputs(NamedTuple):
    """The inputs of one call.

    latent: the first tensor of the first argument that contains any. timestep: the argument with a name in
    TIMESTEP_NAMES, as a tensor if it is a list of numbers. conditioning: all other tensors, each once, also those
    beside the latent in its container. rest: everything else (numbers and strings by value, argument names, the nesting
    of containers). opaque: an argument contains an object that cannot be read, and that may hide a condition.
    """

    latent: Tensor | None
    timestep: Tensor | float | None
    conditioning: tuple[Tensor, ...]
    rest: Hashable = ()
    opaque: bool = False
    number: str | None = None  # the name of the timestep argument if it is no tensor, but a number or several

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the call."""
        return (*(t for t in (self.latent, self.timestep) if isinstance(t, Tensor)), *self.conditioning)


class Reader:
    """Converts the arguments of a `forward` to Inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        parameters = inspect.signature(forward).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [p.name for p in parameters if p.kind in positional]
        self._named = functools.lru_cache(maxsize=64)(self._name)  # a model is called in few ways, many times

    def _name(self, num_args: int, keywords: tuple[str, ...]) -> tuple[list[str], list[str], list[str]]:
        """Return names of the positional arguments, the keywords in the order of the parameters of `forward`, and the
        arguments that may be the time."""
        names = [*self._names, *map(str, range(num_args - len(self._names)))][:num_args]
        order = {name: i for i, name in enumerate(self._names)}
        clocks = [name for name in TIMESTEP_NAMES if name in names or name in keywords]
        return names, sorted(keywords, key=lambda name: order.get(name, len(order))), clocks

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        """Return the inputs of a call, in the order of the parameters of `forward`."""
        names, keywords, clocks = self._named(len(args), tuple(kwargs))
        values = dict(zip(names, args, strict=True))
        for name in keywords:
            values[name] = kwargs[name]
        times = [(name, time) for name in clocks if (time := _time(values[name])) is not None]
        clock, timestep = times[0] if times else (None, None)
        leaves = _Leaves(None if clock is None else values.pop(clock))
        for name, value in values.items():
            leaves.add(value, name)
        latent, *conditioning = leaves.tensors or (None,)
        number = None if leaves.timestep is timestep and isinstance(timestep, Tensor) else clock
        return Inputs(latent, timestep, tuple(conditioning), tuple(leaves.rest), leaves.opaque, number)


def _time(value: Any) -> Tensor | float | None:
    """Return the time that an argument is, or None if it is none. A list of numbers is one time for each sample."""
    if isinstance(value, (Tensor, int, float)):
        return None if isinstance(value, bool) else value
    if isinstance(value, (list, tuple)) and value and all(map(_is_number, value)):
        return torch.tensor([float(number) for number in value], dtype=torch.float64)
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class _Leaves:
    """Collects the tensors in arguments, and everything else in them as hashable values."""

    def __init__(self, timestep: Any) -> None:
        """Create an empty collection. The tensor `timestep` itself is not collected."""
        self.timestep = timestep
        self.tensors: list[Tensor] = []
        self.rest: list[Hashable] = []
        self.opaque = False
        self._seen: dict[int, tuple[int, Any]] = {}  # by id; a reference keeps the id from being used again

    def add(self, value: Any, name: Hashable, depth: int = 0) -> None:
        """Add a value and its contents; `name` is its key in the container."""
        if not isinstance(value, Tensor) and isinstance(value, _BY_VALUE):
            self.rest.append((name, type(value), repr(value)))  # 1, 1.0 and True are different
        elif value is self.timestep:
            self.rest.append(name)
        elif id(value) in self._seen:  # a tensor is listed once, and objects may refer to each other
            self.rest.append((name, self._seen[id(value)][0]))
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_new(value, name, depth)

    def _add_new(self, value: Any, name: Hashable, depth: int) -> None:
        if isinstance(value, Tensor):
            self.rest.append(name)
            self.tensors.append(value)
            return
        inside = _contents(value) if depth < _MAX_DEPTH else None
        if inside is None:
            if isinstance(value, numbers.Number):  # of NumPy
                self.rest.append((name, type(value), repr(value)))
            else:
                self.opaque = True
            return
        self.rest.append((name, type(value), len(inside)))
        for key, item in inside.items():
            self.add(item, key, depth + 1)


def _contents(value: Any) -> dict[Hashable, Any] | None:
    """Return the contents of a container by name or index, or None if they cannot be read."""
    if isinstance(value, Mapping):
        return {repr(key): item for key, item in value.items()} | _state(value)
    if isinstance(value, (list, tuple)):
        return dict[Hashable, Any](enumerate(value)) | _state(value)
    if isinstance(value, (set, frozenset)):
        return dict[Hashable, Any](enumerate(sorted(value, key=repr))) | _state(value)
    if isinstance(value, torch.nn.Module):
        return {"module": id(value)}  # its weights are inputs of the graph, and checked there
    if isinstance(value, functools.partial):
        parts: dict[Hashable, Any] = {"func": value.func, "args": value.args, "keywords": value.keywords}
        return parts | _state(value)
    if isinstance(value, types.FunctionType):
        cells = [_cell_contents(cell) for cell in value.__closure__ or ()]
        parts = {"code": id(value.__code__), "cells": cells}
        return parts | {"defaults": value.__defaults__, "keywords": value.__kwdefaults__} | _state(value)
    if isinstance(value, types.BuiltinFunctionType | types.MethodType):
        parts = {"function": getattr(value, "__qualname__", ""), "self": getattr(value, "__self__", None)}
        return parts | {"func": value.__func__} if isinstance(value, types.MethodType) else parts
    if isinstance(value, types.ModuleType):
        return {"name": value.__name__}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)} | _state(value)
    return _state(value) if hasattr(value, "__dict__") or any(map(_slots, type(value).__mro__)) else None


def _cell_contents(cell: types.CellType) -> Any:
    """Return the value of a variable in a closure, or `inspect.Parameter.empty` if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return inspect.Parameter.empty


def _state(value: Any) -> dict[Hashable, Any]:
    """Return the attributes of an object, including its slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**attributes, **getattr(value, "__dict__", {})}


def _slots(kind: type) -> Sequence[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
