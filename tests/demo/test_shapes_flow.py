"""The flow-matching toy: the order of words matters, solvers are interchangeable, the bundled weights follow
captions."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import dit_rewrite  # noqa: E402
from dit_rewrite.demo.shapes import relations  # noqa: E402
from dit_rewrite.demo.shapes.data import SIZE as SMALL  # noqa: E402
from dit_rewrite.demo.shapes.flow_model import (  # noqa: E402
    TEXT_CHANNELS,
    FlowModel,
    FlowTextEncoder,
    encode_relations,
    load_flow_model,
    load_pair_reader,
    read_objects,
)
from dit_rewrite.demo.shapes.flow_sampling import sample_relations  # noqa: E402
from dit_rewrite.demo.shapes.model import SCHEDULE  # noqa: E402
from dit_rewrite.demo.shapes.picture import GAP, HEADER, MARGIN  # noqa: E402
from dit_rewrite.demo.shapes.relations import MAX_TOKENS, SIZE, Objects, Pairs  # noqa: E402
from dit_rewrite.demo.shapes.sampling import sample_images  # noqa: E402
from dit_rewrite.errors import DamagedWeights  # noqa: E402
from dit_rewrite.module import twin  # noqa: E402

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"
CAPTION = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return load_flow_model()


# --- the model --------------------------------------------------------------------------------------------------------


def test_text_states_are_words_plus_places_and_the_pooled_text_their_mean() -> None:
    encoder = FlowTextEncoder()
    nn.init.zeros_(encoder.words.weight)
    states, pooled = encode_relations(encoder, [CAPTION, "red circle"])
    assert states.shape == (2, MAX_TOKENS, TEXT_CHANNELS) and pooled.shape == (2, TEXT_CHANNELS)
    assert torch.equal(states[0], encoder.places) and torch.equal(states[1], encoder.places)
    nn.init.ones_(encoder.words.weight)
    states, pooled = encode_relations(encoder, [CAPTION])
    assert torch.equal(states[0], encoder.places + 1)
    assert torch.equal(pooled, states.mean(1))


def test_the_order_of_the_words_is_read(model: FlowModel) -> None:
    """Captions of the same words have the same pooled text; joint attention tells them apart."""
    states, pooled = encode_relations(model.encoder, [CAPTION, "a blue square left of a red circle"])
    assert torch.allclose(pooled[0], pooled[1], atol=1e-5)
    latents = torch.randn(1, 3, SIZE, SIZE, generator=Generator().manual_seed(3)).expand(2, -1, -1, -1)
    with torch.no_grad():
        one, other = model.denoiser(latents, states, pooled[:1].expand(2, -1), torch.tensor([900.0] * 2)).sample
    assert (one - other).abs().amax() > 0.05


def test_missing_weights_are_named(tmp_path: Path) -> None:
    for load in (load_flow_model, load_pair_reader):
        with pytest.raises(DamagedWeights, match="nothing.safetensors"):
            load(tmp_path / "nothing.safetensors")


# --- sampling ---------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Predicts 1 where the caption has words and 3 where it is empty; records its arguments."""

    def __init__(self, encoder: FlowTextEncoder) -> None:
        super().__init__()
        self.empty = encode_relations(encoder, [relations.NULL_CAPTION])[0]
        self.calls: list[dict[str, Tensor]] = []

    def forward(
        self, latents: Tensor, states: Tensor, pooled: Tensor, times: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        self.calls.append({"latents": latents, "states": states, "pooled": pooled, "times": times})
        empty = (states == self.empty).all((1, 2))
        return (torch.where(empty, 3.0, 1.0)[:, None, None, None].expand_as(latents),)


@pytest.fixture
def encoder() -> FlowTextEncoder:
    return FlowTextEncoder()


def test_one_call_a_step_with_both_halves_and_one_conditioning(encoder: FlowTextEncoder) -> None:
    """New conditioning objects start a new trajectory: the objects must be the same at every step."""
    recorder, ticks, captions = Recorder(encoder), [], [CAPTION, "a white cross above a red cross"]
    sample_relations(recorder, encoder, captions, steps=4, seed=0, progress=lambda: ticks.append(1))
    assert len(recorder.calls) == len(ticks) == 4
    first = recorder.calls[0]
    assert torch.equal(first["states"], encode_relations(encoder, [*captions, "", ""])[0])
    assert torch.equal(first["pooled"], first["states"].mean(1))
    assert all(call["states"] is first["states"] and call["pooled"] is first["pooled"] for call in recorder.calls)
    assert all(torch.equal(*call["latents"].chunk(2)) for call in recorder.calls)
    assert [call["times"].tolist() for call in recorder.calls] == [[t] * 4 for t in (1000.0, 667.0, 334.0, 1.0)]


@pytest.mark.parametrize(("guidance", "velocity"), [(1.0, 1.0), (2.0, -1.0), (1.5, 0.0)])
@pytest.mark.parametrize("solver", [None, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_guided_velocity_by_hand(encoder: FlowTextEncoder, guidance: float, velocity: float, solver: Any) -> None:
    """From v(text) = 1 and v(empty) = 3: 3 + guidance * (1 - 3). It is constant, so that every solver goes from the
    noise straight to noise - v."""
    noise = torch.randn(1, 3, SIZE, SIZE, generator=Generator().manual_seed(7))
    recorder, scheduler = Recorder(encoder), None if solver is None else solver()
    images = sample_relations(recorder, encoder, [CAPTION], steps=3, guidance=guidance, seed=7, scheduler=scheduler)
    assert torch.allclose(images, (noise - velocity).clamp(-1, 1), atol=1e-5)
    assert len(recorder.calls) == (5 if solver is FlowMatchHeunDiscreteScheduler else 3), "Heun's has two a step"
    if scheduler is not None:
        assert [call["times"][0].item() for call in recorder.calls] == scheduler.timesteps.tolist()


class Grey(nn.Module):
    """Predicts the v of a picture that is 0.25 everywhere, from v = (alpha x - x0) / sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
        self.times: list[int] = []

    def forward(self, latents: Tensor, times: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.times.append(int(times[0]))
        share = self.alphas[times][:, None, None, None]
        return ((share.sqrt() * latents - 0.25) / (1 - share).sqrt(),)


@pytest.mark.parametrize("scheduler", [
    DDIMScheduler(**SCHEDULE),
    DPMSolverMultistepScheduler(**SCHEDULE, solver_order=2),
    DPMSolverMultistepScheduler(**SCHEDULE, solver_order=3),
    UniPCMultistepScheduler(**SCHEDULE),
], ids=["DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC"])  # fmt: skip
def test_other_solvers_take_the_older_toys_to_the_picture_too(scheduler: Any) -> None:
    """One call a step, at the timesteps of the given scheduler."""
    grey = Grey()
    images = sample_images(grey, torch.tensor([0, 1]), steps=6, guidance=2.0, seed=1, scheduler=scheduler)
    assert images.shape == (2, 3, SMALL, SMALL) and torch.allclose(images, torch.tensor(0.25), atol=1e-2)
    assert grey.times == scheduler.timesteps.tolist() and len(grey.times) == 6


def test_the_bundled_model_draws_what_it_is_told(model: FlowModel) -> None:
    """Far above chance, which is one in a thousand; evaluate_flow.py measures how often, on 500 captions."""
    pairs = relations.draw_pairs(40, Generator().manual_seed(424242))
    asked = relations.describe(pairs, Generator().manual_seed(1))
    seen = read_objects(load_pair_reader(), sample_relations(model.denoiser, model.encoder, asked, steps=12, seed=0))
    assert (seen.have_classes(pairs) & seen.in_relation(pairs)).float().mean() > 0.3
    turned = Pairs(pairs.second, pairs.first, pairs.vertical)
    assert (seen.have_classes(pairs) & seen.in_relation(turned)).float().mean() < 0.15  # and not by chance


@pytest.mark.parametrize(("solver", "calls"), [
    (FlowMatchEulerDiscreteScheduler, (2, 2)),
    (FlowMatchHeunDiscreteScheduler, (3, 4)),
])  # fmt: skip
def test_the_denoiser_is_rewritten(model: FlowModel, solver: Any, calls: tuple[int, int]) -> None:
    """FORA(2) reuses 5 joint attentions and 9 MLPs (the last block has none for the text) at every other step, and the
    picture stays close. Heun's method calls twice at each step but the first."""
    rewritten = dit_rewrite.compile(twin(model.denoiser), dit_rewrite.policies.FORA(2), backend="aot_eager")
    images, plain = (
        sample_relations(denoiser, model.encoder, [CAPTION], steps=4, seed=0, scheduler=solver())
        for denoiser in (rewritten, model.denoiser)
    )
    stats = rewritten.stats()
    assert (stats.computed, stats.reused) == (14 * calls[0], 14 * calls[1])
    assert not stats.misses
    assert 0 < (images - plain).norm() / plain.norm() < 0.5


# --- the scripts ------------------------------------------------------------------------------------------------------


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def test_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and run again, training ends in the same state, and leaves usable weights."""
    small = ("--batch", "2", "--steps", "4", "--hold", "2", "--save-every", "1", "--eager")
    run("train_flow.py", monkeypatch, "--out", str(tmp_path / "whole"), *small)
    run("train_flow.py", monkeypatch, "--out", str(tmp_path / "parts"), "--stop", "2", *small)
    run("train_flow.py", monkeypatch, "--out", str(tmp_path / "parts"), *small)
    whole, parts = (load_flow_model(tmp_path / name / "flow_denoiser.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_noise_levels_lean_to_the_noisy_side() -> None:
    """sigmoid(N(0.3, 1)): the median is sigmoid(0.3) = 0.574, and 9.7 % lie below sigmoid(-1) = 0.269."""
    drawn = runpy.run_path(str(SCRIPTS / "train_flow.py"))["draw_sigmas"](20000, Generator().manual_seed(0))
    assert drawn.min() > 0 and drawn.max() < 1
    assert drawn.median().item() == pytest.approx(0.574, abs=0.008)
    assert (drawn < 0.269).float().mean().item() == pytest.approx(0.097, abs=0.01)


@pytest.mark.parametrize(("script", "weights"), [
    ("train_pair_reader.py", "pair_reader.safetensors"),
    ("train_classifier.py", "classifier.safetensors"),
])  # fmt: skip
def test_a_reader_that_reads_badly_is_told_to_train_longer(
    script: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="below 99%"):
        run(script, monkeypatch, "--out", str(tmp_path), "--steps", "2", "--batch", "4")
    assert (tmp_path / weights).stat().st_size > 1000


def test_the_evaluation_measures_both_objects_and_the_relation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On real images it is right, on shuffled ones it is not; the script prints a line for each scale."""
    picture = tmp_path / "grid.png"
    arguments = ("--captions", "6", "--steps", "2", "--scales", "1", "2", "--out", str(picture))
    module = run("evaluate_flow.py", monkeypatch, *arguments)
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[:3]] == [
        ["real", "images"],
        ["guidance", "1.0"],
        ["guidance", "2.0"],
    ]
    assert Image.open(picture).size == (MARGIN + 6 * (4 * SIZE + GAP), HEADER + 3 * (4 * SIZE + GAP))
    images, _, pairs = relations.sample_related(400, Generator().manual_seed(77))
    seen = read_objects(load_pair_reader(), images)
    assert min(module["grade"](seen, pairs).values()) >= 0.99
    wrong = module["grade"](Objects(*(part.roll(1, 0) for part in seen)), pairs)
    assert wrong["all"] < 0.02 and wrong["shape"] < 0.25 and wrong["colour"] < 0.2
    crossed = module["grade"](seen, Pairs(pairs.first, pairs.second, 1 - pairs.vertical))
    assert crossed["shape"] >= 0.99 and crossed["colour"] >= 0.99 and crossed["relation"] < 0.3
