"""Label files read as prompt files; other files are read as they are."""

import json

import pytest

from latentguard.data.label_rows import majority
from latentguard.data.prompt_files import read_prompts
from latentguard.errors import PromptError

ROW = dict(reviewer="Ann", time="2026-01-01T00:00:00+00:00")


def written(tmp_path, *rows):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        ([], None),
        (["harmful"], "harmful"),
        (["harmful", "harmless"], None),
        (["harmful", "harmless", "harmless"], "harmless"),
        (["harmful", "harmless", "harmless", "harmful"], None),
    ],
)
def test_the_label_that_more_gave_counts(labels, label):
    assert majority(labels) == label


def test_a_label_file_has_a_row_for_each_agreed_prompt(tmp_path):
    path = written(
        tmp_path,
        ROW | dict(text="One", label="harmful"),
        ROW | dict(text="Two", label="harmful"),
        ROW | dict(text="Two", label=None),
        ROW | dict(text="Three", label="harmful"),
        ROW | dict(text="Three", label="harmless", reviewer="Ben"),
        ROW | dict(text="One", label="harmless"),
    )
    assert [(p.text, p.harmful, p.id) for p in read_prompts(path)] == [("One", False, "labels-1")]


def test_as_csv_it_counts_the_same(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("text,label,reviewer,time\nOne,harmful,Ann,t\nTwo,harmful,Ann,t\nTwo,,Ann,t\n")
    assert [(p.text, p.harmful) for p in read_prompts(path)] == [("One", True)]


@pytest.mark.parametrize(
    "row",
    [dict(text="One", label="unsafe"), dict(prompt="One", text="a", label=1), dict(text="One")],
    ids=str,
)
def test_files_that_only_look_like_one_are_read_as_they_are(tmp_path, row):
    path = written(tmp_path, ROW | row, ROW | row)
    assert len(read_prompts(path)) == 2


def test_a_row_that_is_none_of_a_label_file_is_an_error(tmp_path):
    path = written(tmp_path, ROW | dict(text="One", label="harmful"), {"text": "Two", "label": 1})
    with pytest.raises(PromptError, match=r"line 2: a row of a label file has label, reviewer"):
        read_prompts(path)


def test_of_which_nothing_is_left_it_holds_no_prompts(tmp_path):
    path = written(tmp_path, ROW | dict(text="One", label=None))
    with pytest.raises(PromptError, match="holds no prompts"):
        read_prompts(path)
