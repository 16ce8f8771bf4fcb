"""What a slot holds: how far what comes out of it may be from what went in, from the definitions of the numbers."""

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
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # above zero


def through(value: Tensor, store: str | None, base: Tensor | None = None, later: Tensor | None = None) -> Tensor:
    """A value put into a slot, and taken out of it; `later` is what its base is by then."""
    held = ValueCodec(store).encode(value, read(base))
    assert len(held) == (2 if store in ("int8", "fp8") and value.ndim >= 2 else 1)
    return ValueCodec(store).decode(held, read(base if later is None else later), value.dtype)


def read(base: Tensor | None) -> list[Tensor]:
    """What a place reads beside its value: the base, if it has one."""
    return [] if base is None else [base]


def bound(value: Tensor, store: str) -> Tensor:
    """How far each element of a finite value may come out, by rounding to the nearest number that there is.

    int8: half of a step, which is the token's largest over 127. fp8 (e4m3): of a normal number 1/16 of it (three bits
    behind the point), of a subnormal one half of 2^-9, in steps of the scale. On top go the roundings of division,
    product and result, and numbers that are too small for the dtype.
    """
    wide = value.double()
    largest = wide.abs().amax(-1, keepdim=True)
    result = wide.abs() * UNIT[value.dtype] + SMALLEST[value.dtype]
    if store == "bf16":
        return result + wide.abs() * UNIT[torch.bfloat16] + SMALLEST[torch.bfloat16]
    slack = 4 * UNIT[torch.float32] * largest + 448 * SMALLEST[torch.float32]
    if store == "int8":
        return result + slack + largest / 127 / 2
    scale = largest / 448
    return result + slack + torch.maximum(wide.abs() / 16, scale * 2.0**-10)


def tensors(dtype: torch.dtype, low: int = -12, high: int = 12) -> st.SearchStrategy[Tensor]:
    """Tokens of any magnitude from 2^low to 2^high, some of them zero."""
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
@pytest.mark.parametrize("store", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_error(store: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """What comes out has the shape and dtype of what went in, and is as near as the numbers allow."""
    value = data.draw(tensors(dtype))
    found = through(value, store)
    assert (found.shape, found.dtype) == (value.shape, value.dtype)
    assert bool(((found.double() - value.double()).abs() <= bound(value, store)).all())
    assert torch.equal(found == 0, (found == 0) | (value == 0)), "zero stays zero"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS).flatmap(tensors), st.sampled_from([None, *FORMATS]))
def test_twice(value: Tensor, store: str | None) -> None:
    """What came out of a slot comes out of it again: in whole numbers exactly, in others within the same rounding."""
    once = through(value, store)
    again = through(once, store)
    if store in (None, "bf16"):
        assert torch.equal(again, once)
    else:
        assert bool(((again.double() - once.double()).abs() <= bound(once, store)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_whole_numbers(dtype: torch.dtype) -> None:
    """A token whose largest number is 127 has the scale 1: whole numbers are held exactly in int8; halves to even."""
    value = torch.tensor([[-127.0, -1, 0, 1, 2, 126], [127, 0, 0, 0, 0, 0]], dtype=dtype)
    numbers, scale = ValueCodec("int8").encode(value, [])
    assert (numbers.dtype, scale.dtype, scale.tolist()) == (torch.int8, torch.float32, [[1], [1]])
    assert numbers.tolist() == value.tolist()
    assert torch.equal(through(value, "int8"), value)
    halves = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5]])
    assert ValueCodec("int8").encode(halves, [])[0].tolist() == [[127, 0, 2, 0, -2]]


def test_eight_bits_of_floating_point() -> None:
    """A token whose largest number is 448 has the scale 1, and e4m3 has these numbers."""
    exact = torch.tensor([[448.0, -416, 240, 1.125, 0.0625, 2.0**-6, 2.0**-9, 0]])
    numbers, scale = ValueCodec("fp8").encode(exact, [])
    assert (numbers.dtype, scale.item()) == (torch.float8_e4m3fn, 1)
    assert torch.equal(through(exact, "fp8"), exact)
    between = torch.tensor([[448.0, 1.0625, 1.1875, 2.0**-10]])  # each between two of them: to the even one
    assert through(between, "fp8").tolist() == [[448, 1, 1.25, 0]]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_tokens_have_scales_of_their_own(store: str, dtype: torch.dtype) -> None:
    """A token that is all zero stays so, and a large one takes no digits from a small one beside it."""
    value = torch.tensor([[0.0, 0, 0], [1e-4, -2e-4, 0], [3e4, -1e4, 5]], dtype=dtype)
    scale = ValueCodec(store).encode(value, [])[1]
    assert scale.shape == (3, 1)
    assert scale[0].item() == 1
    found = through(value, store)
    assert found[0].tolist() == [0, 0, 0]
    assert torch.allclose(found[1], value[1], rtol=0.07, atol=2e-6)
    assert bool(((found.double() - value.double()).abs() <= bound(value, store)).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("store", FORMATS)
def test_extremes_of_a_dtype(store: str, dtype: torch.dtype) -> None:
    """Near the largest number nothing becomes infinite, at the smallest nothing becomes large."""
    info = torch.finfo(dtype)
    large = torch.tensor([[info.max, -info.max, 1.0]], dtype=dtype) * 0.99  # the very largest may be rounded up
    tiny = torch.full((1, 3), info.tiny, dtype=dtype)
    for value in (large, tiny):
        assert bool(((through(value, store).double() - value.double()).abs() <= bound(value, store)).all())
    least = torch.tensor([[SMALLEST[dtype], 0, 0]], dtype=dtype)
    found = through(least, store)
    assert bool(found.isfinite().all())
    assert bool((found.double().abs() <= 2 * SMALLEST[dtype]).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("store", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_not_finite_stays_so(store: str, bad: float, dtype: torch.dtype) -> None:
    """A number that is none is not made one, and spoils no other token."""
    value = torch.tensor([[1.0, bad, -2], [1, -1, 0.5]], dtype=dtype)
    found = through(value, store)
    assert not found[0, 1].isfinite()
    assert torch.allclose(found[1], value[1], rtol=0.07, atol=0.01)
    with_base = through(value, store, torch.ones_like(value))
    assert not with_base[0, 1].isfinite()


@pytest.mark.parametrize("store", [None, *FORMATS])
def test_a_change_is_held(store: str | None) -> None:
    """Of a span the change is held, and added to what its base is by then."""
    base, later = torch.tensor([[100.0, 200, 300]]), torch.tensor([[1.0, 2, 3]])
    change = torch.tensor([[127.0, -64, 2]])
    found = through(base + change, store, base, later)
    allowed = torch.zeros(1) if store is None else bound(change, store) + 1e-4
    assert bool(((found - (later + change)).abs() <= allowed).all())


@pytest.mark.parametrize("store", [None, *FORMATS])
@pytest.mark.parametrize(
    ("value", "packed"),
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
def test_what_is_packed(value: Tensor, packed: bool, store: str | None) -> None:
    """Tokens of floating-point numbers; mere numbers, such as an entropy, and other dtypes are held as they are."""
    assert is_converted(value, store) is (packed and store is not None)
    held = ValueCodec(store).encode(value, [])
    assert len(held) == (2 if packed and store in ("int8", "fp8") else 1)
    if not is_converted(value, store):
        assert held[0] is value
    assert torch.equal(ValueCodec(store).decode(held, [], value.dtype), value)


def test_a_part_of_a_tensor_is_copied() -> None:
    """Held as it is it would keep the whole: one of three projections made at once. A transposed one has no gaps."""
    three = torch.randn(2, 5, 3, 4)
    part, turned = three[:, :, 0], three.transpose(0, 1)
    codec = ValueCodec()
    assert codec.is_plain(turned, ()) and not codec.is_plain(part, ())
    (held,) = codec.encode(part, ())
    assert torch.equal(held, part) and held.untyped_storage().nbytes() == part.numel() * part.element_size()
    assert codec.decode([held], (), part.dtype) is held
    assert not codec.is_plain(three[:1, :1].expand(2, 5, 3, 4), ()), "and what is expanded has one place for many"


def test_bytes_held() -> None:
    """A number of 4 bytes is held in 2 or 1, and a token has 4 bytes for its scale."""
    value = torch.randn(2, 16, 64)
    held = {store: sum(t.nbytes for t in ValueCodec(store).encode(value, [])) for store in (None, *FORMATS)}
    assert held == {None: 8192, "bf16": 4096, "fp8": 2048 + 128, "int8": 2048 + 128}


@pytest.mark.parametrize("store", FORMATS)
def test_written_into_a_graph(store: str) -> None:
    """`inline` writes the same arithmetic, node by node, in an order of its own beside the node it belongs to."""
    with FakeTensorMode() as mode:
        examples = torch.empty(2, 3), torch.empty(2, 3)
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("value", "base")]
    for node, example in zip(inputs, examples, strict=True):
        node.meta = {"val": example}
    with mode:
        held = inline(graph, lambda v, b: ValueCodec(store).encode(v, [b]), inputs, 7, home=7)
        count = len(held)
        (out,) = inline(
            graph,
            lambda *a: (ValueCodec(store).decode(a[:count], a[count:], torch.float32),),
            [*held, inputs[1]],
            8,
            home=9,
        )
    graph.output((*held, out))
    written = [node for node in graph.nodes if node.op == "call_function"]
    assert {node.op for node in graph.nodes} == {"placeholder", "call_function", "output"}
    positions = [node.meta["position"] for node in written]
    assert positions == sorted(positions) and len(set(positions)) == len(positions)
    assert {(int(node.meta["position"]), node.meta["home"]) for node in written} <= {(7, 7), (8, 9)}
    value, base = torch.randn(2, 3), torch.randn(2, 3)
    found = fx.GraphModule({}, graph)(value, base)
    expected = ValueCodec(store).encode(value, [base])
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=False))
    assert torch.equal(found[-1], ValueCodec(store).decode(expected, [base], torch.float32))
