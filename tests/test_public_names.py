"""The public names: few, documented with an example that runs, and seen by mypy and completion."""

import doctest
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import latentguard as lg
from latentguard.data.builtin import load_contrast
from latentguard.errors import MissingExtra

SOURCE = Path(lg.__file__).parents[1]
ROOT = SOURCE.parent
NEEDS_EXTRA = {"score_corpus"}


def public_objects():
    """Each public object, its methods, and the name that each is tested under."""
    for name in lg.__all__:
        if name in NEEDS_EXTRA:
            pytest.importorskip("ray", reason="score_corpus needs the extra 'ray'")
        yield name, getattr(lg, name)


@pytest.fixture(scope="module")
def objects(model, tmp_path_factory):
    """What the examples may use: a model, a guard of it, and a folder."""
    folder = tmp_path_factory.mktemp("guard")
    rows = [p for p in load_contrast("train") if p.pair][:60]
    guard = lg.LatentGuard.fit(model, rows)
    guard.save(folder)
    (folder / "prompts.jsonl").write_text('{"text": "Hello."}\n{"text": "How are you?"}\n')
    return {"lg": lg, "model": model, "guard": guard, "folder": folder}


def test_there_are_at_most_twenty():
    assert len(lg.__all__) <= 20
    assert dir(lg) == lg.__all__ == sorted(lg.__all__)


def test_each_has_an_example():
    missing = [name for name, one in public_objects() if ">>>" not in (one.__doc__ or "")]
    assert missing == []


def test_the_examples_run_as_they_are_written(objects):
    finder = doctest.DocTestFinder()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    report = []
    tests = [t for name, one in public_objects() for t in finder.find(one, name, globs={})]
    examples = [test for test in tests if test.examples]
    for test in examples:
        test.globs = dict(objects)
        runner.run(test, out=report.append)
    assert "".join(report) == ""
    assert runner.tries > 25


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LatentGaurd'"):
        lg.LatentGaurd  # noqa: B018 (the attribute is what is tested)


def test_a_missing_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "ray" or ".ray" in n]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"score_corpus needs the extra 'ray'"):
        lg.score_corpus  # noqa: B018


def test_a_split_that_does_not_exist_is_an_error():
    for load in (lg.load_contrast, lg.load_guard_prompts):
        with pytest.raises(lg.LatentGuardError, match="no split 'trian'"):
            load("trian")


USER_FILE = """
import latentguard as lg

guard = lg.load_guard("guards/qwen")
verdict: lg.Verdict = guard("Hello.")
verdicts: list[lg.Verdict] = guard(["Hello.", "Good morning."])
chat: lg.Verdict = guard([{"role": "user", "content": "Hello."}])
reveal_type(verdict.probability)
reveal_type(lg.read_prompts("prompts.jsonl"))
"""


def test_mypy_knows_the_types_of_a_users_file(tmp_path):
    file = tmp_path / "user.py"
    file.write_text(textwrap.dedent(USER_FILE))
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]  # that of the check before the tests
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *cache, str(file)],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(SOURCE), "MYPY_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.split(": ", 1)[1] for line in found.stdout.splitlines() if file.name in line]
    assert [line for line in lines if line.startswith("error")] == []
    assert 'Revealed type is "float"' in lines[0].replace("builtins.", "")
    assert "Prompt" in lines[1]


def test_the_static_exports_are_the_dynamic_ones():
    text = inspect.getsource(lg)
    head = text[text.index("if TYPE_CHECKING") : text.index("__version__")]
    for name in lg.__all__:
        assert f"{name}" in head
    assert (SOURCE / "latentguard" / "py.typed").exists()
