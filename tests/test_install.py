"""The package as users install it: built, installed outside the clone, and run from there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image


def run(*line: object, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, line)), cwd=cwd, capture_output=True, text=True, env={**kept, **environment}, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    tracked = (
        run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split("\n") if (ROOT / ".git").exists() else []
    )
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    if not tracked:
        pytest.skip("a clone is needed to know which files belong to the package")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    return folder / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"taps"}
    for name in ("taps/py.typed", "taps/settings/published/demo.yaml", "taps/cli/main.py"):
        assert name in names
    with tarfile.open(next(built.glob("*.tar.gz"))) as sources:
        assert any(name.endswith("/taps/settings/published/demo.yaml") for name in sources.getnames())


def test_an_installed_package_trains_and_predicts_outside_the_clone(built, tmp_path):
    """The new environment sees the dependencies of this one, but not this one's editable install."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False)
    own = Path(
        run(place / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (own / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # a plain path: its .pth files are not read
    pip = (sys.executable, "-m", "pip", "--python", place / "bin/python")
    run(*pip, "install", "-q", "--no-deps", next(built.glob("*.whl")), cwd=tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    where = run(place / "bin/python", "-c", "import taps; print(taps.__file__)", cwd=work).strip()
    assert where.startswith(str(own))
    taps = place / "bin/taps"
    run(
        taps, "train", "--epochs", 1, "--limit_batches", 1, "--workers", 0, cwd=work
    )  # the demo, from the installed files
    Image.new("RGB", (40, 36), (200, 60, 60)).save(work / "photo.png")
    assert "digits_rotated" in run(taps, "predict", "results/demo", "photo.png", cwd=work)
    assert "usage: taps" in run(place / "bin/python", "-m", "taps", "--help", cwd=work)
