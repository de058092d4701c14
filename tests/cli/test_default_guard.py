"""The guard in the package, by its name ``default``; without its model."""

import json

from cli.tiny_files import record


def test_show_prints_its_card(lg):
    code, out, _ = lg("show", "default")
    assert code == 0
    assert out.startswith("# Latent guard for default")
    assert "at most 5.00%" in out


def test_a_folder_of_that_name_does_not_stand_in_for_it(lg, guard, tmp_path, monkeypatch):
    guard.rename(tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    assert lg("show", "default")[1].startswith("# Latent guard for default")
    assert not lg("show", "./default")[1].startswith("# Latent guard for default")


def test_it_is_never_changed_itself(fails, files):
    error = fails("calibrate", "default", "--harmless", files["plain"])
    assert "not changed in place" in error
    assert "--out" in error
    error = fails("pack", "add", "default", "--name", "x", "--examples", files["plain"])
    assert "not changed in place" in error


class TestOut:
    def test_the_changed_guard_goes_there_and_the_first_stays(self, lg, guard, files, tmp_path):
        before = (guard / "guard.json").read_bytes()
        out = tmp_path / "changed"
        code, _, _ = lg(
            "calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05", "--out", out
        )
        assert code == 0
        assert (guard / "guard.json").read_bytes() == before
        assert record(out)["bound"] is not None
        assert json.loads(before)["bound"] is None

    def test_another_guard_there_is_not_overwritten(self, fails, guard, files, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        (other / "guard.json").write_text("{}")
        error = fails("calibrate", guard, "--harmless", files["plain"], "--out", other)
        assert "which would be overwritten" in error
        assert (other / "guard.json").read_text() == "{}"

    def test_the_guards_own_folder_may_be_named(self, lg, guard, files):
        where = guard / ".." / guard.name
        args = ("calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.05")
        assert lg(*args, "--out", where)[0] == 0
        assert record(guard)["bound"] is not None
