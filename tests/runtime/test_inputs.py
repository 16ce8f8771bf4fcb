"""Classification of a call's arguments as latent, timestep and conditioning."""

from __future__ import annotations

import dataclasses
import functools
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_rewrite.runtime.inputs import Inputs, Reader

X, T, C, D = (torch.full((2,), float(i)) for i in range(4))


def forward(
    hidden_states: Tensor, timestep: Any = None, condition: Any = None, scale: float = 1.0, *, mask: Any = None
) -> None:
    """The signature of a denoiser."""


def read(*args: Any, **kwargs: Any) -> Inputs:
    return Reader(forward).read(args, kwargs)


def is_(inputs: Inputs, latent: Any, timestep: Any, *conditioning: Tensor) -> bool:
    """Return whether `found` are the same objects."""
    found = inputs.conditioning
    same = len(found) == len(conditioning) and all(a is b for a, b in zip(found, conditioning, strict=True))
    return same and inputs.latent is latent and inputs.timestep is timestep


def test_positional() -> None:
    assert is_(read(X, T, C, 2.0), X, T, C)


def test_keywords_in_any_order() -> None:
    assert is_(read(mask=D, condition=C, timestep=T, hidden_states=X), X, T, C, D)


def test_positional_and_keyword() -> None:
    assert is_(read(X, mask=D, timestep=T), X, T, D)


def test_nested_conditioning_and_other_arguments() -> None:
    nested = {"a": [C, None, "text"], "b": (1, {"c": D})}
    assert is_(read(X, T, nested), X, T, C, D)
    assert is_(read(X, T, "text"), X, T)


def test_a_closure_before_its_variable_has_a_value() -> None:
    """It is read as another call than the same function with a value."""

    def later() -> Any:
        return scale

    empty = read(X, T, later)
    scale = 2.0
    filled = read(X, T, later)
    assert not (empty.opaque or filled.opaque)
    assert empty.rest != filled.rest


def test_a_container_of_latents() -> None:
    """Its other tensors may be conditioning."""
    given = read([X, C], T, D)
    assert is_(given, X, T, C, D)


def test_no_tensor_at_all() -> None:
    given = read(None, 3)
    assert (given.latent, given.timestep, given.conditioning) == (None, 3, ())


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "sigma", "noise_level"])
def test_timestep_by_name(name: str) -> None:
    reader = Reader(lambda hidden_states, **kwargs: None)
    assert is_(reader.read((X,), {"condition": C, name: T}), X, T, C)
    assert reader.read((X,), {name: 0.5}).timestep == 0.5


@pytest.mark.parametrize(
    "given", [3, 3.0, np.float32(3), np.float64(3), np.int64(3)], ids=lambda given: type(given).__name__
)
def test_a_number_as_timestep(given: Any) -> None:
    found = read(X, given, C)
    assert (found.timestep, found.number, found.conditioning) == (3, "timestep", (C,))
    assert not found.opaque


@pytest.mark.parametrize("given", [[3, 2.5], (3.0, 2.5), [np.float32(3), np.float32(2.5)]], ids=str)
def test_a_number_for_each_sample(given: Any) -> None:
    found = read(X, given, C)
    assert isinstance(found.timestep, Tensor) and found.timestep.tolist() == [3, 2.5]
    assert (found.number, found.rest) == ("timestep", read(X, [1.0, 1.0], C).rest)


@pytest.mark.parametrize("given", [[], [True, False], ["a"], [T, T], True], ids=str)
def test_what_is_no_timestep(given: Any) -> None:
    assert read(X, given, C).timestep is None


def test_numbers_of_numpy_compare_by_value() -> None:
    same, other = (read(X, T, C, np.float32(scale)) for scale in (2, 3))
    assert same.rest == read(X, T, C, np.float32(2)).rest != other.rest
    assert not same.opaque


def test_a_timestep_of_none_is_passed_over() -> None:
    reader = Reader(lambda hidden_states, timestep=None, sigma=None: None)
    assert is_(reader.read((X, None, T), {}), X, T)
    assert is_(reader.read((X,), {}), X, None)


def test_the_timestep_is_not_conditioning_where_it_comes_twice() -> None:
    assert is_(read(X, T, [T, C]), X, T, C)


@dataclasses.dataclass
class Text:
    tokens: Tensor
    length: int = 4


class Plain:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


@pytest.mark.parametrize("kind", [Text, Plain, functools.partial(dict, a=1), SimpleNamespace], ids=str)
def test_tensors_in_objects_are_seen(kind: Any) -> None:
    given = kind(tokens=C) if kind is not Plain else Plain(C)
    assert is_(read(X, T, given), X, T, C)
    assert not read(X, T, given).opaque


def test_tensors_behind_functions_are_seen() -> None:
    def attend(scale: float = 2.0) -> Tensor:
        return C * scale

    assert is_(read(X, T, functools.partial(attend, D)), X, T, D)


@pytest.mark.parametrize("value", [iter([C]), (C for _ in range(1)), object()], ids=["iterator", "generator", "object"])
def test_unreadable_objects_are_opaque(value: Any) -> None:
    assert read(X, T, value).opaque
    assert read(X, T, [value]).opaque


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (1, True),
        ("a", "b"),
        (None, 0),
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        (Text(C, 4), Text(C, 5)),
        ([C], [C, C]),
    ],
    ids=str,
)
def test_other_arguments_compare_by_value(a: Any, b: Any) -> None:
    assert read(X, T, a).rest == read(X, T, a).rest
    assert read(X, T, a).rest != read(X, T, b).rest


def test_arguments_without_names_are_conditioning() -> None:
    """If they were ignored, two prompts would count as one."""
    reader = Reader(lambda hidden_states, *rest, mask=None: None)
    assert is_(reader.read((X, C, D), {"mask": T}), X, None, C, D, T)
    assert is_(Reader(lambda *args: None).read((X, C), {}), X, None, C)


def test_names_of_a_wrapped_forward() -> None:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        forward(*args, **kwargs)

    assert is_(Reader(wrapped).read((X, T, C), {}), X, T, C)


def test_a_bound_method() -> None:
    class Model:
        def forward(self, x: Tensor, t: Tensor) -> None: ...

    assert is_(Reader(Model().forward).read((X, T), {}), X, T)


class Named(dict[str, Any]):
    """A mapping with attributes."""


def attend(*, given: Any = None) -> None:
    """A function that tests give a default or an attribute."""


def with_attribute(value: Any, given: Tensor) -> Any:
    value.given = given
    return value


def with_default(given: Tensor) -> Any:
    found = types.FunctionType(attend.__code__, {})
    found.__kwdefaults__ = {"given": given}
    return found


def bound(given: Tensor) -> Any:
    def attend(self: object) -> Tensor:
        return given

    return types.MethodType(attend, None.__class__)


HIDING = {
    "attribute of a mapping": lambda: with_attribute(Named(scale=1), C),
    "default of a keyword": lambda: with_default(C),
    "attribute of a function": lambda: with_attribute(types.FunctionType(attend.__code__, {}), C),
    "cell of a method": lambda: bound(C),
}


@pytest.mark.parametrize("name", HIDING)
def test_tensors_beside_contents_are_seen(name: str) -> None:
    assert is_(read(X, T, HIDING[name]()), X, T, C)


def test_a_tensor_is_listed_once() -> None:
    """Otherwise a latent that is also given as a condition would count as one."""
    assert is_(read(X, T, [X, C, C]), X, T, C)
    assert read(X, T, [C, C]).rest != read(X, T, [C, D]).rest


def test_objects_in_a_circle() -> None:
    circle = with_attribute(SimpleNamespace(tokens=C), D)
    circle.itself = [circle, circle]
    assert is_(read(X, T, circle), X, T, C, D)
    assert not read(X, T, circle).opaque
