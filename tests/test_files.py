"""Locks: one writer at a time, across processes and threads, and nothing is left behind."""

import fcntl
import os
import subprocess
import sys

import pytest

import latentguard
from latentguard.errors import LatentGuardError
from latentguard.files import exclusive_lock

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
