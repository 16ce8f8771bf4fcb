"""DQAR's fidelity benchmark: its metrics, its claims, its file, and two rows of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from benchmarks.dqar_fidelity import run as dqar_fidelity  # noqa: E402
from benchmarks.dqar_fidelity.claims import beyond_noise, judge, nearest  # noqa: E402
from benchmarks.dqar_fidelity.rows import STEPS, Recipe, Result, fewer, recipes  # noqa: E402
from benchmarks.record import Claim  # noqa: E402
from benchmarks.timing import Spread  # noqa: E402
from dit_rewrite.policy.serialise import from_json  # noqa: E402
from dit_rewrite.proof.image_metrics import frechet_distance, ssim  # noqa: E402


def test_frechet_distance_by_hand():
    a = torch.tensor([[-1.0], [1.0]])  # mean 0, unbiased variance 2
    b = torch.tensor([[1.0], [5.0]])  # mean 3, unbiased variance 8
    assert frechet_distance(a, b) == pytest.approx(9 + 2 + 8 - 2 * math.sqrt(2 * 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_two_features_that_vary_apart():
    a = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, -3.0]])  # covariance diag(2/3, 6)
    expected = 2 / 3 + 6 + 4 * (2 / 3 + 6) - 2 * (2 * 2 / 3 + 2 * 6)  # of the same, twice as wide
    assert frechet_distance(a, 2 * a) == pytest.approx(expected)


def test_frechet_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 5

        def forward(self, images):
            return images

    a, b = torch.randn(40, 5).double(), 2 * torch.randn(60, 5).double() + 1
    metric = FrechetInceptionDistance(feature=Identity())
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)


def test_ssim_of_constant_images_by_hand():
    """Without variance only the luminance term is left: (2 x y + c1) / (x^2 + y^2 + c1), c1 = (0.01 * 2)^2."""
    x, y, c1 = 0.5, 0.25, 0.02**2
    images, reference = torch.full((2, 3, 16, 16), x), torch.full((2, 3, 16, 16), y)
    assert ssim(images, reference) == pytest.approx((2 * x * y + c1) / (x * x + y * y + c1), rel=1e-6)
    noise = torch.randn(2, 3, 16, 16)
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(0.5 + 0.1 * noise, 0.5 - 0.1 * noise) < 0  # as bright, with the opposite structure


def test_every_row_has_a_name_of_its_own_and_a_policy_that_is_read_back():
    rows = recipes(20)
    assert len({recipe.name for recipe in rows}) == len(rows)
    assert [r.settings["steps"] for r in rows if r.family == STEPS] == [19, 17, 14, 10, 7, 5]
    for recipe in rows:
        policy = recipe.policy()
        assert policy is None or from_json(recipe.key()["policy"]) == policy


def row(
    name: str, *, errors=(0.1, 0.1), family="DQAR", time=0.9, reuse=0.2, store=None, kv=False, **settings
) -> Result:
    if family == "DQAR":
        plain = {"warmup": 0.2, "layer_fraction": 1.0, "snr_threshold": None, "order": "linear"}
        settings = plain | {"entropy_threshold": None} | settings
    spread = Spread(time, time, time, 1)
    key = {"name": name, "family": family, "settings": settings, "store": store, "kv": kv}
    mean = sum(errors) / len(errors)
    return Result(key, 20, spread, spread, reuse, mean, list(errors), 1.0, 1.0, 1.0, 0.0)


def claim_of(rows: list[Result], start: str) -> Claim:
    (claim,) = (claim for claim in judge(rows) if claim.claim.startswith(start))
    return claim


def test_standard_errors_by_hand():
    """Differences 1, 2 and 3: mean 2, standard deviation 1."""
    a, b = row("a", errors=(2.0, 4.0, 6.0)), row("b", errors=(1.0, 2.0, 3.0))
    assert beyond_noise(a, b) == pytest.approx(2 * math.sqrt(3))
    assert beyond_noise(b, a) == pytest.approx(-2 * math.sqrt(3))
    assert beyond_noise(a, a) == 0


def test_the_pair_is_the_nearest_in_reuse_if_it_is_near():
    gated, far, near = row("gated", reuse=0.2), row("far", reuse=0.23), row("near", reuse=0.21)
    assert nearest(gated, [far, near]) is near
    assert nearest(gated, [far]) is None


@pytest.mark.parametrize(("errors", "held"), [((0.05, 0.06), True), ((0.2, 0.21), False), ((0.05, 0.16), False)])
def test_a_gate_is_judged_beside_the_schedule_of_its_reuse(errors, held):
    rows = [
        row("gated", errors=errors, snr_threshold=0.5),
        row("static", errors=(0.1, 0.11), warmup=0.4, reuse=0.21),
        row("other", errors=(9.0, 9.0), warmup=0.1, reuse=0.4),
    ]
    claim = claim_of(rows, "An SNR gate beats")
    assert claim.held is held
    assert [(e["row"], e["against"]) for e in claim.evidence] == [("gated", "static")]
    assert claim_of(rows[:1], "An SNR gate beats").held is None


@pytest.mark.parametrize(("reverse", "held"), [(0.105, True), (0.12, False), (0.085, False)])
def test_order_is_judged_in_both_directions(reverse, held):
    rows = [row("linear"), row("reverse", errors=(reverse, reverse), order="linear_reverse")]
    assert claim_of(rows, "The order").held is held


def test_warm_up_is_judged_by_the_slope_along_each_axis():
    """Half the reuse for a quarter of the error along warm-up: slope 2; for half of it along the fraction: slope 1."""
    rows = [
        row("both", errors=(0.8, 0.8), reuse=0.4),
        row("later", errors=(0.2, 0.2), reuse=0.2, warmup=0.6),
        row("fewer", errors=(0.4, 0.4), reuse=0.2, layer_fraction=0.5),
    ]
    claim = claim_of(rows, "Warm-up")
    assert claim.held is True
    assert claim.evidence[0]["slopes"] == pytest.approx({"warmup": 2.0, "layer_fraction": 1.0})


@pytest.mark.parametrize(("errors", "held"), [((0.2, 0.21), True), ((0.1, 0.1), False), ((0.05, 0.06), False)])
def test_keys_and_values_are_judged_at_the_same_schedule(errors, held):
    rows = [row("output"), row("kv", errors=errors, kv=True), row("other kv", errors=(9, 9), kv=True, warmup=0.3)]
    claim = claim_of(rows, "K/V")
    assert (claim.held, len(claim.evidence)) == (held, 1)


def test_a_record_is_resumed_under_the_same_parameters_only(tmp_path):
    path, header = tmp_path / "dqar_fidelity.json", {"settings": {"steps": 20, "shape": (1, 2)}}
    record = dqar_fidelity.Record.open(path, header)
    wanted = [fewer(10), fewer(5)]
    assert record.missing(wanted) == wanted
    record.rows["10 steps"] = Result.from_json(json.loads(json.dumps(row_of(fewer(10)))))
    record.write()
    again = dqar_fidelity.Record.open(path, header)
    assert again.rows == record.rows
    assert again.missing(wanted) == [fewer(5)]
    assert again.missing([Recipe("10 steps", STEPS, {"steps": 11})])  # the same name means other settings now
    assert dqar_fidelity.Record.open(path, {"settings": {"steps": 50, "shape": (1, 2)}}).rows == {}


def row_of(recipe: Recipe) -> dict[str, object]:
    """The stored entries of a row."""
    return asdict(row(recipe.name)) | {"key": recipe.key()}


def test_two_rows_run_and_a_second_run_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dqar_fidelity, "REAL_IMAGES", 200)
    out, plot = tmp_path / "out.json", tmp_path / "plot.png"
    arguments = ["--samples", "2", "--steps", "4", "--batch", "1", "--threads", "1", "--backend", "aot_eager"]
    arguments += ["--rows", "FORA 2", "2 steps", "--out", str(out), "--plot", str(plot)]
    dqar_fidelity.main(arguments)
    content = json.loads(out.read_text())
    rows = {r["key"]["name"]: r for r in content["rows"]}
    assert list(rows) == ["uncached", "2 steps", "FORA 2"]
    assert rows["uncached"]["relative_l2"] == 0 and rows["uncached"]["ssim"] == pytest.approx(1)
    assert rows["FORA 2"]["reuse"] == 0.5  # steps 1 and 3 of 0 to 3
    assert rows["FORA 2"]["relative_l2"] > 0 and len(rows["FORA 2"]["relative_l2_by_batch"]) == 2
    assert rows["FORA 2"]["late_variants"] == 0
    assert content["settings"]["samples"] == 2 and content["versions"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(dqar_fidelity, "Bench", None)  # measuring would need it
    before = out.read_text()
    dqar_fidelity.main(arguments)
    assert out.read_text() == before


def test_real_images_have_a_small_distance_to_real_images(monkeypatch):
    monkeypatch.setattr(dqar_fidelity, "REAL_IMAGES", 2000)
    images, _ = dqar_fidelity.sample(400, torch.Generator().manual_seed(7))
    found = dqar_fidelity.features(dqar_fidelity.load_classifier(), images)
    noise = dqar_fidelity.features(dqar_fidelity.load_classifier(), torch.randn(400, 3, 16, 16))
    real = dqar_fidelity.real_features(2000)
    assert dqar_fidelity.frechet_floor(400) < frechet_distance(noise, real) / 5
    assert frechet_distance(found, real) < frechet_distance(noise, real) / 5


def test_batches_of_different_shapes_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        dqar_fidelity.main(["--samples", "10", "--batch", "4", "--out", str(tmp_path / "out.json")])
