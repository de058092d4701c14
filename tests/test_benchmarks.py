"""The benchmarks still import what they use, after every move and rename in the package."""

import ast
import importlib.util
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))
IN_OTHER_ENVIRONMENTS = {"profanity_check", "vllm"}  # make peers-env, make vllm-env


@pytest.fixture
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


@contextmanager
def skipped_without_its_environment():
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in IN_OTHER_ENVIRONMENTS:
            raise
        pytest.skip(f"needs {error.name}, which has an environment of its own")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_imports(script, benchmarks_on_the_path):
    name = f"benchmark_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with skipped_without_its_environment():
            spec.loader.exec_module(module)
    finally:
        del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_names_imported_inside_functions_exist(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentguard"):
            with skipped_without_its_environment():
                home = import_module(node.module)
                for alias in node.names:
                    if not hasattr(home, alias.name):
                        import_module(f"{node.module}.{alias.name}")
