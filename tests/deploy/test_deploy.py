"""The files in ``deploy``: their options exist, their metrics are served, the linters are content.

Linters that are not installed are skipped: promtool (Debian's prometheus), systemd-analyze,
hadolint. Helm comes with ``make clients``. Nothing here builds an image or starts a cluster.
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from latentguard.cli.serve.options import ServeOptions

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "latentguard"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "systemd" / "latentguard.service").read_text()
DEPLOYMENT = (CHART / "templates" / "deployment.yaml").read_text()
TOOLS = os.pathsep.join([str(ROOT / ".venv-clients" / "bin"), os.environ.get("PATH", "")])
OPTIONS = {field.name for field in fields(ServeOptions)}
METRIC = re.compile(r"latentguard_\w+")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_yaml(path):
    return yaml.safe_load((DEPLOY / path).read_text())


def run(*command, cwd=DEPLOY):
    program = shutil.which(command[0], path=TOOLS)
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [program, *command[1:]], check=False, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def options_of(text):
    """Options of the command line in a text, as fields."""
    return {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)}


class TestOptions:
    """Whatever ``serve`` is started with, it knows."""

    def test_of_the_image(self):
        variables = re.findall(r"LATENTGUARD_SERVE_(\w+)=", DOCKERFILE)
        assert variables
        command = DOCKERFILE[DOCKERFILE.index("\nCMD") :]
        assert {name.lower() for name in variables} | options_of(command) <= OPTIONS

    def test_of_the_unit(self):
        start = next(line for line in UNIT.splitlines() if line.startswith("ExecStart="))
        assert options_of(start) <= OPTIONS
        toml = tomllib.loads((DEPLOY / "systemd" / "serve.toml").read_text())
        assert {name.replace("-", "_") for name in toml} <= OPTIONS

    def test_of_the_chart(self):
        values = read_yaml("helm/latentguard/values.yaml")
        assert {name.replace("-", "_") for name in values["options"]} <= OPTIONS
        arguments = DEPLOYMENT[DEPLOYMENT.index("args:") : DEPLOYMENT.index("env:")]
        assert options_of(arguments) <= OPTIONS

    def test_of_the_composition(self):
        service = read_yaml("compose.yaml")["services"]["latentguard"]
        variables = [name.removeprefix("LATENTGUARD_SERVE_") for name in service["environment"]]
        assert {name.lower() for name in variables} <= OPTIONS
        assert options_of(" ".join(service["command"])) <= OPTIONS


class TestImage:
    """The Dockerfile builds what the project pins, and runs it without rights."""

    def test_torch_is_the_pinned_one(self):
        pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
        assert re.findall(r"torch==([\d.]+)", DOCKERFILE) == [pinned]

    def test_extras_exist(self):
        extras = re.search(r"'\.\[([\w,]+)\]'", DOCKERFILE)[1].split(",")
        assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])

    def test_what_is_copied_is_in_the_build_context(self):
        kept = (ROOT / ".dockerignore").read_text()
        copies = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M)
        for name in " ".join(copies).split():
            assert (ROOT / name).exists()
            assert f"!{name}\n" in kept

    def test_it_runs_as_nobody_in_particular(self):
        last = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
        assert "\nUSER 10001:10001\n" in last
        assert "HEALTHCHECK" in last

    def test_hadolint(self):
        run("hadolint", "Dockerfile")


def test_the_composition_is_confined():
    services = read_yaml("compose.yaml")["services"]
    guard = services["latentguard"]
    assert guard["read_only"] is True
    assert guard["user"] == "10001:10001"
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (DEPLOY / volume.partition(":")[0]).exists()


class TestMetrics:
    """What dashboard and alerts ask for is what the service shows."""

    @pytest.fixture(scope="class")
    def shown(self):
        pytest.importorskip("fastapi")
        from serve.running import get, passed, post, running

        with running() as url:
            post(f"{url}/v1/moderations", json={"input": passed()})
            return set(METRIC.findall(get(f"{url}/metrics").text))

    def test_of_the_alerts(self, shown):
        groups = read_yaml("prometheus/alerts.yml")["groups"]
        asked = {m for g in groups for r in g["rules"] for m in METRIC.findall(r["expr"])}
        assert asked
        assert asked <= shown

    def test_of_the_dashboard(self, shown):
        board = json.loads((DEPLOY / "grafana" / "dashboards" / "latentguard.json").read_text())
        targets = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
        asked = {metric for expression in targets for metric in METRIC.findall(expression)}
        assert asked
        assert asked <= shown

    def test_promtool(self, tmp_path):
        run("promtool", "test", "rules", "prometheus/alerts_test.yml")
        config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        (tmp_path / "alerts.yml").write_text((DEPLOY / "prometheus" / "alerts.yml").read_text())
        file = tmp_path / "prometheus.yml"
        file.write_text(config.replace("/etc/prometheus", str(tmp_path)))
        run("promtool", "check", "config", str(file))


def test_systemd_analyze(tmp_path):
    """On a machine without the service, its program is replaced by one that is there."""
    unit = tmp_path / "latentguard.service"
    unit.write_text(UNIT.replace("/opt/latentguard/bin/latentguard", "/bin/true"))
    run("systemd-analyze", "verify", str(unit))


class TestChart:
    """The chart with Helm, where it is installed."""

    COMMAND = ("helm", "template", "x", str(CHART), "--kube-version", "1.30.0")

    def render(self, *settings):
        text = run(*self.COMMAND, *(part for one in settings for part in ("--set", one)))
        return {one["kind"]: one for one in yaml.safe_load_all(text) if one}

    def test_lint(self):
        run("helm", "lint", str(CHART), "--strict")

    def test_pods_are_confined_and_probed(self):
        pod = self.render()["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert ports[container[probe]["httpGet"]["port"]] == 8401
        assert pod["terminationGracePeriodSeconds"] > 5 + 30

    def test_options_become_toml(self):
        config = self.render("options.trust-roles={system}")["ConfigMap"]["data"]["serve.toml"]
        assert tomllib.loads(config)["trust-roles"] == ["system"]

    def test_no_manifest_holds_a_key(self):
        made = self.render("apiKeysSecret=keys", "upstreamKeySecret=up")
        assert "Secret" not in made
        volumes = made["Deployment"]["spec"]["template"]["spec"]["volumes"]
        assert "keys" in {own["secret"]["secretName"] for own in volumes if "secret" in own}


def test_variables_of_a_cluster_are_kept_out():
    """An unknown LATENTGUARD_SERVE_ variable stops the start; links of services would make some."""
    assert "enableServiceLinks: false" in DEPLOYMENT
