"""Promises about the package as a whole: what it loads, names, imports; how long modules are."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import latentguard

SOURCE = Path(latentguard.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "transformers", "sklearn", "datasets", "plotly", "scipy", "numpy")
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
READS_PICKLES = SOURCE / "data" / "released.py"
"""Reads the files of the paper's authors, with every name but those of arrays refused."""


def loaded_by(code):
    """Which of the heavy packages a fresh interpreter has loaded after ``code``."""
    ask = f"import sys; {code}; print(*[m for m in {HEAVY} if m in sys.modules])"
    path = os.pathsep.join([str(SOURCE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = [sys.executable, "-c", ask]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout.split()


class TestImports:
    @pytest.mark.parametrize(
        "code",
        [
            "import latentguard",
            "import latentguard; latentguard.__all__; dir(latentguard)",
            "import latentguard; latentguard.Prompt; latentguard.read_prompts",
            "import latentguard; latentguard.LatentGuardError; latentguard.load_contrast",
            "import latentguard.cli",
        ],
    )
    def test_nothing_heavy_is_loaded(self, code):
        assert loaded_by(code) == []

    def test_help_loads_nothing_heavy(self):
        code = (
            "from latentguard.cli import app\n"
            "for verb in ([], ['fit'], ['score'], ['demo']):\n"
            "    try: app([*verb, '--help'])\n"
            "    except SystemExit as stop: assert not stop.code\n"
            "import os; sys.stdout.write('loaded:')"
        )
        assert loaded_by(f"exec({code!r})")[-1] == "loaded:"


class TestNames:
    @pytest.mark.parametrize("name", latentguard.__all__)
    def test_a_public_name_resolves(self, name):
        """At the first use and at the next, whatever modules were loaded before."""
        home = importlib.import_module(latentguard._MODULES[name])
        for _ in range(2):
            found = getattr(latentguard, name)
            assert found is getattr(home, name)
            assert (found.__doc__ or "").strip()

    def test_names_are_sorted(self):
        assert latentguard.__all__ == sorted(set(latentguard.__all__))
        assert dir(latentguard) == latentguard.__all__

    def test_the_nouns_of_the_readme_are_there(self):
        named = {"Axis", "ChatModel", "LatentGuard", "Prompt", "States", "Verdict"}
        assert named | {"read_prompts", "load_contrast"} <= set(latentguard.__all__)

    def test_another_name(self):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            latentguard.nothing  # noqa: B018


class TestSource:
    @pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
    def test_a_module_is_short_and_says_what_it_is(self, path):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 500
        assert ast.get_docstring(ast.parse(text))

    @pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
    def test_nothing_is_unpickled(self, path):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                allowed = {"pickle"} if path == READS_PICKLES else set()
                imported = {alias.name.split(".")[0] for alias in node.names}
                assert not (imported & UNSAFE) - allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNSAFE
                assert (node.module, "load") not in {("torch", a.name) for a in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}

    def test_the_reader_of_pickles_refuses_what_it_does_not_know(self):
        """It calls no function of pickle but its own subclass of the unpickler."""
        text = READS_PICKLES.read_text("utf-8")
        used = set(re.findall(r"pickle\.(\w+)", text)) - {"pkl"}
        assert used <= {"Unpickler", "UnpicklingError"}

    def test_nothing_of_this_is_missed(self):
        """The check above looks at every module there is."""
        assert {p.stem for p in MODULES} >= {
            "latent_guard",
            "artifact",
            "states",
            "hooks",
            "console",
        }

    def test_no_path_of_a_machine_is_named(self):
        for path in SOURCE.rglob("*"):
            if path.suffix in (".py", ".html", ".jsonl"):
                text = path.read_text("utf-8")
                made_up = text.replace("/home/ines/photos", "")  # a prompt of the traffic
                assert not any(word in made_up for word in ("/root/", "/home/", "/tmp/"))


def test_no_verb_computes_with_tensors_itself():
    """Computation belongs to the layers below, which the command line calls."""
    for path in (SOURCE / "cli").rglob("*.py"):
        names = re.findall(r"^\s*(?:import|from) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert "torch" not in names, path


def test_the_modules_whose_shapes_are_checked_exist():
    """A module that has moved would go unchecked without a word."""
    from conftest import SHAPED

    assert [name for name in SHAPED if importlib.util.find_spec(name) is None] == []


def test_every_test_folder_is_a_package():
    """Otherwise two test files of one name in two folders cannot be collected together."""
    folders = {path.parent for path in Path(__file__).parent.rglob("test_*.py")}
    folders.remove(Path(__file__).parent)
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []
