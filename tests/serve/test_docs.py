"""The pages of the service are true: commands run, metrics and options exist."""

import re
import shutil
import subprocess

import pytest
import typer
from typer.testing import CliRunner

from latentguard.cli.serve.command import serve
from serve.running import SOURCE, flagged, get, passed, post, running

HOW_TO = SOURCE.parent / "docs" / "how-to"
TEXT = "".join((HOW_TO / name).read_text("utf-8") for name in ("serving.md", "operate.md"))
ADDRESS = "http://127.0.0.1:8400"


def blocks(language, word):
    """The blocks of code in a language that hold a word."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return [block for block in found if word in block]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("command", blocks("bash", "curl"))
def test_each_curl_is_answered(service, command):
    command = command.replace(ADDRESS, service)
    told = subprocess.run(
        ["bash", "-ec", command], capture_output=True, text=True, timeout=60, check=True
    )
    assert any(word in told.stdout for word in ("ready", '"flagged":', "data: [DONE]"))
    assert '"error"' not in told.stdout


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_client_in_python_is_answered(service, capsys):
    pytest.importorskip("openai")
    (block,) = blocks("python", "from openai")
    exec(block.replace(ADDRESS, service), {})
    assert capsys.readouterr().out.strip() in ("True", "False")


def test_the_metrics_that_they_name_exist():
    with running() as url:
        post(f"{url}/v1/moderations", json={"input": [passed(), flagged()]})
        page = get(f"{url}/metrics").text
    served = set(re.findall(r"^# TYPE (latentguard_\w+)", page, re.MULTILINE))
    named = set(re.findall(r"`(latentguard_\w+)", TEXT))
    assert "latentguard_verdicts_total" in named
    assert named - served == set()


def test_the_options_that_it_names_exist():
    app = typer.Typer()
    app.command()(serve)
    told = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    commands = re.findall(r"latentguard serve [^\n]*", TEXT)
    named = {option for line in commands for option in re.findall(r"--[a-z-]+", line)}
    assert {"--audit", "--reference"} <= named
    assert {option for option in named if option not in told} == set()
