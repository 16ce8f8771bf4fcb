"""Codecs: bounds of the error of encode and decode, derived from the number formats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from dit_rewrite.passes.rewrite.codec import FORMATS, ValueCodec, inline, is_converted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # of positive numbers


def through(value: Tensor, format: str | None, base: Tensor | None = None, later: Tensor | None = None) -> Tensor:
    """Encode a value and decode it; `later` is its base at the reusing step."""
    stored = ValueCodec(format).encode(value, read(base))
    assert len(stored) == (2 if format in ("int8", "fp8") and value.ndim >= 2 else 1)
    return ValueCodec(format).decode(stored, read(base if later is None else later), value.dtype)


def read(base: Tensor | None) -> list[Tensor]:
    """Return the tensors that a codec reads: the base, if there is one."""
    return [] if base is None else [base]


def bound(value: Tensor, format: str) -> Tensor:
    """Return the largest error of each element of a finite value, by rounding to the nearest number of the format.

    int8: half a step, which is the token's largest absolute value over 127. fp8 (e4m3): 1/16 of a normal number (3
    mantissa bits), or half of 2^-9, in units of the scale, for a subnormal one. The roundings of division, product and
    result, and underflow of the dtype, are added.
    """
    wide = value.double()
    largest = wide.abs().amax(-1, keepdim=True)
    result = wide.abs() * UNIT[value.dtype] + SMALLEST[value.dtype]
    if format == "bf16":
        return result + wide.abs() * UNIT[torch.bfloat16] + SMALLEST[torch.bfloat16]
    slack = 4 * UNIT[torch.float32] * largest + 448 * SMALLEST[torch.float32]
    if format == "int8":
        return result + slack + largest / 127 / 2
    scale = largest / 448
    return result + slack + torch.maximum(wide.abs() / 16, scale * 2.0**-10)


def tensors(dtype: torch.dtype, low: int = -12, high: int = 12) -> st.SearchStrategy[Tensor]:
    """Draw tokens with magnitudes from 2^low to 2^high, some of them zero."""
    size = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9))
    seeds, exponents = st.integers(0, 10**6), st.integers(low, high)

    def build(shape: tuple[int, int, int], seed: int, exponent: int, zero: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        spread = torch.randint(-4, 1, shape, generator=generator).double()
        value = torch.randn(shape, generator=generator).double().clamp(-3, 3) * 2.0**exponent * 2.0**spread
        if zero:
            value[0, 0] = 0
        return value.to(dtype)

    return st.builds(build, size, seeds, exponents, st.booleans())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_error(format: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """A decoded value has the shape and dtype of the original, and its error is within the bound."""
    value = data.draw(tensors(dtype))
    found = through(value, format)
    assert (found.shape, found.dtype) == (value.shape, value.dtype)
    assert bool(((found.double() - value.double()).abs() <= bound(value, format)).all())
    assert torch.equal(found == 0, (found == 0) | (value == 0)), "zero stays zero"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS).flatmap(tensors), st.sampled_from([None, *FORMATS]))
def test_twice(value: Tensor, format: str | None) -> None:
    """Encoding a decoded value again is exact for None and bf16, and within the bound for int8 and fp8."""
    once = through(value, format)
    again = through(once, format)
    if format in (None, "bf16"):
        assert torch.equal(again, once)
    else:
        assert bool(((again.double() - once.double()).abs() <= bound(once, format)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_numbers(dtype: torch.dtype) -> None:
    """A token with largest absolute value 127 has scale 1: int8 stores integers exactly and rounds halves to even."""
    value = torch.tensor([[-127.0, -1, 0, 1, 2, 126], [127, 0, 0, 0, 0, 0]], dtype=dtype)
    numbers, scale = ValueCodec("int8").encode(value, [])
    assert (numbers.dtype, scale.dtype, scale.tolist()) == (torch.int8, torch.float32, [[1], [1]])
    assert numbers.tolist() == value.tolist()
    assert torch.equal(through(value, "int8"), value)
    halves = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]])
    assert ValueCodec("int8").encode(halves, [])[0].tolist() == [[127, 0, 2, 0, -2]]


def test_eight_bits_of_floating_point() -> None:
    """A token whose largest absolute value is 448 has scale 1, and e4m3 has these numbers."""
    exact = torch.tensor([[448.0, -416, 240, 1.125, 0.0625, 2.0**-6, 2.0**-9, 0]])
    numbers, scale = ValueCodec("fp8").encode(exact, [])
    assert (numbers.dtype, scale.item()) == (torch.float8_e4m3fn, 1)
    assert torch.equal(through(exact, "fp8"), exact)
    between = torch.tensor([[448.0, 1.0625, 1.1875, 2.0**-10]])  # ties round to even
    assert through(between, "fp8").tolist() == [[448, 1, 1.25, 0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_tokens_have_scales_of_their_own(format: str, dtype: torch.dtype) -> None:
    """A token of zeros stays zero, and a large token does not reduce the precision of a small one."""
    value = torch.tensor([[0.0, 0, 0], [1e-4, -2e-4, 0], [3e4, -1e4, 5]], dtype=dtype)
    scale = ValueCodec(format).encode(value, [])[1]
    assert scale.shape == (3, 1)
    assert scale[0].item() == 1
    found = through(value, format)
    assert found[0].tolist() == [0, 0, 0]
    assert torch.allclose(found[1], value[1], rtol=0.07, atol=2e-6)
    assert bool(((found.double() - value.double()).abs() <= bound(value, format)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_extremes_of_a_dtype(format: str, dtype: torch.dtype) -> None:
    """Near the largest number of the dtype the result is finite, and near the smallest it stays small."""
    info = torch.finfo(dtype)
    large = torch.tensor([[info.max, -info.max, 1.0]], dtype=dtype) * 0.99  # the largest numbers may round up
    tiny = torch.full((1, 3), info.tiny, dtype=dtype)
    for value in (large, tiny):
        assert bool(((through(value, format).double() - value.double()).abs() <= bound(value, format)).all())
    least = torch.tensor([[SMALLEST[dtype], 0, 0]], dtype=dtype)
    found = through(least, format)
    assert bool(found.isfinite().all())
    assert bool((found.double().abs() <= 2 * SMALLEST[dtype]).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_so(format: str, bad: float, dtype: torch.dtype) -> None:
    """A non-finite token stays non-finite and does not affect other tokens."""
    value = torch.tensor([[1.0, bad, -2], [1, -1, 0.5]], dtype=dtype)
    found = through(value, format)
    assert not found[0, 1].isfinite()
    assert torch.allclose(found[1], value[1], rtol=0.07, atol=0.01)
    with_base = through(value, format, torch.ones_like(value))
    assert not with_base[0, 1].isfinite()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_change_is_stored(format: str | None) -> None:
    """A span stores its change, which is added to the base of the reusing step."""
    base, later = torch.tensor([[100.0, 200, 300]]), torch.tensor([[1.0, 2, 3]])
    change = torch.tensor([[127.0, -64, 2]])
    found = through(base + change, format, base, later)
    allowed = torch.zeros(1) if format is None else bound(change, format) + 1e-4
    assert bool(((found - (later + change)).abs() <= allowed).all())


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize(
    ("value", "converted"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(2, 3, 4, 5, dtype=torch.bfloat16), True),
        (torch.ones(3), False),
        (torch.ones(()), False),
        (torch.ones(2, 3, dtype=torch.int64), False),
        (torch.ones(2, 3, dtype=torch.bool), False),
    ],
    ids=["matrix", "heads", "vector", "number", "integers", "flags"],
)
def test_converted_tensors(value: Tensor, converted: bool, format: str | None) -> None:
    """Floating-point tensors with at least 2 dims are converted; an entropy and other dtypes are stored as they are."""
    assert is_converted(value, format) is (converted and format is not None)
    stored = ValueCodec(format).encode(value, [])
    assert len(stored) == (2 if converted and format in ("int8", "fp8") else 1)
    if not is_converted(value, format):
        assert stored[0] is value
    assert torch.equal(ValueCodec(format).decode(stored, [], value.dtype), value)


def test_a_part_of_a_tensor_is_copied() -> None:
    """A view of one of three fused projections is copied, because it would keep all alive; a transposed one is not."""
    three = torch.randn(2, 5, 3, 4)
    part, turned = three[:, :, 0], three.transpose(0, 1)
    codec = ValueCodec()
    assert codec.is_plain(turned, ()) and not codec.is_plain(part, ())
    (stored,) = codec.encode(part, ())
    assert torch.equal(stored, part) and stored.untyped_storage().nbytes() == part.numel() * part.element_size()
    assert codec.decode([stored], (), part.dtype) is stored
    assert not codec.is_plain(three[:1, :1].expand(2, 5, 3, 4), ()), "expanded elements share memory"


def test_stored_bytes() -> None:
    """A number of 4 bytes is stored in 2 or 1, with 4 bytes per token for the scale."""
    value = torch.randn(2, 16, 64)
    stored = {format: sum(t.nbytes for t in ValueCodec(format).encode(value, [])) for format in (None, *FORMATS)}
    assert stored == {None: 8192, "bf16": 4096, "fp8": 2048 + 128, "int8": 2048 + 128}


@pytest.mark.parametrize("format", FORMATS)
def test_written_into_a_graph(format: str) -> None:
    """`inline` writes the same arithmetic, with positions next to the node that it belongs to."""
    with FakeTensorMode() as mode:
        examples = torch.empty(2, 3), torch.empty(2, 3)
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("value", "base")]
    for node, example in zip(inputs, examples, strict=True):
        node.meta = {"val": example}
    with mode:
        stored = inline(graph, lambda v, b: ValueCodec(format).encode(v, [b]), inputs, 7, home=7)
        count = len(stored)
        (out,) = inline(
            graph,
            lambda *a: (ValueCodec(format).decode(a[:count], a[count:], torch.float32),),
            [*stored, inputs[1]],
            8,
            home=9,
        )
    graph.output((*stored, out))
    written = [node for node in graph.nodes if node.op == "call_function"]
    assert {node.op for node in graph.nodes} == {"placeholder", "call_function", "output"}
    positions = [node.meta["position"] for node in written]
    assert positions == sorted(positions) and len(set(positions)) == len(positions)
    assert {(int(node.meta["position"]), node.meta["home"]) for node in written} <= {(7, 7), (8, 9)}
    value, base = torch.randn(2, 3), torch.randn(2, 3)
    found = fx.GraphModule({}, graph)(value, base)
    expected = ValueCodec(format).encode(value, [base])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=False))
    assert torch.equal(found[-1], ValueCodec(format).decode(expected, [base], torch.float32))
