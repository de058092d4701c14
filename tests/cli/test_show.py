"""The verb ``show``."""

import json

import pytest

from cli.tiny_files import record


class TestShow:
    def test_it(self, lg, guard, files):
        code, out, err = lg("show", guard)
        assert (code, err) == (0, "")
        assert out.startswith("# Latent guard for ")
        assert "nothing is promised" in out
        assert "data_sha256: " in out
        lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")
        assert "at most 5.00%" in lg("show", guard)[1]

    def test_a_guard_of_unknown_making(self, lg, guard):
        changed = record(guard)
        changed["fitted"] = None
        (guard / "guard.json").write_text(json.dumps(changed))
        assert lg("show", guard)[0] == 0

    def test_no_guard(self, fails, tmp_path):
        assert "Expected a guard folder" in fails("show", tmp_path)


class TestShowWithoutAGuard:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path))
        monkeypatch.setattr("latentguard.models.sources._hub_models", lambda: iter(()))

    def test_it_lists_the_models_on_this_disk(self, lg, model, tmp_path):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "default").symlink_to(model)
        code, out, _ = lg("show")
        assert code == 0
        name, size, path = out.strip().split("\t")
        assert (name, path) == ("default", str(tmp_path / "models" / "default"))
        assert size.endswith(" MB")

    def test_it_says_how_to_get_one_if_there_are_none(self, lg):
        code, out, _ = lg("show")
        assert code == 0
        assert "'latentguard demo' fetches the default one" in out
