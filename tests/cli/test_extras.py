"""Optional extras: the verbs of a guard need none, and the others name theirs in one sentence."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import latentguard
from cli.tiny_files import record, rows, written
from latentguard.models.chat_model import ChatModel

OPTIONAL = (
    *("plotly", "kaleido", "choreographer", "datasets", "pyarrow", "fastapi", "uvicorn"),
    *("prometheus_client", "ray", "peft", "nanogcg", "bitsandbytes", "torchao", "vllm"),
    *("pydantic_settings", "opentelemetry", "redis", "cryptography"),
    *("any_guardrail", "langchain", "llama_index", "llama_index_core"),
)
"""What belongs to an extra: not there in a plain installation."""

PLAIN = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {optional} else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from latentguard.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["latentguard", *line.split()]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{{line}}: exit code {{stop.code}}")
"""


def test_fit_calibrate_score_and_show_need_no_extra(model, files, tmp_path):
    harmful = written(tmp_path / "more.jsonl", rows(40, "sly", start=900))
    words = [
        f"fit --model {model} --out {tmp_path}/g --harmful {files['mixed']} "
        f"--harmless {files['harmless']}",
        f"calibrate {tmp_path}/g --harmless {files['plain']} --harmful {harmful} --max-fpr 0.05",
        f"score {tmp_path}/g {files['asked']} --out {tmp_path}/v.jsonl",
        f"drift {tmp_path}/g {files['plain']}",
        f"show {tmp_path}/g",
        "--help",
    ]
    env = os.environ | {
        "PYTHONPATH": str(Path(latentguard.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PLAIN.format(optional=OPTIONAL)],
        input="\n".join(words),
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 18
    assert "Warning: " in done.stderr
    assert "pip install 'latentguard[report]'" in done.stderr


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""

    def hide(name):
        for module in [m for m in sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("study m --out {tmp}/r", "plotly", "report"),
        ("stress {guard} --out {tmp}/r", "plotly", "report"),
        ("demo --out {tmp}/r --guard {tmp}/g", "plotly", "report"),
        ("score {guard} org/name", "datasets", "hub-data"),
        ("score {guard} {tmp}/p.parquet", "pyarrow", "hub-data"),
    ],
)
def test_a_missing_extra_is_one_sentence(
    fails, without, guard, files, tmp_path, monkeypatch, command, package, extra
):
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    without(package)
    error = fails(*command.format(tmp=tmp_path, guard=guard, **files).split())
    assert f"needs the extra '{extra}' ({package} is not installed): " in error
    assert error.endswith(f"pip install 'latentguard[{extra}]'")


def test_a_study_without_its_extra_loads_no_model(fails, without, tmp_path, monkeypatch):
    monkeypatch.setattr(ChatModel, "load", None)
    without("plotly")
    assert "latentguard study needs the extra 'report'" in fails("study", "m", "--out", tmp_path)


def test_a_calibration_without_plotly_is_kept_and_its_old_report_goes(
    lg, without, guard, files, tmp_path
):
    harmful = written(tmp_path / "more.jsonl", rows(40, "sly", start=900))
    words = ["calibrate", guard, "--harmless", files["plain"], "--harmful", harmful, "--max-fpr"]
    assert lg(*words, "0.2")[0] == 0
    assert (guard / "calibration" / "report.html").exists()
    without("plotly")
    code, out, err = lg(*words, "0.05")
    assert (code, "at most 5.00%" in out) == (0, True)
    assert "Warning: " in err
    assert "pip install 'latentguard[report]'" in err
    assert record(guard)["bound"]["max_fpr"] == 0.05
    assert not (guard / "calibration" / "report.html").exists()


def test_every_package_of_an_extra_is_hidden_above():
    """A new extra is tested too."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {
        requirement.split(">")[0].split("[")[0].replace("-", "_")
        for extra, requirements in extras.items()
        if extra not in ("dev", "all", "docs")
        for requirement in requirements
    }
    names = {"opentelemetry" if "opentelemetry" in name else name for name in names}
    assert names <= set(OPTIONAL)
    base = {requirement.split(">")[0].replace("-", "_") for requirement in project["dependencies"]}
    assert not base & set(OPTIONAL)
