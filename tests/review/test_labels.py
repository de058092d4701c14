"""The label file: what counts of it, and what a kill leaves of it."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import latentguard
from latentguard.data.prompt_files import read_prompts
from latentguard.errors import LatentGuardError, PromptError
from latentguard.prompts import Message, Prompt
from latentguard.review.labels import LabelFile, prompt_key

CAKE = Prompt("How do I bake a cake?", id="cake", segment="kitchen")
LOCK = Prompt("How do I pick a lock?", id="lock")
CHAT = Prompt("And now?", id="chat", history=(Message("user", "Hi."), Message("assistant", "Hm.")))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def labels(path):
    made = LabelFile(path)
    yield made
    made.close()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def agreed(labels):
    """What counts, by the label file itself and by whoever reads it as a prompt file."""
    prompts = labels.agreed_prompts()
    assert len(prompts) == labels.agreed_count
    if prompts:
        assert read_prompts(labels.path) == prompts
    return {prompt.id: prompt.harmful for prompt in prompts}


class TestRows:
    def test_a_row_says_what_who_and_when(self, labels, path):
        labels.label(CAKE, "harmless", "Ann", {"score": -1.5})
        (row,) = rows(path)
        assert row.pop("time").endswith("+00:00")
        assert row == dict(
            id="cake",
            text=CAKE.text,
            segment="kitchen",
            label="harmless",
            reviewer="Ann",
            score=-1.5,
        )

    def test_it_is_a_prompt_file(self, labels, path):
        labels.label(CAKE, "harmless", "Ann")
        labels.label(CHAT, "harmful", "Ann")
        cake, chat = read_prompts(path)
        assert (cake.text, cake.harmful, cake.segment) == (CAKE.text, False, "kitchen")
        assert (chat.text, chat.harmful, chat.history) == (CHAT.text, True, CHAT.history)

    def test_others_may_not_read_it(self, labels, path):
        labels.label(CAKE, "harmless", "Ann")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_line_ends_within_a_text_do_not_end_a_row(self, labels, path):
        odd = Prompt("one\u2028two\nthree\x85four", id="odd")
        labels.label(odd, "harmful", "Ann")
        labels.close()
        again = LabelFile(path)
        assert again.labels_of(prompt_key(odd)) == {"Ann": "harmful"}
        labels._file = again._file


class TestWhatCounts:
    def test_a_later_row_of_the_same_reviewer_replaces_the_earlier(self, labels):
        labels.label(LOCK, "harmful", "Ann")
        labels.label(LOCK, "harmless", "Ann")
        assert agreed(labels) == {"lock": False}

    def test_two_who_disagree_do_not_count_until_one_changes(self, labels):
        labels.label(LOCK, "harmful", "Ann")
        labels.label(LOCK, "harmless", "Ben")
        labels.label(CAKE, "harmless", "Ben")
        assert labels.is_disputed(prompt_key(LOCK))
        assert agreed(labels) == {"cake": False}
        labels.label(LOCK, "harmful", "Ben")
        assert not labels.is_disputed(prompt_key(LOCK))
        assert agreed(labels) == {"lock": True, "cake": False}

    def test_a_third_decides(self, labels):
        for reviewer, label in (("Ann", "harmful"), ("Ben", "harmless"), ("Cleo", "harmless")):
            labels.label(LOCK, label, reviewer)
        assert agreed(labels) == {"lock": False}

    def test_the_same_text_after_another_history_is_another_prompt(self, labels):
        labels.label(CHAT, "harmful", "Ann")
        labels.label(Prompt(CHAT.text, id="alone"), "harmless", "Ann")
        assert agreed(labels) == {"chat": True, "alone": False}


class TestUndo:
    def test_it_takes_the_last_label_back_by_a_row(self, labels, path):
        labels.label(CAKE, "harmless", "Ann")
        labels.label(LOCK, "harmful", "Ann")
        assert labels.undo("Ann") == prompt_key(LOCK)
        assert rows(path)[-1]["label"] is None
        assert agreed(labels) == {"cake": False}
        assert labels.undo("Ann") == prompt_key(CAKE)
        assert labels.undo("Ann") is None
        assert agreed(labels) == {}

    def test_a_changed_label_is_what_it_was(self, labels):
        labels.label(LOCK, "harmful", "Ann")
        labels.label(LOCK, "harmless", "Ann")
        labels.undo("Ann")
        assert agreed(labels) == {"lock": True}

    def test_it_is_each_reviewers_own(self, labels):
        labels.label(LOCK, "harmful", "Ann")
        labels.label(CAKE, "harmless", "Ben")
        assert labels.undo("Ann") == prompt_key(LOCK)
        assert agreed(labels) == {"cake": False}


class TestFiles:
    def test_a_torn_last_line_is_cut_off(self, labels, path):
        labels.label(CAKE, "harmless", "Ann")
        whole = path.read_bytes()
        labels.label(LOCK, "harmful", "Ann")
        labels.close()
        path.write_bytes(path.read_bytes()[:-9])
        again = LabelFile(path)
        labels._file = again._file
        assert path.read_bytes() == whole
        again.label(LOCK, "harmful", "Ann")
        assert agreed(again) == {"cake": False, "lock": True}

    def test_a_prompt_file_is_not_appended_to(self, path):
        path.write_text('{"id": "1", "text": "Hello.", "label": "harmless"}\n')
        before = path.read_bytes()
        with pytest.raises(PromptError, match=r"line 1.*Name another file with --out"):
            LabelFile(path)
        assert path.read_bytes() == before

    def test_one_process_writes(self, labels, path):
        with pytest.raises(LatentGuardError, match="Another process writes"):
            LabelFile(path)

    def test_a_full_disk_is_said_and_leaves_nothing(self, labels, path, monkeypatch):
        labels.label(CAKE, "harmless", "Ann")
        whole = path.read_bytes()
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
        with pytest.raises(LatentGuardError, match="the disk is full"):
            labels.label(LOCK, "harmful", "Ann")
        assert path.read_bytes() == whole
        assert agreed(labels) == {"cake": False}


LABELLING = """
import sys
from latentguard.prompts import Prompt
from latentguard.review.labels import LabelFile
labels, start = LabelFile(sys.argv[1]), int(sys.argv[2])
for n in range(start, start + 1_000_000):
    labels.label(Prompt(f"prompt {n} " + "long " * 500, id=str(n)), "harmless", "Ann")
    print(n, flush=True)
"""


def test_a_killed_process_loses_no_label_that_it_confirmed(path):
    """Killed in the middle of labelling, again and again, on the same file."""
    source = str(Path(latentguard.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": source}
    start, confirmed = 0, 0
    for run in range(6):
        command = [sys.executable, "-c", LABELLING, str(path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
            for _ in range(3 + 4 * run):
                confirmed = int(process.stdout.readline()) + 1
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split("\n")
        confirmed = max([confirmed, *(int(one) + 1 for one in rest[:-1] if one)])
        labels = LabelFile(path)
        start = labels.agreed_count
        labels.close()
        assert start in (confirmed, confirmed + 1)
        assert [prompt.id for prompt in read_prompts(path)] == [str(n) for n in range(start)]
