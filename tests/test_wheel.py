"""A wheel, installed outside the repository in its own environment, does everything that the README promises."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEN_LINES = """
import torch, dit_rewrite
from dit_rewrite.demo.shapes.calls import build
model, calls = build(6)
model = dit_rewrite.compile(model, "taylorseer:interval=3,order=1,warmup=1", backend="aot_eager")
with torch.no_grad(), model.trajectory(num_steps=6):
    for call in calls:
        model(**call)
print(model.explain())
assert model.stats().reused > 0
assert "site-packages" in dit_rewrite.__file__, dit_rewrite.__file__
"""


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment `env` in which the wheel is installed; torch and the like come from this
    environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run("git", "clone", "-q", ROOT, source, folder=folder)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist", source, folder=folder)
    venv.create(folder / "env", with_pip=False)
    (wheel,) = (folder / "dist").glob("*.whl")
    run(*pip, "--python", folder / "env/bin/python", "install", "-q", "--no-deps", wheel, folder=folder)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    paths = {sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))}
    (packages / "others.pth").write_text("\n".join(sorted(paths)) + "\n")
    return folder


@pytest.mark.slow
def test_ten_lines(installed: Path) -> None:
    assert "taylorseer" in run(installed / "env/bin/python", "-c", TEN_LINES, folder=installed).lower()


@pytest.mark.slow
def test_commands(installed: Path) -> None:
    """`verify` proves the bundled denoiser, and `demo` samples with it."""
    command = installed / "env/bin/dit-rewrite"
    assert run(command, "verify", "--steps", "4", folder=installed).startswith("ok: reuse 0 exact")
    flags = ("--images", "2", "--steps", "6", "--intervals", "2", "--rounds", "1", "--backend", "aot_eager")
    run(command, "demo", "--out", "pictures", *flags, folder=installed)
    assert (installed / "pictures/results.json").is_file() and (installed / "pictures/images.png").is_file()
