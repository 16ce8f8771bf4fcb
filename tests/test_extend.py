"""The examples of extending the compiler (examples/extend) do what their pages say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sympy import Mod, Ne
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

import dit_rewrite
from dit_rewrite import Policy, Rule, Where
from dit_rewrite.compiler import backend
from dit_rewrite.errors import BadOpArgument, BadParameter
from dit_rewrite.guards import step
from dit_rewrite.module import backend_of
from dit_rewrite.policies import parse, text
from dit_rewrite.policy import serialise
from examples.extend import merge_views
from examples.extend.alternate import Alternate
from examples.extend.cosine_distance import cosine_distance
from examples.extend.count_contractions import COUNT_CONTRACTIONS, Contractions
from examples.extend.merge_views import MERGE_VIEWS
from examples.extend.reuse_probabilities import ReuseProbabilities
from tests.helpers import tiny
from tests.helpers.models import MODELS
from tests.helpers.runs import decided
from tests.kernels import conftest as kernels

STEPS = 6


# --- a policy ---------------------------------------------------------------------------------------------------------


def test_branches_take_turns() -> None:
    found = decided(Alternate(), STEPS)
    assert {did for name, did in found.items() if name.endswith("attn")} == {"CRCRCR"}
    assert {did for name, did in found.items() if name.endswith("mlp")} == {"CCRCRC"}
    assert set(decided(Alternate(warmup=4), STEPS).values()) == {"CCCCRC", "CCCCCR"}


def test_the_policy_is_proven() -> None:
    proof = dit_rewrite.verify(tiny.build(), tiny.calls(STEPS), Alternate(), backend="aot_eager")
    assert proof.exact
    assert proof.reused == 4 * (STEPS - 1) // 2


def test_a_registered_policy_has_a_text_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(text._POLICIES, "alternate", Alternate)
    assert parse("alternate:warmup=2,store=int8") == Alternate(2, "int8")
    path = tmp_path / "alternate.json"
    path.write_text(serialise.to_json(Alternate(2)))
    assert parse(str(path)) == Alternate(2)
    with pytest.raises(BadParameter, match="warmup"):
        parse("alternate:warmup=0")


# --- a pass -----------------------------------------------------------------------------------------------------------


def views_of_views(gm: fx.GraphModule) -> int:
    views = gm.graph.find_nodes(op="call_function", target=merge_views.VIEW)
    return sum(view.args[0].target is merge_views.VIEW for view in views)


def lowered(monkeypatch: pytest.MonkeyPatch, *first: Any, **options: Any) -> tuple[list[int], list[Tensor], Any]:
    """The number of views of views in each graph that is lowered, the outputs, and the model."""
    monkeypatch.setattr(backend, "STRAIGHT_LINE_PASSES", (*first, *ORIGINAL))
    counts = []

    def inner(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        counts.append(views_of_views(gm))
        return gm.forward

    model = dit_rewrite.compile(tiny.build(), "fora:interval=2", backend=inner, **options)
    return counts, tiny.outputs(model, tiny.calls(STEPS)), model


ORIGINAL = backend.STRAIGHT_LINE_PASSES


def test_the_pass_runs_on_each_straight_line_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before, expected, _ = lowered(monkeypatch)
    after, found, model = lowered(monkeypatch, MERGE_VIEWS, dump=tmp_path)
    assert (max(before), after) == (2, [0, 0])
    assert tiny.same(found, expected)
    assert "merge_views" in str(model.explain())
    assert list(tmp_path.glob("graph0/*_merge_views.diff"))


def test_the_pass_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, _ = lowered(monkeypatch)
    after, _, model = lowered(monkeypatch, MERGE_VIEWS, disable_passes=("merge_views",))
    assert after == before
    assert "merge_views" not in str(model.explain())


def test_an_analysis_leaves_its_result_in_the_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backend, "PASSES", (*backend.PASSES[:2], COUNT_CONTRACTIONS, *backend.PASSES[2:]))
    model = tiny.rewritten(tiny.build(), dump=tmp_path)
    tiny.outputs(model, tiny.calls(2))
    (rewritten,) = backend_of(model).rewritten
    counts = rewritten.context[Contractions].by_site
    assert {name.rpartition(".")[2]: count for name, count in counts.items()} == {"attn": 3, "mlp": 2}
    assert (tmp_path / "graph0" / "03_count_contractions.txt").read_text().count("\n") == len(counts)


# --- a strategy -------------------------------------------------------------------------------------------------------

EVERY_SECOND = Policy((Rule(Ne(Mod(step, 2), 0), ReuseProbabilities(), Where(("attention",))),), "probabilities")


def test_a_function_weighs_the_last_value() -> None:
    """The code of the page: one value, whose weight is not 1."""
    page = (Path(__file__).parents[1] / "docs" / "write_a_strategy.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    model = tiny.rewritten(tiny.build(), names["policy"])
    with model.trajectory(4):
        first, *others = tiny.outputs(model, tiny.calls(4))
    assert [torch.allclose(o, 0.9**n * first) for n, o in enumerate(others, 1)] == [True] * 3


class Held(TorchFunctionMode):
    """Attention by its definition, where every second step uses the probabilities of the previous step."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.held, self.calls = 0, dict[int, Tensor](), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args
        if self.step % 2 == 0:
            self.held[self.calls] = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        self.calls += 1
        return self.held[self.calls - 1] @ value


def test_the_strategy_does_what_its_definition_says() -> None:
    model, calls, expected = tiny.build(), tiny.calls(STEPS), []
    with torch.no_grad(), Held() as reference:
        for reference.step, call in enumerate(calls):
            reference.calls = 0
            expected.append(model(**call))
    found = tiny.outputs(tiny.rewritten(model, EVERY_SECOND), calls)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    plain = tiny.outputs(model, calls)
    assert [torch.allclose(a, b, atol=1e-3) for a, b in zip(plain, expected, strict=True)] == [True, False] * 3


def test_the_strategy_is_proven() -> None:
    case = MODELS["dit"]
    proof = dit_rewrite.verify(case.build(), case.inputs(4), EVERY_SECOND, backend="aot_eager")
    assert proof.passed and proof.reused


def test_queries_and_keys_are_not_computed_where_it_reuses() -> None:
    case = MODELS["dit"]
    model = dit_rewrite.compile(case.build(), EVERY_SECOND, backend="aot_eager")
    with torch.no_grad(), model.trajectory(2):
        for call in case.inputs(2):
            model(**call)
    (rewritten,) = backend_of(model).rewritten
    computing = (False,) * len(rewritten.partition.sites)
    products = [
        len(rewritten.straight(row).gm.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default))
        for row in (computing, rewritten.most_reused)
    ]
    assert products[0] - products[1] == 2 * case.sites["self"]


def test_a_registered_strategy_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(serialise.STRATEGIES, "reuse_probabilities", ReuseProbabilities)
    assert serialise.from_json(serialise.to_json(EVERY_SECOND)) == EVERY_SECOND


# --- an op ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> Iterator[None]:
    """The Triton kernel runs on a CPU."""
    pytest.importorskip("triton")
    from examples.extend.cosine_distance import triton_kernel

    modules = kernels.kernel_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernel_modules", lambda: [*modules(), triton_kernel])
        kernels.interpret(patch)
        yield


def by_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The kernel with few programs and small blocks, so that each program handles several blocks."""
    from examples.extend.cosine_distance import triton_kernel

    return triton_kernel.launch(a, b, block=32, max_programs=3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("op", [cosine_distance, by_kernel])
def test_the_op_by_hand_and_by_its_definition(op: Any) -> None:
    assert op(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])).item() == 1
    assert math.isnan(op(torch.zeros(2), torch.ones(2)).item())
    a, b = torch.randn(2, 7, 61)
    for x, y in ((a, b), (a.T, b.T), (a.bfloat16(), b.bfloat16()), (a.double(), b.double())):
        expected = 1 - torch.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0)
        assert op(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_op_is_registered() -> None:
    arguments = (torch.randn(3, 4), torch.randn(4, 3).T)
    assert set(torch.library.opcheck(torch.ops.dit_rewrite.cosine_distance.default, arguments).values()) == {"SUCCESS"}
    compiled = torch.compile(lambda a, b: cosine_distance(2 * a, b) + 1, backend="aot_eager", fullgraph=True)
    assert compiled(*arguments).item() == (cosine_distance(2 * arguments[0], arguments[1]) + 1).item()
    with pytest.raises(BadOpArgument, match="cosine_distance: b.shape"):
        cosine_distance(torch.ones(3), torch.ones(2))
