"""The verb ``show``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import latentguard
from guard_files import edit_guard


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
        edit_guard(guard, lambda record: record.update(fitted=None))
        assert lg("show", guard)[0] == 0

    def test_no_guard(self, fails, tmp_path):
        assert "Expected a guard folder" in fails("show", tmp_path)

    def test_nothing_heavy_is_loaded(self, guard, files, lg):
        """It takes a moment, where torch alone takes seconds."""
        lg("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")
        script = (
            "import sys; from latentguard.cli import main\n"
            "try: main()\n"
            "except SystemExit as stop: assert not stop.code\n"
            "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'numpy', 'safetensors'}\n"
            "print('loaded:', *sorted(heavy & set(sys.modules)))"
        )
        env = os.environ | {"PYTHONPATH": str(Path(latentguard.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", script, "show", guard],
            capture_output=True,
            text=True,
            env=env,
            check=True,
        )
        assert "at most 5.00%" in done.stdout
        assert done.stdout.splitlines()[-1] == "loaded:"

    @pytest.mark.parametrize("card", [None, "# My own words\n"])
    def test_a_card_that_is_not_this_guards_is_not_shown(self, lg, guard, card):
        whole = lg("show", guard)[1]
        (guard / "README.md").unlink()
        if card:
            (guard / "README.md").write_text(card)
        assert lg("show", guard)[1] == whole

    def test_a_damaged_guard(self, fails, guard):
        edit_guard(guard, lambda record: record.pop("threshold"))
        assert "damaged" in fails("show", guard)
        (guard / "guard.safetensors").write_bytes(b"rubbish")
        assert "damaged or belongs to another guard" in fails("show", guard)


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
