"""`compile` changes the user's own module in place, and keeps its class checks, state and hooks."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.errors import BadArgument, NotAModule, NotRewritten
from dit_rewrite.module import backend_of, twin
from dit_rewrite.policies import FORA
from tests.helpers import tiny
from tests.helpers.models import MODELS
from tests.helpers.tiny import calls, fora, outputs, row, same


def compiled(model: Any, policy: Any = "fora:interval=3") -> Any:
    return dit_rewrite.compile(model, policy, backend="aot_eager")


def test_it_is_the_same_object_of_the_same_class(tmp_path: Path) -> None:
    model: Any = MODELS["dit"].build()
    kind, names, weights = type(model), set(model.state_dict()), list(model.parameters())
    assert compiled(model) is model
    assert isinstance(model, dit_rewrite.RewrittenModule)
    assert type(model) is kind
    assert set(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    model.save_pretrained(tmp_path)
    saved = kind.from_pretrained(tmp_path)
    assert saved.config["_class_name"] == kind.__name__
    assert not isinstance(saved, dit_rewrite.RewrittenModule)


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), twin])
def test_copies_are_plain(make: Any) -> None:
    plain, inputs = tiny.build(), calls(4)
    expected, reused = outputs(plain, inputs), fora(plain, inputs)
    model = compiled(plain)
    with model.trajectory(4):
        outputs(model, inputs[:1])
    copied = make(model)
    assert type(copied) is type(model)
    assert not isinstance(copied, dit_rewrite.RewrittenModule)
    assert not hasattr(copied, "stats")
    assert same(outputs(copied, inputs), expected)
    with model.trajectory(4):
        assert same(outputs(model, inputs), reused)


def test_restoring() -> None:
    model, inputs = tiny.build(), calls(4)
    expected, before = outputs(model, inputs), dict(model.__dict__)
    compiled(model)
    assert not same(outputs(model, inputs), expected)
    assert dit_rewrite.restore(model) is model
    assert dict(model.__dict__) == before | {"_compiled_call_impl": None}
    assert same(outputs(model, inputs), expected)
    assert dit_rewrite.restore(model) is model, "restoring a plain module does nothing"
    with pytest.raises(NotRewritten, match="was not given to dit_rewrite.compile"):
        backend_of(model)


class SmallPipeline:
    """An object that counts as a pipeline."""

    def __init__(self) -> None:
        self.transformer = tiny.build()
        self.components = {"transformer": self.transformer}

    def __call__(self) -> None: ...


def test_arguments_that_are_refused(tmp_path: Path) -> None:
    """An enabled pipeline is no model, and a dump needs a folder."""
    pipe = dit_rewrite.enable(SmallPipeline(), FORA(2))
    assert not isinstance(pipe, dit_rewrite.RewrittenModule)
    with pytest.raises(BadArgument, match=r"predict: model='SmallPipeline'.*such as pipe\.transformer"):
        dit_rewrite.predict(pipe)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match="Give dump as a folder"):
        dit_rewrite.compile(tiny.build(), FORA(2), dump=tmp_path / "file")


class Residual(nn.Module):
    """One projection, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(x)


def test_a_class_of_torch_itself() -> None:
    """Dynamo traces no call that starts in torch's own files; the sites are still found and named."""
    model = nn.Sequential(Residual(), Residual()).requires_grad_(False)
    plain, x = twin(model), torch.ones(2, 4)
    assert torch.equal(compiled(model)(x), plain(x))
    assert [place.site.name for place in model.explain().sites] == ["0.out", "1.out"]


def test_compiling_again_exchanges_the_policy() -> None:
    plain, inputs = tiny.build(), calls(6)
    model = compiled(compiled(twin(plain)), FORA(2))
    with model.trajectory(6):
        assert same(outputs(model, inputs), fora(plain, inputs, 2))
    assert row(model, 6) == "CRCRCR"


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_a_model_that_was_compiled_before(how: str) -> None:
    """`compile` takes off torch.compile's wrapper; `restore` brings back the settings of Module.compile."""
    plain, inputs = tiny.build(), calls(4)
    inner, graphs = twin(plain), []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    given = torch.compile(inner, backend=backend) if how == "torch.compile" else inner
    if how == "Module.compile":
        inner.compile(backend=backend)
    model = compiled(given)
    assert model is inner
    with model.trajectory(4):
        assert same(outputs(model, inputs), fora(plain, inputs))
    assert not graphs, "only our backend compiled it"
    dit_rewrite.restore(given)
    outputs(inner, inputs[:1])
    assert len(graphs) == (how == "Module.compile")


def test_a_model_compiled_around_it_is_unwrapped() -> None:
    plain, inputs = tiny.build(), calls(4)
    model = compiled(torch.compile(compiled(twin(plain), FORA(2)), backend="eager"))
    with model.trajectory(4):
        assert same(outputs(model, inputs), fora(plain, inputs))


def test_hooks_before_and_after_run_at_each_call() -> None:
    """One hook changes an argument and another the result; both see every call."""
    plain, inputs = tiny.build(), calls(4)
    model, seen = compiled(twin(plain)), list[str]()

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append("before")
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}

    def after(_: nn.Module, args: Any, result: Tensor) -> Tensor:
        seen.append("after")
        return result + 1

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    doubled = [{**arguments, "hidden_states": arguments["hidden_states"] * 2} for arguments in inputs]
    with model.trajectory(4):
        found = outputs(model, inputs)
    assert same(found, [out + 1 for out in fora(plain, doubled)])
    assert seen == ["before", "after"] * 4
    for handle in handles:
        handle.remove()
    with model.trajectory(4):
        assert same(outputs(model, inputs), fora(plain, inputs))


@pytest.mark.parametrize("given", [object(), tiny.TinyDiT, None, [1]], ids=["object", "class", "None", "list"])
def test_what_is_no_model(given: Any) -> None:
    with pytest.raises(NotAModule, match="Give compile a torch.nn.Module"):
        dit_rewrite.compile(given, FORA(2))
    with pytest.raises(NotAModule):
        dit_rewrite.restore(given)
