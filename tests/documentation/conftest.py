"""The site, built once."""

import shutil
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package docpages lies beside src


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The built site, made from a copy of the tree; one for all processes of the test run."""
    pytest.importorskip("zensical")
    base = tmp_path_factory.getbasetemp()
    copy = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{copy}.lock"):
        if not (copy / "is_built").exists():
            build_site(copy)
            (copy / "is_built").touch()
    return copy / "site"


def build_site(copy):
    """Build the site from a copy of the tree, so that the tree stays as it is."""
    from docpages.build import build

    for name in ("docs", "docpages", "src"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "zensical.toml", copy)
    assert build(copy) == 0
