"""Files are whole or not there; a lock has one holder, and nothing is left behind."""

import fcntl
import os
import subprocess
import sys

import pytest

import latentguard
from latentguard.errors import LatentGuardError
from latentguard.files import (
    append_line,
    atomic_path,
    exclusive_lock,
    read_whole_lines,
    write_all_atomic,
    write_atomic,
)

HOLD = """
import sys
from latentguard.files import exclusive_lock
with exclusive_lock(sys.argv[1], output="out"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock until its standard input is closed."""
    source = os.path.dirname(os.path.dirname(latentguard.__file__))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": source},
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


def test_the_file_names_the_process_and_is_removed_at_the_end(path):
    with exclusive_lock(path, output="out"):
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_another_process_is_named_in_one_sentence(path, holder):
    said = rf"Another run \(process {holder.pid}\) is writing my-report; wait for it"
    with pytest.raises(LatentGuardError, match=said), exclusive_lock(path, output="my-report"):
        pass
    assert path.exists()


def test_a_killed_process_leaves_no_lock(path, holder):
    holder.kill()
    holder.wait()
    assert path.exists()
    with exclusive_lock(path, output="out"):
        assert path.read_text() == f"{os.getpid()}\n"


def test_another_run_in_this_process_is_another_run(path):
    with exclusive_lock(path, output="out"):
        with pytest.raises(LatentGuardError), exclusive_lock(path, output="out"):
            pass
        assert path.exists()


def test_the_lock_is_released_when_the_block_fails(path):
    with pytest.raises(KeyboardInterrupt), exclusive_lock(path, output="out"):
        raise KeyboardInterrupt
    assert not path.exists()
    with exclusive_lock(path, output="out"):
        pass


def test_a_file_that_was_removed_meanwhile_is_locked_anew(path, monkeypatch):
    """The run before ends between our opening of its file and our locking of it."""
    flock, calls = fcntl.flock, []

    def slow(file, operation):
        if not calls:
            path.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with exclusive_lock(path, output="out"):
        assert path.read_text() == f"{os.getpid()}\n"
    assert len(calls) == 2


def test_a_file_system_without_locks_is_used_all_the_same(path, monkeypatch):
    def unsupported(file, operation):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with exclusive_lock(path, output="out"):
        pass
    assert not path.exists()


class TestAtomicWriting:
    @pytest.fixture
    def full_disk(self, monkeypatch):
        def fail(descriptor):
            raise OSError("no space left")

        monkeypatch.setattr(os, "fsync", fail)

    def test_text_is_utf_8_and_nothing_else_is_left(self, tmp_path):
        write_atomic(tmp_path / "f.txt", "\u00e9\n")
        write_atomic(tmp_path / "f.bin", b"\xff")
        assert (tmp_path / "f.txt").read_bytes() == "\u00e9\n".encode()
        assert (tmp_path / "f.bin").read_bytes() == b"\xff"
        assert sorted(f.name for f in tmp_path.iterdir()) == ["f.bin", "f.txt"]

    def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path, full_disk):
        (tmp_path / "f.txt").write_text("old")
        with pytest.raises(OSError, match="no space"):
            write_atomic(tmp_path / "f.txt", "new and longer")
        assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("f.txt", "old")]

    def test_of_several_files_none_is_replaced_before_all_are_written(self, tmp_path, monkeypatch):
        done, sync = [], os.fsync

        def fail_second(descriptor):
            done.append(descriptor)
            if len(done) == 2:
                raise OSError("no space left")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fail_second)
        for name in ("a", "b"):
            (tmp_path / name).write_text("old")
        with pytest.raises(OSError, match="no space"):
            write_all_atomic({tmp_path / "a": "new", tmp_path / "b": "new"})
        assert sorted((f.name, f.read_text()) for f in tmp_path.iterdir()) == [
            ("a", "old"),
            ("b", "old"),
        ]

    def test_a_library_writes_by_name(self, tmp_path):
        with atomic_path(tmp_path / "f") as partial:
            partial.write_text("new")
            assert not (tmp_path / "f").exists()
        assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("f", "new")]

    def test_what_a_library_wrote_before_it_failed_is_removed(self, tmp_path):
        with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "f") as partial:
            partial.write_text("new")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


class TestLines:
    def test_appended_lines_are_on_the_file_at_once(self, tmp_path):
        with (tmp_path / "f").open("a") as file:
            append_line(file, "one")
            assert read_whole_lines(tmp_path / "f") == ["one"]

    def test_a_torn_last_line_is_cut_off(self, tmp_path):
        (tmp_path / "f").write_text("one\ntwo\nthr")
        assert read_whole_lines(tmp_path / "f") == ["one", "two"]
        assert (tmp_path / "f").read_text() == "one\ntwo\n"

    def test_no_file_has_no_lines(self, tmp_path):
        assert read_whole_lines(tmp_path / "none") == []
