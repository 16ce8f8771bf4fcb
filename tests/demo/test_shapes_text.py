"""Captioned shapes: pictures match their captions, the text's mask has an effect, the bundled weights follow
captions."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

pytest.importorskip("diffusers")

import dit_rewrite  # noqa: E402
from dit_rewrite.demo.shapes import (  # noqa: E402
    accuracy,
    captions,  # noqa: E402
    load_classifier,
)
from dit_rewrite.demo.shapes.data import COLOURS, SHAPES, SIZE  # noqa: E402
from dit_rewrite.demo.shapes.model import WEIGHTS  # noqa: E402
from dit_rewrite.demo.shapes.text_model import TEXT_CHANNELS, TextEncoder, TextModel, encode, load_text_model  # noqa: E402
from dit_rewrite.demo.shapes.text_sampling import sample_captions  # noqa: E402
from dit_rewrite.errors import BadArgument, DamagedWeights
from dit_rewrite.module import twin

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


def scene(shape: str, colour: str, size: int, row: int, column: int) -> captions.Scenes:
    indices = (SHAPES.index(shape), list(COLOURS).index(colour), size, row, column)
    return captions.Scenes(*(torch.tensor([index]) for index in indices))


@pytest.fixture(scope="module")
def model() -> TextModel:
    return load_text_model()


# --- captions ---------------------------------------------------------------------------------------------------------


def test_tokens_by_hand() -> None:
    """A start, the words, padding; capitals do not matter; the empty caption is a start alone."""
    tokens, mask = captions.tokenise(["Red circle", captions.NULL_CAPTION])
    start, red, circle, pad = (captions.WORDS.index(word) for word in ("<start>", "red", "circle", "<pad>"))
    rest = [pad] * (captions.MAX_TOKENS - 3)
    assert tokens.tolist() == [[start, red, circle, *rest], [start, pad, pad, *rest]]
    assert mask.sum(1).tolist() == [3, 1]
    assert mask[0, :3].all() and mask[1, 0]


def test_the_longest_caption_fits_and_a_longer_one_is_refused() -> None:
    most = captions.MAX_TOKENS - 1
    assert captions.tokenise(["a " * most])[1].all()
    with pytest.raises(BadArgument, match="at most 23 of the words"):
        captions.tokenise(["a " * (most + 1)])


@pytest.mark.parametrize("caption", ["a pink circle", "<pad>", "<start> red circle", "red circle."])
def test_an_unknown_word_is_refused(caption: str) -> None:
    with pytest.raises(BadArgument, match="caption="):
        captions.tokenise(["red circle", caption])


def test_every_word_is_there_once_and_is_used() -> None:
    """Every word of the vocabulary occurs in the captions that the model is trained on."""
    said = captions.describe(captions.draw_scenes(2000, Generator().manual_seed(1)), Generator().manual_seed(2))
    assert {word for caption in said for word in caption.split()} == set(captions.WORDS[2:])
    assert len(set(captions.WORDS)) == len(captions.WORDS)
    assert int(captions.tokenise(said)[1].sum(1).max()) == 1 + max(len(caption.split()) for caption in said)


def test_places_by_hand() -> None:
    said = [[captions.name_place(row, column) for column in range(3)] for row in range(3)]
    assert said == [
        ["at the top left", "at the top", "at the top right"],
        ["at the left", "in the middle", "at the right"],
        ["at the bottom left", "at the bottom", "at the bottom right"],
    ]


@pytest.mark.parametrize(("template", "caption"), [
    ("{colour} {shape}", "blue cross"),
    ("a {colour} {shape} {place}", "a blue cross at the bottom left"),
    ("the {shape} {place} is {size} and it is {colour}", "the cross at the bottom left is WORD and it is blue"),
])  # fmt: skip
def test_a_caption_says_what_the_scene_is(template: str, caption: str) -> None:
    """Both words for the size appear."""
    one = scene("cross", "blue", size=1, row=2, column=0)
    said = {captions.describe(one, Generator().manual_seed(seed), [template])[0] for seed in range(20)}
    assert said == {caption.replace("WORD", word) for word in ("large", "big")}


def test_a_drawn_shape_has_its_colour_size_and_place() -> None:
    """A small red square at the top left covers (2 * 0.85 * radius)^2 pixels, all of them in the top left quarter."""
    pictures = torch.cat(
        [captions.render(scene("square", "red", 0, 0, 0), Generator().manual_seed(k)) for k in range(50)]
    )
    ground = pictures[:, :, -1:, -1:]
    assert ((ground >= -0.85) & (ground <= -0.75)).all()
    share = (pictures - ground)[:, 0] / (0.9 - ground[:, 0])  # of red ink
    area = share.sum((1, 2))
    assert ((area > (1.7 * 2.7) ** 2 - 1.5) & (area < (1.7 * 3.4) ** 2 + 1.5)).all()
    assert (share[:, 9:].abs().amax() < 1e-5) and (share[:, :, 9:].abs().amax() < 1e-5)
    assert torch.allclose(pictures[:, :, 3, 3], torch.tensor(COLOURS["red"]), atol=1e-6)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("size", [0, 1])
def test_a_circle_lies_where_it_is_said_to_be(size: int, row: int, column: int) -> None:
    """Its centre of mass is its centre: nearer to the named place than half way to the next one."""
    image = captions.render(scene("circle", "white", size, row, column), Generator().manual_seed(row * 3 + column))[
        0, 0
    ]
    share = image - image.median()
    pixel = torch.arange(SIZE) + 0.5
    x, y = ((share.sum(axis) * pixel).sum() / share.sum() for axis in (0, 1))
    radius = sum(captions.RADII[size]) / 2
    step = (SIZE - 2 * radius) / 2  # from one place to the next
    assert abs(x - (radius + column * step)) < step / 2
    assert abs(y - (radius + row * step)) < step / 2


def test_samples_repeat_with_their_seed() -> None:
    (a, said_a, scenes_a), (b, said_b, scenes_b) = (
        captions.sample_captioned(8, Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(a, b) and said_a == said_b
    assert all(torch.equal(x, y) for x, y in zip(scenes_a, scenes_b, strict=True))
    assert not torch.equal(a, captions.sample_captioned(8, Generator().manual_seed(6))[0])
    assert a.shape == (8, 3, SIZE, SIZE) and a.abs().amax() <= 1


def test_the_bundled_text_classifier_reads_real_images() -> None:
    """At least 99 % of images outside the training set, including the small ones."""
    images, _, scenes = captions.sample_captioned(2000, Generator().manual_seed(987654))
    classifier = load_classifier(WEIGHTS / "text_classifier.safetensors")
    assert accuracy(classifier, images, scenes.labels) >= 0.99
    small = scenes.size == 0
    assert accuracy(classifier, images[small], scenes.labels[small]) >= 0.99


# --- the model --------------------------------------------------------------------------------------------------------


def test_text_states_are_words_plus_places() -> None:
    """The first place is all sines of 0 and cosines of 0; the second starts with the sine and cosine of 1."""
    encoder = TextEncoder()
    nn.init.zeros_(encoder.words.weight)
    states, mask = encode(encoder, ["red circle"])
    half = TEXT_CHANNELS // 2
    assert states.shape == (1, captions.MAX_TOKENS, TEXT_CHANNELS) and mask.dtype == torch.bool
    assert states[0, 0].tolist() == [0.0] * half + [1.0] * half
    assert states[0, 1, 0].item() == pytest.approx(math.sin(1)) and states[0, 1, half].item() == pytest.approx(
        math.cos(1)
    )
    nn.init.ones_(encoder.words.weight)
    assert torch.equal(encode(encoder, ["red circle"])[0], states + 1)


def test_padding_is_not_read_and_words_are(model: TextModel) -> None:
    """Other states behind the mask change nothing; another word changes the prediction."""
    latents, time = torch.randn(1, 3, SIZE, SIZE, generator=Generator().manual_seed(3)), torch.tensor([900])
    states, mask = encode(model.encoder, ["red circle"])

    def predict(states: Tensor) -> Tensor:
        with torch.no_grad():
            return model.denoiser(latents, states, time, encoder_attention_mask=mask, return_dict=False)[0]

    before = predict(states)
    assert torch.allclose(predict(torch.where(mask[:, :, None], states, 50.0)), before, atol=1e-6)
    other = encode(model.encoder, ["blue circle"])[0]
    assert (predict(other) - before).abs().amax() > 1e-2


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedWeights, match="nothing.safetensors"):
        load_text_model(tmp_path / "nothing.safetensors")


# --- sampling ---------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Predicts 1 where the caption has words and 3 where it is empty; records its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(
        self, latents: Tensor, states: Tensor, times: Tensor, encoder_attention_mask: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        self.calls.append({"states": states, "mask": encoder_attention_mask, "times": times, "latents": latents})
        empty = encoder_attention_mask.sum(1) == 1
        return (torch.where(empty, 3.0, 1.0)[:, None, None, None].expand_as(latents),)


def test_one_call_a_step_with_both_halves_and_one_conditioning() -> None:
    """New conditioning objects start a new trajectory: the objects must be the same at every step."""
    recorder, ticks = Recorder(), []
    captions_ = ["red circle", "a small blue cross at the top"]
    sample_captions(recorder, TextEncoder(), captions_, steps=4, seed=0, progress=lambda: ticks.append(1))
    assert len(recorder.calls) == len(ticks) == 4
    first = recorder.calls[0]
    assert first["mask"].sum(1).tolist() == [3, 8, 1, 1]
    assert all(call["states"] is first["states"] and call["mask"] is first["mask"] for call in recorder.calls)
    assert all(torch.equal(*call["latents"].chunk(2)) for call in recorder.calls)
    assert [int(call["times"][0]) for call in recorder.calls] == [999, 749, 499, 249]  # trailing


def test_a_negative_caption_takes_the_place_of_the_empty_one() -> None:
    recorder, encoder = Recorder(), TextEncoder()
    asked, negative = ["red circle", "blue cross"], ["a small blue cross", "a circle"]
    sample_captions(recorder, encoder, asked, steps=1, seed=0, negative=negative)
    states, mask = encode(encoder, [*asked, *negative])
    assert torch.equal(recorder.calls[0]["states"], states) and torch.equal(recorder.calls[0]["mask"], mask)


@pytest.mark.parametrize(("guidance", "velocity"), [(1.0, 1.0), (2.0, -1.0), (1.5, 0.0)])
def test_the_guided_velocity_by_hand(guidance: float, velocity: float) -> None:
    """From v(text) = 1 and v(empty) = 3: 3 + guidance * (1 - 3); the sample is the scheduler's with that v."""
    from dit_rewrite.demo.shapes.model import build_scheduler

    scheduler = build_scheduler()
    scheduler.set_timesteps(1)
    noise = torch.randn(1, 3, SIZE, SIZE, generator=Generator().manual_seed(7))
    expected = scheduler.step(torch.full_like(noise, velocity), scheduler.timesteps[0], noise).prev_sample.clamp(-1, 1)
    images = sample_captions(Recorder(), TextEncoder(), ["red circle"], steps=1, guidance=guidance, seed=7)
    assert torch.allclose(images, expected, atol=1e-6)


def test_the_bundled_model_draws_what_it_is_told(model: TextModel) -> None:
    """Far above chance, which is one in twenty; evaluate_text.py measures how often, on 500 captions."""
    scenes = captions.draw_scenes(40, Generator().manual_seed(424242))
    asked = captions.describe(scenes, Generator().manual_seed(1))
    images = sample_captions(model.denoiser, model.encoder, asked, steps=12, seed=0)
    classifier = load_classifier(WEIGHTS / "text_classifier.safetensors")
    assert accuracy(classifier, images, scenes.labels) > 0.6
    assert accuracy(classifier, images, scenes.labels.roll(1)) < 0.3  # and not by chance


def test_the_denoiser_is_rewritten(model: TextModel) -> None:
    """FORA(2) reuses both attentions and the MLP of 4 blocks at every other step, and the picture stays close."""
    asked = ["a large red circle at the top left"]
    rewritten = dit_rewrite.compile(twin(model.denoiser), dit_rewrite.policies.FORA(2), backend="aot_eager")
    images = sample_captions(rewritten, model.encoder, asked, steps=8, seed=0)
    plain = sample_captions(model.denoiser, model.encoder, asked, steps=8, seed=0)
    stats = rewritten.stats()
    assert (stats.computed, stats.reused) == (4 * 12, 4 * 12)
    assert 0 < (images - plain).norm() / plain.norm() < 0.5


# --- the scripts ------------------------------------------------------------------------------------------------------


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    return runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def test_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and run again, training ends in the same state, and leaves usable weights."""
    small = ("--batch", "2", "--steps", "4", "--save-every", "1")
    run("train_text.py", monkeypatch, "--out", str(tmp_path / "whole"), *small)
    run("train_text.py", monkeypatch, "--out", str(tmp_path / "parts"), "--stop", "2", *small)
    run("train_text.py", monkeypatch, "--out", str(tmp_path / "parts"), *small)
    whole, parts = (load_text_model(tmp_path / name / "text_denoiser.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_most_timesteps_are_where_shapes_form() -> None:
    """sigmoid(N(-0.6, 1)): the median is sigmoid(-0.6) = 0.354, and 7.4 % lie above sigmoid(0.847) = 0.7."""
    drawn = runpy.run_path(str(SCRIPTS / "train_text.py"))["draw_timesteps"](20000, 999, Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() <= 999
    assert drawn.median().item() == pytest.approx(354, abs=8)
    assert (drawn >= 700).float().mean().item() == pytest.approx(0.074, abs=0.01)


def test_the_rate_rises_and_falls() -> None:
    from dit_rewrite.demo.shapes.training import rate_at

    assert rate_at(0, 6000, 2.0) == pytest.approx(0.01)
    assert rate_at(3000, 6000, 1.0) == pytest.approx(0.5)
    assert rate_at(6000, 6000, 1.0) == pytest.approx(0.0)


def test_the_evaluation_measures_size_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On real images it is right, on shuffled ones it is not; the script prints a line for each scale."""
    picture = tmp_path / "grid.png"
    arguments = ("--captions", "16", "--steps", "2", "--scales", "1", "2", "--out", str(picture))
    module = run("evaluate_text.py", monkeypatch, *arguments)
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[:3]] == [
        ["real", "images"],
        ["guidance", "1.0"],
        ["guidance", "2.0"],
    ]
    assert picture.stat().st_size > 0
    images, said, scenes = captions.sample_captioned(400, Generator().manual_seed(77))
    classifier = load_classifier(WEIGHTS / "text_classifier.safetensors")
    assert min(module["grade"](classifier, images, said, scenes).values()) >= 0.99
    wrong = module["grade"](classifier, images.roll(1, 0), said, scenes)
    assert wrong["both"] < 0.15 and wrong["place"] < 0.25 and wrong["size"] < 0.65
