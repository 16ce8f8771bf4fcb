"""`python -m dit_rewrite generate` on toy pipelines that are saved and loaded without a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers")

from dit_rewrite.cli.generate import (  # noqa: E402
    call_arguments,
    causes,
    check_format,
    is_unreachable,
    save_pictures,
    told,
)
from dit_rewrite.cli.main import FAILED, build_parser, main  # noqa: E402
from dit_rewrite.errors import BadOption, WrongInput  # noqa: E402
from tests.helpers import tiny  # noqa: E402

STEPS = 6
LABELS = ["3", "7"]


def build_dit_pipeline() -> diffusers.DiTPipeline:
    """Random weights; the head and the zero-initialised gates get values too, or every policy would look the same."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "norm1" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "dit"
    build_dit_pipeline().save_pretrained(folder)
    return folder


def generate(folder: object, out: Path, *more: str) -> int:
    return main(
        ["generate", "--model", str(folder), "--backend", "aot_eager", "--device", "cpu", "--steps", str(STEPS)]
        + ["--out", str(out), *more]
    )


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_writes_an_image_for_each_label_and_says_what_was_reused(dit_folder, tmp_path, capsys):
    assert generate(dit_folder, tmp_path / "a.png", "--label", *LABELS, "--policy", "fora:interval=3") == 0
    said = capsys.readouterr().out
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "a-1.png").size == (16, 16)
    assert f"{STEPS} calls" in said
    assert "Recomp 33.3%" in said


def test_never_draws_what_the_plain_pipeline_draws_and_fora_something_close(dit_folder, tmp_path):
    pipeline = diffusers.DiTPipeline.from_pretrained(dit_folder)
    plain = pipeline([3, 7], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)).images[0]
    assert generate(dit_folder, tmp_path / "never.png", "--label", *LABELS, "--policy", "never") == 0
    assert generate(dit_folder, tmp_path / "fora.png", "--label", *LABELS, "--policy", "fora:interval=2") == 0
    assert np.array_equal(pixels(tmp_path / "never.png"), np.asarray(plain))
    change = np.abs(pixels(tmp_path / "fora.png") - np.asarray(plain)).mean()
    assert 0 < change < 64


def test_a_prompt_for_a_class_conditional_pipeline_is_refused(dit_folder, tmp_path, capsys):
    assert generate(dit_folder, tmp_path / "a.png", "--prompt", "a cat") == FAILED
    assert "DiTPipeline takes no --prompt. Give --label instead." in capsys.readouterr().err


def test_an_unreachable_hub_is_said_plainly(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert generate("nobody/no-such-pipeline", tmp_path / "a.png", "--label", "1") == FAILED
    said = capsys.readouterr().err
    assert "the hub could not be reached" in said
    assert "Give --model the path of a folder" in said
    assert "Traceback" not in said


def test_a_folder_without_a_pipeline_is_named(tmp_path, capsys):
    assert generate(tmp_path, tmp_path / "a.png", "--label", "1") == FAILED
    said = capsys.readouterr().err
    assert str(tmp_path) in said and "save_pretrained" in said


def test_a_pipeline_without_a_transformer_is_refused(tmp_path, capsys):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "unet")
    assert generate(tmp_path / "unet", tmp_path / "a.png", "--label", "1") == FAILED
    assert "no component called transformer" in capsys.readouterr().err


def test_an_unknown_policy_is_refused(dit_folder, tmp_path, capsys):
    assert generate(dit_folder, tmp_path / "a.png", "--label", "1", "--policy", "nonsense") == FAILED
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["100000", "1000", "-1"])
def test_a_class_that_the_model_does_not_have_is_named(dit_folder, tmp_path, capsys, label):
    """The error comes before sampling starts; 1000 is the class without a condition."""
    assert generate(dit_folder, tmp_path / "a.png", "--label", "3", label) == FAILED
    assert f"label={label} is out of range. Give label as class numbers from 0 to 999." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--policy", "dqar:snr_threshold=abc"], "error: DQAR: snr_threshold='abc' is out of range"),
        (["--policy", "fora:interval=True"], "error: FORA: interval=True is out of range. Give interval as a whole"),
        (["--policy", "ditfastattn:plan=none.json"], "error: none.json cannot be used as a plan: it cannot be read"),
        (["--policy", "none.json"], "none.json cannot be used as a policy (No such file"),
        (["--device", "cuda"], "device='cuda' is out of range"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_line(dit_folder, tmp_path, capsys, monkeypatch, line, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert generate(dit_folder, tmp_path / "a.png", "--label", "1", *line) == FAILED
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("error: ")


@pytest.mark.parametrize("seed", [str(2**64), str(-(2**63) - 1), "one"])
def test_a_seed_that_torch_does_not_take(dit_folder, tmp_path, capsys, seed):
    with pytest.raises(SystemExit):
        generate(dit_folder, tmp_path / "a.png", "--label", "1", "--seed", seed)
    assert "argument --seed" in capsys.readouterr().err
    assert build_parser().parse_args(["generate", "--model", "m", "--label", "1", "--seed", "-1"]).seed == -1


class TextPipeline:
    def __call__(self, prompt, num_inference_steps, guidance_scale=4.0, generator=None):
        """The arguments of a text-to-image pipeline."""


def test_a_text_pipeline_is_asked_in_its_own_words():
    line = ["generate", "--model", "x", "--prompt", "a red circle", "--steps", "7", "--guidance", "2.5"]
    asked = call_arguments(TextPipeline(), build_parser().parse_args(line))
    assert asked.pop("generator").initial_seed() == 0
    assert asked == {"prompt": "a red circle", "num_inference_steps": 7, "guidance_scale": 2.5}
    with pytest.raises(WrongInput, match="takes no --label. Give --prompt instead"):
        call_arguments(TextPipeline(), build_parser().parse_args(["generate", "--model", "x", "--label", "1"]))


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class ArrayPipeline:
    def __call__(self, prompt, output_type="np", num_inference_steps=1, generator=None):
        """The arguments of a pipeline that returns arrays, as Wan's does, unless it is asked for pictures."""


def test_pictures_are_asked_for():
    line = build_parser().parse_args(["generate", "--model", "x", "--prompt", "a"])
    assert call_arguments(ArrayPipeline(), line)["output_type"] == "pil"


def test_the_statistics_are_those_of_all_denoisers():
    models = {name: tiny.rewritten(tiny.build()) for name in ("transformer", "transformer_2")}
    tiny.outputs(models["transformer"], tiny.calls(2))
    pipeline = SimpleNamespace(components=models, **models)
    assert {name: stats.calls for name, stats in told(pipeline).items()} == {"transformer": 2, "transformer_2": 0}


def test_what_counts_as_unreachable():
    assert is_unreachable(raised_from(OSError("cannot load"), ConnectionRefusedError(111, "refused")))
    assert is_unreachable(raised_from(OSError("cannot load"), TimeoutError("timed out")))
    assert not is_unreachable(OSError("no model_index.json"))
    assert not is_unreachable(raised_from(ValueError("bad"), FileNotFoundError("missing")))
    assert [str(c) for c in causes(raised_from(OSError("a"), OSError("b")))] == ["a", "b"]


class VideoPipeline:
    def __call__(self, prompt, frames=81):
        """The arguments of a text-to-video pipeline."""


def test_a_file_that_cannot_be_written_is_refused_before_sampling(dit_folder, tmp_path, capsys):
    for name in ("image.mp4", "image"):
        assert generate(dit_folder, tmp_path / name, "--label", "1") == FAILED
        said = capsys.readouterr().err
        assert "is out of range. Give out as a file such as image.png" in said and name in said and "reused" not in said
    (tmp_path / "file").write_text("no folder")
    assert generate(dit_folder, tmp_path / "file" / "image.png", "--label", "1") == FAILED
    said = capsys.readouterr().err
    assert "cannot be used (not a directory)" in said and "reused" not in said


def test_a_file_for_frames_can_be_animated():
    for name in ("video.gif", "video.png", "video.WEBP"):
        check_format(VideoPipeline(), Path(name))
    for name in ("video.jpg", "video.mp4"):
        with pytest.raises(BadOption, match="a file such as video.gif"):
            check_format(VideoPipeline(), Path(name))
    check_format(TextPipeline(), Path("image.jpg"))


def test_frames_become_one_animated_file(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    (path,) = save_pictures([frames], tmp_path / "video.gif")
    assert Image.open(path).n_frames == 3
