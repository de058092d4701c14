"""The verbs ``guards`` and ``pull``, with a local stand-in of the Hub."""

from dataclasses import replace

import pytest
from huggingface_hub import constants

from fake_backend import FINGERPRINT, FakeBackend, labelled
from guard.hub_server import hub
from latentguard.guard.latent_guard import LatentGuard


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield running


@pytest.fixture
def pushed(server):
    backend = FakeBackend(fingerprint=replace(FINGERPRINT, model="maker/chat"))
    fitted = LatentGuard.fit(backend, labelled(30))
    fitted.push_to_hub("org/one")
    LatentGuard.fit(FakeBackend(), labelled(30)).push_to_hub("org/two")
    server.repos["org/other"] = {"README.md": b"---\ntags: [else]\n---\n"}
    return fitted


class TestGuards:
    def test_guards_on_the_hub_are_found_by_their_tag(self, lg, pushed):
        code, out, err = lg("guards")
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "default\tdefault\tpackage",
            "org/one\tmaker/chat\thub",
            "org/two\t\thub",
        ]

    def test_guards_of_one_model(self, lg, pushed):
        assert lg("guards", "--model", "maker/chat")[1] == "org/one\tmaker/chat\thub\n"

    def test_without_the_hub_the_others_are_listed(self, lg, server):
        server.shutdown()
        server.server_close()
        code, out, err = lg("guards")
        assert (code, out) == (0, "default\tdefault\tpackage\n")
        assert "could not be listed" in err

    def test_on_this_disk(self, lg, pushed):
        assert lg("pull", "org/one")[0] == 0
        out = lg("guards", "--local")[1]
        assert out.splitlines() == ["default\tdefault\tpackage", "org/one\tmaker/chat\tdisk"]

    def test_one_of_another_version_does_not_hide_the_others(self, lg, pushed, tmp_path):
        for name in ("org/one", "org/two"):
            assert lg("pull", name)[0] == 0
        (record,) = tmp_path.glob("cache/models--org--one/snapshots/*/guard.json")
        record.write_text('{"schema": 2}')
        code, out, _ = lg("guards", "--local")
        assert code == 0
        assert out.splitlines()[1:] == ["org/one\t\tdisk", "org/two\tfake\tdisk"]


class TestPull:
    def test_a_copy_is_the_guard(self, lg, pushed, tmp_path):
        code, out, err = lg("pull", "org/one", "--out", tmp_path / "copy")
        assert code == 0, err
        assert LatentGuard.load(tmp_path / "copy").digest == pushed.digest
        assert "not calibrated" in out

    def test_it_replaces_nothing(self, fails, lg, pushed, tmp_path):
        assert lg("pull", "org/one", "--out", tmp_path / "copy")[0] == 0
        assert "--overwrite" in fails("pull", "org/two", "--out", tmp_path / "copy")

    def test_a_damaged_guard_is_refused(self, fails, server, pushed, tmp_path):
        server.repos["org/one"]["guard.safetensors"] += b"!"
        assert "damaged" in fails("pull", "org/one", "--out", tmp_path / "copy")
        assert not (tmp_path / "copy").exists()

    def test_no_such_guard(self, fails, server):
        assert "no guard of that name" in fails("pull", "org/none")
