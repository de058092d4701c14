"""Options of ``serve`` from a file, the environment and the command line; and ``--check``."""

import json
import os
from dataclasses import fields

import pytest
import typer
from typer.testing import CliRunner

from guard_files import edit_guard
from latentguard.cli.serve.command import serve
from latentguard.cli.serve.options import Policy, ServeOptions
from latentguard.cli.serve.settings import read_settings
from latentguard.serve.config import ServeConfig
from serve.running import tiny_guard


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("LATENTGUARD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "serve.toml"


class TestOrder:
    def test_defaults(self):
        assert read_settings({}) == ServeOptions(
            trust_roles=[],
            sources=[*ServeConfig.sources],
            allow_parameter=[],
            allowed_hosts=[],
            upstream_hosts=[],
            guards=[],
        )

    def test_options_come_before_the_environment_and_that_before_the_file(self, file, monkeypatch):
        file.write_text('guard = "g"\nmax-tokens = 1\nqueue = 1\ndeadline = 1\npolicy = "shadow"\n')
        monkeypatch.setenv("LATENTGUARD_SERVE_QUEUE", "2")
        monkeypatch.setenv("LATENTGUARD_SERVE_DEADLINE", "2")
        options = read_settings(dict(config=file, deadline=3.0))
        assert (options.guard, options.policy) == ("g", Policy.shadow)
        assert (options.max_tokens, options.queue, options.deadline) == (1, 2, 3.0)

    def test_the_environment_may_name_the_file(self, file, monkeypatch):
        file.write_text("queue = 7")
        monkeypatch.setenv("LATENTGUARD_SERVE_CONFIG", str(file))
        assert read_settings({}).queue == 7

    def test_lists_are_lists_or_names_with_commas(self, file, monkeypatch):
        file.write_text('trust_roles = ["system", "tool"]\nallowed-hosts = "a.example,b.example"')
        monkeypatch.setenv("LATENTGUARD_SERVE_ALLOW_PARAMETER", "top_k, min_p")
        options = read_settings(dict(config=file, upstream_hosts=["a,b", "c"]))
        assert options.trust_roles == ["system", "tool"]
        assert options.allowed_hosts == ["a.example", "b.example"]
        assert options.allow_parameter == ["top_k", "min_p"]
        assert options.upstream_hosts == ["a", "b", "c"]

    def test_limits_and_defaults_of_a_service_are_those_of_its_options(self):
        """Where both have a name, they mean the same."""
        config = ServeConfig()
        for field in fields(ServeOptions):
            if field.name == "close_delay" or not hasattr(config, field.name):
                continue
            assert getattr(config, field.name) == field.default, field.name


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('policy = "Block"', r"serve.toml, policy: .*'block', 'annotate' or 'shadow'; found"),
            ("max-token = 3", "serve.toml, max-token: there is no such option"),
            ("max_tokens = 1\nmax-tokens = 2", "names an option twice"),
            ("queue = 0", "serve.toml, queue: .* greater than or equal to 1; found 0"),
            ("deadline = nan", "serve.toml, deadline: "),
            ("deadline = inf", "serve.toml, deadline: "),
            ("port = 70000", "serve.toml, port: "),
            ("trust_roles = 3", "serve.toml, trust-roles: "),
            ("config = 'other.toml'", "serve.toml, config: there is no such option"),
            ("queue = ", "is not TOML"),
            ("[limits]\nqueue = 3", "limits: there is no such option"),
        ],
    )
    def test_of_the_file(self, file, content, reason):
        file.write_text(content)
        with pytest.raises(typer.BadParameter, match=reason):
            read_settings(dict(config=file))

    def test_a_missing_file(self, file):
        with pytest.raises(typer.BadParameter, match=r"serve.toml cannot be read: No such file"):
            read_settings(dict(config=file))

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("POLICY", "Block", "LATENTGUARD_SERVE_POLICY: .*; found 'Block'"),
            ("POLCY", "block", "LATENTGUARD_SERVE_POLCY is not an option of serve"),
            ("RATE", "", "LATENTGUARD_SERVE_RATE: "),
        ],
    )
    def test_of_the_environment(self, monkeypatch, name, value, reason):
        monkeypatch.setenv(f"LATENTGUARD_SERVE_{name}", value)
        with pytest.raises(typer.BadParameter, match=reason):
            read_settings({})


def run(*arguments):
    app = typer.Typer()
    app.command()(serve)
    told = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return told.exit_code, " ".join(told.output.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path):
    """A guard whose model is on this disk."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    tiny_guard().save(tmp_path / "guard")
    where = str(tmp_path / "model")
    edit_guard(tmp_path / "guard", lambda record: record["fingerprint"].update(model=where))
    return tmp_path / "guard"


class TestCheck:
    def test_all_is_well(self, folder, file):
        file.write_text(json.dumps(str(folder)).join(("guard = ", "\npolicy = 'annotate'")))
        assert run("--config", file, "--check") == (0, "All is well: the service would start.")

    def test_no_guard(self):
        code, said = run("--check")
        assert code == 2
        assert "expected a guard's folder or Hub id" in said

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (["--policy", "shadow", "--on-review", "block"], "block needs --policy block"),
            (["--trust-roles", "boss"], "found 'boss'"),
            (["--sources", "boss"], "found 'boss'"),
            (["--sources", "tool"], "expected user among them"),
            (["--upstream", "localhost:80"], "expected a URL as http://host:8000/v1"),
            (["--upstream", "http://", "--policy", "shadow"], "expected a URL"),
            (
                ["--upstream", "http://evil.example/v1", "--upstream-hosts", "llm.example"],
                "expected one of the hosts llm.example; found 'evil.example'",
            ),
            (["--guards", "strict"], "expected a name and a guard"),
            (["--guards", "default=g"], "expected a name and a guard"),
            (["--guards", "a=g,a=h"], "expected each name once"),
            (["--on-error", "allow"], "a client can bring about an error"),
            (["--tls-cert", "cert.pem"], "expected both --tls-cert and --tls-key"),
            (["--segment-header", "X-Traffic"], "this guard has no segments"),
        ],
    )
    def test_options_that_do_not_go_together(self, folder, options, reason):
        code, said = run(folder, *options, "--check")
        assert code == 2
        assert reason in said

    @pytest.mark.parametrize("name", ["ADMIN_KEY", "UPSTREAM_KEY", "SECOND_OPINION_KEY"])
    @pytest.mark.parametrize("value", ["", " "])
    def test_a_variable_without_a_key(self, folder, monkeypatch, name, value):
        monkeypatch.setenv(f"LATENTGUARD_{name}", value)
        url = "http://127.0.0.1:9/v1/moderations"
        options = ["--second-opinion", url] if name == "SECOND_OPINION_KEY" else []
        code, said = run(folder, *options, "--check")
        assert code == 2
        assert f"LATENTGUARD_{name} holds no key" in said

    def test_every_problem_is_said(self, folder, tmp_path):
        edit_guard(folder, lambda record: record["fingerprint"].update(model="/no/where"))
        (tmp_path / "keys").write_text("# none\n")
        (tmp_path / "cert.pem").write_text("rubbish")
        code, said = run(
            *(folder, "--check", "--api-keys", tmp_path / "keys", "--audit", tmp_path),
            *("--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "cert.pem"),
            *("--upstream-key-file", tmp_path / "keys2", "--reference", tmp_path / "none"),
        )
        assert code == 2
        for words in (
            "/no/where",
            "keys holds no API key",
            "is a folder; name a file in it",
            "cert.pem cannot be used",
            "keys2",
            "none",
        ):
            assert words in said
        assert said.count("Error: ") == 6

    def test_a_damaged_and_an_unsigned_guard(self, folder, tmp_path):
        edit_guard(folder, lambda record: record.update(threshold=1e308), seal=False)
        assert "was changed after it was written" in run(folder, "--check")[1]
        pytest.importorskip("cryptography")
        assert "is no public key" in run(folder, "--check", "--verify-key", tmp_path / "no")[1]
