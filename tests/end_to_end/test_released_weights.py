"""Weights that only step tables read leave the memory between two computations of rows, and come back."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit_rewrite
from dit_rewrite.compiler import step_tables
from dit_rewrite.errors import BadArgument, TableReason
from dit_rewrite.policies import FORA
from tests.end_to_end.test_step_tables import CONDITIONED, STEPS, UNCONDITIONED, close, compiled, run, scheduler
from tests.helpers.models import MODELS, output


def releasing(name: str = CONDITIONED, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    return compiled(name, tables="all", release=True, **options), MODELS[name].inputs(STEPS)


def in_memory(model: nn.Module) -> dict[str, bool]:
    """Return by name whether the weights of a model are in storages of torch's allocator."""
    return {name: weight.untyped_storage().resizable() for name, weight in model.named_parameters()}


def size_of(model: nn.Module, *parts: str) -> int:
    """Return the bytes of the weights with one of these parts in their names."""
    return sum(w.nbytes for name, w in model.named_parameters() if any(part in name for part in parts))


PARTS = {CONDITIONED: ("norm1.", "proj_out_1."), UNCONDITIONED: ("adaln_single.",)}


@pytest.mark.parametrize("name", PARTS)
def test_exactly_the_weights_of_the_modulation_are_released(name: str) -> None:
    """All trajectories compute the same, with no recompile."""
    model, calls = releasing(name)
    told = {"scheduler": scheduler(calls)}
    first, *others = [run(model, calls, **told) for _ in range(3)]
    released = {name for name, memory in in_memory(model).items() if not memory}
    assert released == {n for n, _ in model.named_parameters() if any(part in n for part in PARTS[name])}
    assert model.stats().released_bytes == size_of(model, *PARTS[name])
    assert model.explain().rewritten[0].step_table.released_bytes == model.stats().released_bytes
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert model.stats().recompiles == 0
    assert not model.stats().tables


def test_released_weights_are_reported_and_read_as_ever_until_restore_brings_them_back() -> None:
    model, calls = releasing()
    plain = copy.deepcopy(model)
    before, values = dict(model.named_parameters()), {n: value.clone() for n, value in model.state_dict().items()}
    run(model, calls)
    assert "released  195.4kB of weights" in str(model.explain())
    assert "0.19 MiB of weights released" in str(model.stats())

    copied = copy.deepcopy(model)
    for state in (model.state_dict(), copied.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in values.items())
    assert all(in_memory(copied).values())
    assert not all(in_memory(model).values())

    dit_rewrite.restore(model)
    assert all(in_memory(model).values())
    assert all(weight is before[name] for name, weight in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(output(model(**calls[0])), output(plain(**calls[0])))


def test_compiling_again_brings_them_back() -> None:
    model, calls = releasing()
    run(model, calls)
    dit_rewrite.compile(model, FORA(2), backend="aot_eager")
    assert all(in_memory(model).values())


def test_rows_that_are_computed_one_by_one_release_nothing() -> None:
    model, calls = releasing(UNCONDITIONED)
    run(model, calls, num_steps=STEPS)
    assert model.stats().table_rows == STEPS
    assert model.stats().released_bytes == 0
    assert all(in_memory(model).values())


def test_weights_that_change_while_they_are_released() -> None:
    """The next trajectory computes rows from the new values, and releases those."""
    model, calls = releasing(UNCONDITIONED)
    told = {"scheduler": scheduler(calls)}
    plain = dit_rewrite.compile(copy.deepcopy(model), FORA(3), backend="aot_eager", disable_passes=("step_tables",))
    run(model, calls, **told)
    linear = model.adaln_single.linear

    def change_in_place() -> None:
        with torch.no_grad():
            linear.weight.mul_(1.5)

    def load() -> None:
        model.load_state_dict({**model.state_dict(), "adaln_single.linear.weight": linear.weight.detach() * 1.5})

    def replace() -> None:
        linear.weight = nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)

    for change in (change_in_place, load, replace):
        assert not in_memory(model)["adaln_single.linear.weight"]
        old = linear.weight.clone()
        change()
        assert torch.equal(linear.weight, old * 1.5), change
        plain.load_state_dict(model.state_dict())
        close(run(model, calls, **told), run(plain, calls, **told))
        assert model.stats().released_bytes == size_of(model, *PARTS[UNCONDITIONED])


def test_another_graph_that_reads_them_directly_brings_them_back() -> None:
    """Without a scheduler a graph for other sizes has no table here, and so computes the modulation in each step."""
    model, calls = releasing(dynamic=False)
    run(model, calls)
    small = [{n: v[:1] if isinstance(v, Tensor) else v for n, v in call.items()} for call in calls]
    run(model, small, num_steps=STEPS)
    assert [each.has_table for each in model.explain().rewritten] == [True, False]
    run(model, calls)
    assert model.stats().released_bytes == 0
    assert all(in_memory(model).values())


def test_weights_that_hoisted_values_are_computed_from_stay() -> None:
    """SD3 embeds the pooled text once per trajectory, from weights that the step table is computed from too."""
    model, calls = releasing("sd3")
    run(model, calls)
    stay = size_of(model, ".text_embedder.")
    assert stay
    assert model.explain().rewritten[0].step_table.released_bytes == model.stats().released_bytes + stay


def test_parts_of_a_model_release_nothing() -> None:
    """Behind a graph break another graph may read the weights, and blocks may share one graph."""
    model, calls = releasing(UNCONDITIONED)
    model.transformer_blocks[1].register_forward_pre_hook(torch.compiler.disable(lambda *_: None))
    run(model, calls)
    assert len(model.explain().rewritten) > 1
    assert model.stats().tables[TableReason.PART_OF_MODEL]
    assert all(in_memory(model).values())


class Tied(nn.Module):
    """A modulation whose weight the block uses too: under another name, as tied weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp.weight = self.modulation.weight
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        shift = self.modulation(torch.sin(timestep[:, None] * torch.arange(8.0)))
        for _ in range(2):
            inner = torch.nn.functional.gelu(self.head(hidden_states + shift[:, None]))
            hidden_states = hidden_states + self.mlp(inner)
        return hidden_states


def test_tied_weights_stay() -> None:
    model = dit_rewrite.compile(Tied(), FORA(3), backend="aot_eager", tables="all", release=True)
    timesteps = torch.linspace(900, 100, STEPS)
    state = torch.randn(2, 4, 8)
    calls = [{"hidden_states": state + 0.1 * i, "timestep": t.repeat(2)} for i, t in enumerate(timesteps)]
    run(model, calls)
    assert {name for name, memory in in_memory(model).items() if not memory} == {"modulation.bias"}


def test_threads() -> None:
    """Rows are not computed in one thread while another one moves the weights."""
    model, calls = releasing(UNCONDITIONED)
    expected, found = run(model, calls), list[list[Tensor]]()
    weights = model._backend.weights

    def sample() -> None:
        found.append(run(model, calls))  # in a thread of its own, with rows of its own
        weights.bring_back()

    threads = [threading.Thread(target=sample) for _ in range(2)]
    with weights.lock:
        for thread in threads:
            thread.start()
        threads[0].join(timeout=2)
        assert model.stats().table_rows == STEPS
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for outputs in found:
        close(outputs, expected)


def test_weights_are_compared_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum reads the weights, which another thread may be releasing."""
    model, calls = releasing(UNCONDITIONED)
    lock, held, compare = model._backend.weights.lock, list[bool](), step_tables.checksum

    def checked(tensors: list[Tensor]) -> Tensor:
        held.append(lock._is_owned())
        return compare(tensors)

    monkeypatch.setattr(step_tables, "checksum", checked)
    for _ in range(2):
        run(model, calls)
    assert held == [True, True]


def test_release_needs_all_steps_to_read_tables() -> None:
    """Otherwise computing steps read these weights."""
    with pytest.raises(BadArgument, match="release=True is out of range"):
        compiled(CONDITIONED, release=True)
