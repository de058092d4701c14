"""A package of an extra that is not installed is one sentence that names the extra."""

import json
import sys

import pytest

from latentguard.errors import LatentGuardError, MissingExtra, require_extra


def test_it_returns_the_module():
    assert require_extra("json", "report", "A report") is json


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.graph_objects", raising=False)
    with pytest.raises(MissingExtra) as error:
        require_extra("plotly.graph_objects", "report", "A report")
    assert str(error.value) == (
        "A report needs the extra 'report' (plotly is not installed): "
        "pip install 'latentguard[report]'"
    )
    assert isinstance(error.value, LatentGuardError)


def test_a_package_that_fails_otherwise_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise ValueError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="broken"):
        require_extra("broken_package", "report", "A report")
