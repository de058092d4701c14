"""The verb ``serve`` as the command line registers it."""

import re
import sys
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

import latentguard.serve
from guard.opinion_server import opinion_server
from latentguard.cli.serve.command import serve
from latentguard.cli.serve.options import ServeOptions
from latentguard.cli.serve.parts import opener, read_second_opinion
from latentguard.errors import GuardError, LatentGuardError, ModelError
from latentguard.models.chat_model import ChatModel
from serve.running import band_guard, tiny_guard, tiny_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ChatModel, "load", classmethod(lambda cls, source, **_: tiny_model()))
    tiny_guard().save(tmp_path / "guard")
    return tmp_path


def test_the_device_map_is_for_the_loader(tmp_path):
    """Which knows this one, and not that; without a GPU nothing else can be seen of it."""
    model, guard = tiny_model(), tiny_guard()
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    options = ServeOptions(model=str(tmp_path), device_map="auto")
    assert opener(guard, options)()[0] is guard
    with pytest.raises(ModelError, match="nowhere"):
        opener(guard, replace(options, device_map="nowhere"))()


def run(*arguments):
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.delattr(latentguard.serve, "server")
    monkeypatch.delitem(sys.modules, "latentguard.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(LatentGuardError, match=r"pip install 'latentguard\[serve\]'"):
        raise run(folder / "guard").exception


def test_a_segment_header_needs_a_guard_with_slices(folder):
    with pytest.raises(GuardError, match="calibrate it with --segment-column"):
        raise run(folder / "guard", "--segment-header", "X-Traffic").exception


class TestShadow:
    def refused(self, folder, reason):
        """At the start and by ``--check``."""
        arguments = (folder / "guard", "--shadow", folder / "new")
        with pytest.raises(GuardError, match=reason):
            raise run(*arguments).exception
        checked = run(*arguments, "--check")
        assert checked.exit_code == 2
        assert re.search(reason, checked.stderr)

    def test_one_of_another_model_is_refused_in_a_sentence(self, folder):
        guard = tiny_guard()
        other = replace(guard, fingerprint=replace(guard.fingerprint, weights="0" * 64))
        other.save(folder / "new")
        reason = "--shadow .*: expected a guard of the model of .*; found other weights 0000"
        self.refused(folder, reason)

    def test_weights_that_are_not_finite_are_refused(self, folder):
        guard = tiny_guard()
        weight = guard.probe.weight * float("nan")
        replace(guard, probe=replace(guard.probe, weight=weight)).save(folder / "new")
        self.refused(folder, "new holds a damaged guard .*finite numbers")

    def test_what_is_no_guard_is_refused(self, folder):
        self.refused(folder, "new")

    def test_one_without_segments_is_refused_with_a_segment_header(self, folder):
        part = band_guard().thresholds
        with_segments = replace(part, segments={"app": part.common})
        replace(band_guard(), thresholds=with_segments).save(folder / "guard")
        band_guard().save(folder / "new")
        checked = run(
            folder / "guard", "--shadow", folder / "new", "--segment-header", "x", "--check"
        )
        assert checked.exit_code == 2
        assert "has no segments" in checked.stderr

    def test_one_without_a_band_is_refused_with_a_second_opinion(self, folder):
        band_guard().save(folder / "guard")
        tiny_guard().save(folder / "new")
        with opinion_server() as server:
            options = ("--shadow", folder / "new", "--second-opinion", f"{server.url}/moderations")
            checked = run(folder / "guard", "--check", *options)
        assert checked.exit_code == 2
        assert "no review band" in checked.stderr

    def test_a_guard_of_the_same_model_is_fine(self, folder):
        band_guard().save(folder / "new")
        options = ("--shadow", folder / "new", "--model", folder, "--check")
        checked = run(folder / "guard", *options)
        assert checked.exit_code == 0, checked.stderr


def test_help_says_what_there_is():
    told = run("--help")
    assert told.exit_code == 0
    for word in ("upstream", "on-review", "allow-mismatch", "LATENTGUARD_UPSTREAM_KEY"):
        assert word in told.stdout


class TestSecondOpinion:
    @pytest.fixture
    def url(self):
        with opinion_server() as server:
            yield f"{server.url}/moderations"

    def test_the_opener_loads_it_and_drops_a_promise_without_it(self, folder, url):
        guard = band_guard()
        options = ServeOptions(second_opinion=url)
        second = read_second_opinion(options, [guard])
        assert opener(guard, options, second)()[0].bound is None
        assert opener(guard, options)()[0].bound is not None

    def test_one_that_does_not_answer_keeps_the_service_from_starting(self, folder):
        with opinion_server() as gone:
            options = ServeOptions(second_opinion=f"{gone.url}/moderations")
        second = read_second_opinion(options, [band_guard()])
        with pytest.raises(GuardError, match="does not answer"):
            opener(band_guard(), options, second)()

    def test_the_check_names_what_is_wrong(self, folder, url):
        checked = run(folder / "guard", "--check", "--second-opinion", url)
        assert checked.exit_code == 2
        assert "no review band" in checked.stderr
        checked = run(folder / "guard", "--check", "--second-opinion", "http://host/v1")
        assert "should end with /moderations" in checked.stderr

    def test_it_warns_of_a_guard_that_was_calibrated_without_it(self, url, caplog):
        read_second_opinion(ServeOptions(second_opinion=url), [band_guard()])
        assert "so nothing is promised of both together" in caplog.text
