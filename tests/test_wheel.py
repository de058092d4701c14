"""The wheel holds the package with its data, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def test_every_file_of_the_package_is_in_the_wheel(wheel_names):
    source = ROOT / "src"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    kept = {str(path) for path in files if "__pycache__" not in path.parts}
    shipped = {name for name in wheel_names if ".dist-info/" not in name}
    assert {name for name in kept if ".egg-info" not in name} == shipped


def test_types_data_and_licence_are_in_the_wheel(wheel_names):
    assert {"latentguard/py.typed", "latentguard/data/traffic.jsonl"} <= wheel_names
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_names)
