"""Guards go to the Hugging Face Hub and come back, by a local stand-in of it."""

import pytest
from huggingface_hub import constants

from fake_backend import FakeBackend, labelled, texts
from guard.hub_server import SHA, hub
from latentguard.errors import GuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.loading import load_guard


@pytest.fixture(scope="module")
def guard():
    return LatentGuard.fit(FakeBackend(), labelled(30))


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


def test_what_is_pushed_comes_back_bit_for_bit(server, guard):
    url = guard.push_to_hub("org/guard", token="hf_secret")
    assert url.endswith(f"org/guard/commit/{SHA}")
    again = LatentGuard.from_pretrained("org/guard")
    assert again.digest == guard.digest
    asked = texts(5, bad=True)
    assert list(again.scan(FakeBackend(), asked)) == list(guard.scan(FakeBackend(), asked))


def test_only_the_files_of_a_guard_are_sent(server, guard):
    guard.push_to_hub("org/guard")
    assert set(server.repos["org/guard"]) == {"guard.json", "guard.safetensors", "README.md"}


def test_a_token_and_privacy_are_passed_on(server, guard):
    guard.push_to_hub("org/guard", private=True, token="hf_secret")
    assert set(server.tokens) == {"Bearer hf_secret"}
    (asked,) = server.created
    assert asked.get("private") is True or asked["visibility"] == "private"  # by version


def test_the_card_names_base_model_library_license_and_metrics(server, guard):
    guard.push_to_hub("org/guard", license="apache-2.0")
    card = server.repos["org/guard"]["README.md"].decode()
    head = card.split("---")[1]
    assert "library_name: latentguard" in head
    assert 'license: "apache-2.0"' in head
    assert "metrics: [roc_auc]" in head
    assert "base_model" not in head  # "fake" is no Hub id
    assert "# Latent guard for fake" in card


def test_load_guard_takes_a_hub_id(server, guard):
    guard.push_to_hub("org/guard")
    loaded = load_guard("org/guard", FakeBackend())
    assert loaded("Please do the bad item number 1").flagged


def test_a_folder_is_never_looked_for_on_the_hub(server, guard, tmp_path):
    guard.save(tmp_path / "guard")
    assert LatentGuard.from_pretrained(tmp_path / "guard").digest == guard.digest
    assert server.downloads == []


def test_what_is_not_there_is_one_sentence(server, tmp_path):
    for name in ("org/none", "not a name!", str(tmp_path / "none")):
        with pytest.raises(GuardError, match="There is no folder") as error:
            LatentGuard.from_pretrained(name)
        assert "org/guard" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_damaged_guard_on_the_hub_is_refused(server, guard):
    guard.push_to_hub("org/guard")
    server.repos["org/guard"]["guard.safetensors"] = b"rubbish"
    with pytest.raises(GuardError, match="damaged"):
        LatentGuard.from_pretrained("org/guard")


def test_a_hub_out_of_reach_is_one_sentence(guard, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GuardError, match="no guard of that name came from"):
        LatentGuard.from_pretrained("org/guard")
    with pytest.raises(GuardError, match="was not uploaded"):
        guard.push_to_hub("org/guard")
