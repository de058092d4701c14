"""The wheel holds the package with its data, and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def wheel_names(wheel):
    return set(wheel.namelist())


def test_every_file_of_the_package_is_in_the_wheel(wheel_names):
    source = ROOT / "src"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    kept = {str(path) for path in files if "__pycache__" not in path.parts}
    shipped = {name for name in wheel_names if ".dist-info/" not in name}
    assert {name for name in kept if ".egg-info" not in name} == shipped


def test_types_data_and_licence_are_in_the_wheel(wheel_names):
    assert {"latentguard/py.typed", "latentguard/data/guard_prompts.jsonl"} <= wheel_names
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_names)


def test_the_wheel_holds_nothing_else(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"latentguard"}


def test_the_program_runs_from_the_wheel_alone(wheel, tmp_path):
    """Unpacked, with nothing of the checkout on the path."""
    wheel.extractall(tmp_path / "site")
    program = "import sys, latentguard.cli as cli; print(cli.__file__); sys.exit(cli.main())"
    ended = subprocess.run(
        [sys.executable, "-c", program, "show", "default"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    place, card = ended.stdout.split("\n", 1)
    assert Path(place).is_relative_to(tmp_path / "site")
    assert "Latent guard for default" in card


def test_the_description_on_the_index_is_the_readme(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(metadata).decode()
    assert "Description-Content-Type: text/markdown" in text
    assert "# latentguard" in text
