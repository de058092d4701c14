"""What the tests of the command line share: a tiny model, a guard, prompts, and how to call it."""

import sys

import pytest
from huggingface_hub import constants

import latentguard
from cli.tiny_files import rows, written
from guard.hub_server import hub
from latentguard.cli import main
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt
from models.architectures import chat_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """A model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama = chat_model("llama", tokenizer).model
    llama.config.max_position_embeddings = 2048  # this tokenizer makes the built-in prompts long
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of its own: nothing is kept in that of the user."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LATENTGUARD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def model(tiny_model):
    """The same, where another test module has its own."""
    return tiny_model


@pytest.fixture(scope="session")
def tiny_guard(tiny_model, tmp_path_factory):
    """A guard folder; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("guards") / "g"
    prompts = [
        Prompt(r["text"], harmful=word == "sly") for word in ("sly", "kind") for r in rows(20, word)
    ]
    backend = latentguard.ChatModel.load(tiny_model)
    LatentGuard.fit(backend, prompts, reading="t_inst", probe="centroid").save(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Labelled and unlabelled files of prompts."""
    folder = tmp_path_factory.mktemp("files")
    mixed = rows(15, "sly", "harmful") + rows(6, "kind", "harmless", start=100)
    return {
        "mixed": written(folder / "mixed.jsonl", mixed),
        "harmless": written(folder / "harmless.jsonl", rows(14, "kind", "harmless")),
        "plain": written(folder / "plain.jsonl", rows(60, "kind", start=500)),
        "few": written(folder / "few.jsonl", rows(20, "kind", start=500)),
        "asked": written(folder / "asked.jsonl", rows(9, "sly", start=50) + rows(9, "kind")),
    }


@pytest.fixture
def guard(tiny_guard, tmp_path):
    """A copy of the guard."""
    copy = tmp_path / "guard"
    copy.mkdir()
    for file in tiny_guard.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def lg(monkeypatch, capsys):
    """Run a command in this process; returns exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["latentguard", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def fails(lg):
    """Run a command that should fail in one sentence; returns the sentence."""

    def run(*words):
        code, out, err = lg(*words)
        lines = [line for line in err.splitlines() if not line.startswith(("Loading", "Warning:"))]
        errors = [line for line in lines if line.startswith("Error: ")]
        assert (code, len(errors)) == (1, 1), err
        assert lines[-1] == errors[0]
        assert "Traceback" not in err + out
        return errors[0]

    return run


@pytest.fixture
def pushed(monkeypatch, tmp_path, guard):
    """The id of the same guard on a local stand-in of the Hub."""
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        LatentGuard.load(guard).push_to_hub("org/guard")
        yield "org/guard"
