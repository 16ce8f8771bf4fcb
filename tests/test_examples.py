"""Every example runs: the bring-your-own model, and a few steps of the scripts that trained the bundled weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

import dit_rewrite
from dit_rewrite.demo import shapes
from examples.stdit import STDiT, STDiTConfig
from tests.helpers.models import MODELS

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_a_model_of_ones_own_is_rewritten_and_explained() -> None:
    """A plain module that is not registered: its branches are found, and the report lists the strategies."""
    model = dit_rewrite.compile(MODELS["stdit"].build(), dit_rewrite.policies.FORA(2), backend="aot_eager")
    with torch.no_grad():
        for kwargs in MODELS["stdit"].inputs(2):
            model(**kwargs)
    text = str(model.explain())
    assert all(f"blocks.{i}." in text for i in range(2))
    assert model.stats().reused == sum(MODELS["stdit"].sites.values())


def test_realistic_geometry_can_be_built() -> None:
    """The example also builds at a real size: STDiT-XL/2's shape has some 720 million parameters."""
    with torch.device("meta"):
        model = STDiT(STDiTConfig())
    assert 6e8 < sum(p.numel() for p in model.parameters()) < 9e8


def test_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted and run again, training ends in the same state, and leaves usable weights."""
    small = ("--batch", "2", "--threads", "1", "--save-every", "1", "--eager")
    run("shapes/train.py", monkeypatch, "--out", str(tmp_path / "whole"), "--steps", "4", *small)
    run("shapes/train.py", monkeypatch, "--out", str(tmp_path / "parts"), "--steps", "4", "--stop", "2", *small)
    run("shapes/train.py", monkeypatch, "--out", str(tmp_path / "parts"), "--steps", "4", *small)
    whole, parts = (shapes.load_denoiser(tmp_path / name / "denoiser.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_the_bundled_classifier_reads_real_images() -> None:
    """At least 99 % of images outside the training set."""
    images, labels = shapes.sample(2000, torch.Generator().manual_seed(987654))
    assert shapes.accuracy(shapes.load_classifier(), images, labels) >= 0.99
