"""The site, built once."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package docpages lies beside src


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site, made from a copy of the tree so that test processes do not meet in it."""
    pytest.importorskip("zensical")
    from docpages.build import build

    copy = tmp_path_factory.mktemp("site")
    for name in ("docs", "docpages", "src"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "zensical.toml", copy)
    assert build(copy) == 0
    return copy / "site"
