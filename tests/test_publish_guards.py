"""Guards are published end to end: tiny models, a stand-in of the Hub, a run that was killed."""

import importlib.util
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from cli.tiny_files import rows, written
from guard.hub_server import hub
from latentguard.benchmark import run
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from models.architectures import chat_model

SCRIPT = Path(__file__).parents[1] / "benchmarks/publish_guards.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("publish_guards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders of two tiny models."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("Tiny-One", "Tiny-Two")]
    for seed, folder in enumerate(folders):
        llama = chat_model("llama", tokenizer, seed=seed).model
        llama.config.max_position_embeddings = 2048
        llama.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


@pytest.fixture
def plan(script, tmp_path, monkeypatch):
    prompts = [
        Prompt(r["text"], harmful=word == "sly") for word in ("sly", "kind") for r in rows(24, word)
    ]
    monkeypatch.setattr(run, "load_training_rows", lambda: prompts)
    monkeypatch.setattr(script, "fit_chunking", lambda model, guard, *, max_fpr: guard)
    data = tmp_path / "data"
    data.mkdir()
    written(data / "xstest.jsonl", rows(9, "sly", "harmful") + rows(9, "kind", "harmless"))
    harmless = [Prompt(r["text"], harmful=False) for r in rows(80, "mild", start=500)]
    out = tmp_path / "out"
    return script.Plan(
        out=out, org="org", data_dir=data, train=prompts, harmless=harmless, push=True
    )


def test_each_guard_is_pushed_with_its_figures_and_one_that_fails_stops_no_other(
    script, server, models, plan
):
    first, second = models
    results = script.publish(plan, [first, str(plan.out / "missing"), second])
    assert [bool(one.url) for one in results] == [True, False, True]
    assert "missing" in results[1].error
    assert set(server.repos) == {"org/latentguard-tiny-one", "org/latentguard-tiny-two"}
    guard = LatentGuard.from_pretrained("org/latentguard-tiny-one")
    assert guard.bound.max_fpr == 0.05
    assert guard.digest == LatentGuard.load(plan.out / "tiny-one" / "guard").digest
    card = server.repos["org/latentguard-tiny-one"]["README.md"].decode()
    assert "library_name: latentguard" in card
    assert "this guard, own threshold" in card
    assert (plan.out / "tiny-one" / "benchmark" / "report.html").exists()


def test_a_killed_run_goes_on_where_it_stopped(script, server, models, plan, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(script, "save_benchmark", killed)
        script.publish(plan, models[:1])
    monkeypatch.setattr(LatentGuard, "fit", killed)  # what is fitted stays fitted
    [again] = script.publish(plan, models[:1])
    assert again.url
    monkeypatch.setattr(script.ChatModel, "load", killed)  # what is pushed is not loaded again
    assert script.publish(plan, models[:1]) == [again]


def test_a_guard_of_another_rate_is_not_taken_for_this_one(script, server, models, plan):
    from dataclasses import replace

    script.publish(replace(plan, push=False), models[:1])
    assert server.repos == {}
    [other] = script.publish(replace(plan, max_fpr=0.1), models[:1])
    assert "another rate" in other.error
    assert server.repos == {}


def test_a_list_of_models_is_one_a_line(script, tmp_path):
    file = tmp_path / "models.txt"
    file.write_text("# ours\norg/one\n\norg/two  # bigger\n")
    assert script.read_models(file) == ["org/one", "org/two"]
    assert len(script.read_models(None)) == len(set(script.MODELS)) == len(script.MODELS)
