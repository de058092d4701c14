"""A store keeps whole entries, whoever writes beside it and whatever dies."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.errors import LatentGuardError
from latentguard.study import store as module
from latentguard.study.store import Store, key_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "folder" / "store.sqlite"


@pytest.fixture
def store(path):
    opened = Store(path)
    yield opened
    opened.close()


def python(code, *words):
    """A process that runs some code with ``Store`` at hand."""
    code = f"import sys\nfrom latentguard.study.store import Store\n{code}"
    words = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def finish(process):
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


class TestEntries:
    @settings(max_examples=15)
    @given(st.dictionaries(st.text(), st.binary(), max_size=5), st.lists(st.text(), max_size=3))
    def test_what_was_put_is_found(self, tmp_path_factory, entries, others):
        store = Store(tmp_path_factory.mktemp("s") / "s")
        store.put(entries)
        asked = [*entries, *others]
        assert store.get(asked) == entries
        assert store.has(asked) == set(entries)
        store.close()

    def test_nothing(self, store):
        store.put({})
        assert store.get([]) == {}
        assert store.has([]) == set()

    def test_keys_may_be_a_generator_with_repeats(self, store):
        store.put({"a": b"1", "b": b""})
        assert store.get(k for k in "aabca") == {"a": b"1", "b": b""}
        assert store.has(k for k in "aabca") == {"a", "b"}

    def test_it_is_still_there_when_opened_again(self, store, path):
        store.put({"a": b"\x00\xff"})
        store.close()
        again = Store(path)
        assert again.get(["a"]) == {"a": b"\x00\xff"}
        again.close()

    def test_the_first_stays(self, store):
        """Numbers that were made of an entry stay true of it."""
        store.put({"a": b"first"})
        store.put({"a": b"second", "b": b"new"})
        assert store.get("ab") == {"a": b"first", "b": b"new"}

    def test_all_or_none(self, store):
        with pytest.raises(sqlite3.Error):
            store.put({"a": b"1", "b": object()})
        assert store.has("ab") == set()

    def test_closing_leaves_one_file(self, store, path):
        store.put({"a": b"1"})
        store.close()
        assert os.listdir(path.parent) == [path.name]


class TestFilesThatAreNoStore:
    @pytest.mark.parametrize(
        "content", [b"my thesis\n" * 100, b"\x00" * 5000], ids=["text", "null"]
    )
    def test_they_are_named_and_left_alone(self, tmp_path, content):
        path = tmp_path / "thesis.txt"
        path.write_bytes(content)
        with pytest.raises(LatentGuardError, match=r"thesis\.txt is not a store .*another folder"):
            Store(path)
        assert path.read_bytes() == content

    def test_an_empty_file_becomes_one(self, tmp_path):
        (tmp_path / "s").touch()
        store = Store(tmp_path / "s")
        store.put({"a": b"1"})
        assert store.has("a") == {"a"}
        store.close()

    def test_a_folder(self, tmp_path):
        with pytest.raises(LatentGuardError, match="cannot be used"):
            Store(tmp_path)

    def test_a_file_that_was_cut(self, store, path):
        store.put({str(n): bytes(5000) for n in range(50)})
        store.close()
        os.truncate(path, 40_000)
        with pytest.raises(LatentGuardError, match=r"store\.sqlite is not a store"):
            again = Store(path)
            try:
                again.get(map(str, range(50)))
            finally:
                again.close()


class TestTrouble:
    def test_a_full_disk(self, store):
        store.put({"a": b"1"})
        store._base.execute("PRAGMA max_page_count = 10")
        with pytest.raises(LatentGuardError, match=r"full.*what is kept stays"):
            store.put({"b": bytes(100_000), "c": b"3"})
        assert store.get("abc") == {"a": b"1"}

    def test_a_process_that_never_stops_writing(self, store, path, monkeypatch):
        monkeypatch.setattr(module, "WAIT", 0.05)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        late = Store(path)
        with pytest.raises(LatentGuardError, match="locked") as error:
            late.put({"a": b"1"})
        assert "elete" not in str(error.value)
        other.execute("ROLLBACK")
        other.close()
        late.put({"a": b"1"})
        assert store.has("a") == {"a"}
        late.close()

    def test_a_closed_store_is_no_reason_to_delete_it(self, store):
        store.close()
        with pytest.raises(sqlite3.ProgrammingError):
            store.get("a")


class TestProcesses:
    def test_several_open_and_fill_one_new_file(self, path):
        """All of them make the file at the same moment."""
        path.parent.mkdir(parents=True)
        code = """
import pathlib, time
path, name = sys.argv[1:]
pathlib.Path(path + name).touch()
while not pathlib.Path(path + "go").exists():
    time.sleep(0.001)
store = Store(path)
for n in range(30):
    store.put({f"{name} {n}": name.encode(), f"shared {n}": name.encode()})
store.close()
"""
        names = "abcd"
        children = [python(code, path, name) for name in names]
        until(lambda: len(os.listdir(path.parent)) == len(names))
        (path.parent / f"{path.name}go").touch()
        for child in children:
            finish(child)
        store = Store(path)
        for name in names:
            mine = [f"{name} {n}" for n in range(30)]
            assert store.get(mine) == dict.fromkeys(mine, name.encode())
        shared = store.get(f"shared {n}" for n in range(30))
        assert len(shared) == 30
        assert set(shared.values()) <= {name.encode() for name in names}
        store.close()

    @pytest.mark.parametrize("after", [1, 7, 40])
    def test_killed_while_it_writes(self, path, after):
        code = """
import itertools
store = Store(sys.argv[1])
for n in itertools.count():
    store.put({f"{part} {n}": f"{part} {n} ".encode() * 5000 for part in range(3)})
"""
        path.parent.mkdir(parents=True)
        child = python(code, path)
        store = Store(path)
        until(lambda: store.has([f"0 {after}"]))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        store.close()
        again = Store(path)
        assert again._base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for n in itertools.count():
            keys = [f"{part} {n}" for part in range(3)]
            found = again.get(keys)
            if not found:
                break
            assert found == {key: f"{key} ".encode() * 5000 for key in keys}
        assert n > after
        assert again._base.execute("SELECT count(*) FROM kept").fetchone() == (3 * n,)
        again.put({"next": b"1"})
        again.close()


class TestKeys:
    @given(st.lists(JSON, max_size=4), st.lists(JSON, max_size=4))
    def test_same_only_if_the_same_is_said(self, one, other):
        same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
        assert (key_of(*one) == key_of(*other)) is same

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("a", "b"), (["a", "b"],)),
            (("a", "b"), ("ab",)),
            ((1,), (1.0,)),
            ((1,), (True,)),
            ((1,), ("1",)),
            ((None,), ("null",)),
            ((), ([],)),
            (("é",), ("e\u0301",)),
            (("\ud800",), ("?",)),
        ],
    )
    def test_what_looks_alike(self, one, other):
        assert key_of(*one) != key_of(*other)

    def test_order_of_names_and_kind_of_list_do_not_matter(self):
        assert key_of({"a": 1, "b": (2, 3)}) == key_of({"b": [2, 3], "a": 1})

    def test_it_never_changes(self):
        """Or every store would be asked for what it holds under another name."""
        known = "7e0ba61f47ef8c97f470d7f7d22f4dcd3dfa7ddd030ed0822ad0238190ec5d8c"
        assert key_of("reply", {"b": 1.5, "a": ["é", None]}) == known


def until(happens):
    for _ in range(6000):
        if happens():
            return
        time.sleep(0.005)
    raise AssertionError("it never happened")
