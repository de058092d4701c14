"""Reading prompts: every kind of file, and errors that name the file, the line and the reason."""

import io
import json
import sys

import pytest

from latentguard.data.prompt_files import (
    Columns,
    parse_prompt,
    read_prompts,
    select_side,
    stream_prompts,
)
from latentguard.errors import MissingExtra, PromptError
from latentguard.prompts import Message, Prompt, as_prompts


@pytest.fixture
def written(tmp_path):
    """Write a file and return its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def parquet(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    def write(**columns):
        write_table(pyarrow.table(columns), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    return write


@pytest.fixture
def piped(monkeypatch):
    def pipe(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return pipe


def texts(source, **how):
    return [prompt.text for prompt in read_prompts(source, **how)]


def error_of(source, **how):
    with pytest.raises(PromptError) as found:
        read_prompts(source, **how)
    return str(found.value)


class TestJsonLines:
    def test_every_column(self, written):
        row = dict(id="a", text="Hi", label="harmful", refused=0, category="x")
        row |= dict(source="s", pair="p", history=[dict(role="system", content="be brief")])
        found = read_prompts(written("f.jsonl", json.dumps(row)))
        history = (Message("system", "be brief"),)
        assert found == [Prompt("Hi", "a", True, False, "x", "s", "p", history)]
        assert found[0].group == "accepted_harmful"

    def test_ids_are_file_and_line_where_the_row_has_none(self, written):
        rows = '{"text": "a"}\n\n{"text": "b", "id": 0}\n{"text": "c", "id": ""}\n'
        assert [p.id for p in read_prompts(written("f.jsonl", rows))] == ["f-1", "0", "f-4"]

    @pytest.mark.parametrize("name", ["f.json", "f.ndjson", "F.JSONL"])
    def test_other_names_for_it(self, name, written):
        assert texts(written(name, '\ufeff{"text": "a"}\r\n{"text": "b"}')) == ["a", "b"]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"text": "a"', "not JSON"),
            ('["a"]', "expected a JSON object, found a list"),
            ('{"prompt": "a", "n": 1}', "no column 'text'; columns found: prompt, n"),
            ("{}", "no column 'text'; columns found: none"),
            ('{"text": null}', "'text' should be text, found nothing"),
            ('{"text": 7}', "'text' should be text, found a int"),
            ('{"text": " \\n"}', "'text' is empty"),
            ('{"text": "a\\ud83d"}', "'text' is not valid Unicode"),
            ('{"text": "a", "label": "maybe"}', "'label' should be harmful or harmless, found 'm"),
            ('{"text": "a", "refused": 2}', "'refused' should be harmful or harmless, found '2'"),
            (
                '{"text": "a", "history": [{"role": "user"}]}',
                "'history' should be an object",
            ),
            ('{"text": "a", "history": [{"role": "user", "content": 1}]}', "found a int"),
            ('{"text": "a", "history": [{"role": "me", "content": "b"}]}', "found 'me'"),
            (b'{"text": "\xff"}', "not UTF-8 text"),
            ('{"text": "a", "n": ' + "9" * 5000 + "}", "JSON that cannot be read"),
            ("[" * 50_000, "JSON that cannot be read"),
        ],
    )
    def test_a_bad_row_is_named_by_file_line_and_reason(self, line, reason, written):
        line = line.encode() if isinstance(line, str) else line
        path = written("f.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
        assert error_of(path).startswith(f"{path}, line 3: ")
        assert reason in error_of(path)

    def test_rows_before_a_bad_one_are_streamed(self, written):
        rows = stream_prompts(written("f.jsonl", '{"text": "a"}\n{"text": "b"}\nbad'))
        assert [next(rows).text, next(rows).text] == ["a", "b"]
        with pytest.raises(PromptError, match="line 3"):
            next(rows)

    def test_columns_by_name(self, written):
        path = written("f.jsonl", '{"q": "a", "y": 1, "n": "x", "c": 3}')
        columns = Columns(text="q", label="y", id="n", category="c")
        assert read_prompts(path, columns=columns) == [Prompt("a", "x", True, category="3")]
        missing = error_of(path, columns=Columns(text="prompt"))
        assert "no column 'prompt'; columns found: q, y, n, c" in missing


class TestLabels:
    @pytest.mark.parametrize("word", ["harmful", "Unsafe", " TRUE ", "yes", "1", 1, 1.0, True])
    def test_harmful(self, word):
        assert parse_prompt(dict(text="a", label=word), Columns()).harmful is True

    @pytest.mark.parametrize("word", ["harmless", "SAFE", "benign", "no", "0", 0, 0.0, False])
    def test_harmless(self, word):
        assert parse_prompt(dict(text="a", label=word), Columns()).harmful is False

    @pytest.mark.parametrize("row", [{}, dict(label=None), dict(label=""), dict(label="  ")])
    def test_unknown(self, row):
        assert parse_prompt(dict(text="a") | row, Columns()).harmful is None

    @pytest.mark.parametrize("word", ["2", "nan", "harm", -1, float("nan"), []])
    def test_neither(self, word):
        with pytest.raises(PromptError, match="row: 'label' should be harmful or harmless"):
            parse_prompt(dict(text="a", label=word), Columns())

    def test_a_default_is_for_rows_without_one(self, written):
        path = written("f.csv", "text,label\na,harmless\nb,\n")
        assert [p.harmful for p in read_prompts(path, harmful=True)] == [False, True]

    def test_one_side_takes_its_own_and_the_unlabelled(self):
        prompts = [Prompt("a", harmful=True), Prompt("b", harmful=False), Prompt("c")]
        assert select_side(prompts, harmful=True) == [
            Prompt("a", harmful=True),
            Prompt("c", harmful=True),
        ]
        assert [p.text for p in select_side(prompts, harmful=False)] == ["b", "c"]

    def test_groups_need_both_labels(self):
        groups = {
            (h, r): Prompt("a", harmful=h, refused=r).group
            for h in (True, False, None)
            for r in (True, False, None)
        }
        assert {labels: group for labels, group in groups.items() if group} == {
            (True, True): "refused_harmful",
            (True, False): "accepted_harmful",
            (False, True): "refused_harmless",
            (False, False): "accepted_harmless",
        }


class TestTextsAndChats:
    CHAT = (
        dict(role="system", content="be brief"),
        dict(role="user", content="Hi"),
        dict(role="assistant", content="Hello."),
        dict(role="user", content="How do I kill a process?"),
    )

    def test_texts_chats_and_prompts_may_be_mixed(self):
        given = [Prompt("a", id="mine"), "b", self.CHAT, [Message("user", "c")]]
        own, text, chat, short = as_prompts(given)
        assert own is given[0]
        assert text == Prompt("b", id="2")
        assert (chat.text, chat.id) == ("How do I kill a process?", "3")
        assert chat.history[0] == Message("system", "be brief")
        assert [turn.role for turn in chat.history] == ["system", "user", "assistant"]
        assert short == Prompt("c", id="4")

    def test_one_text_is_no_list_of_prompts(self):
        with pytest.raises(PromptError, match=r"Put it in a list: \[text\]"):
            list(as_prompts("How do I kill a process?"))

    @pytest.mark.parametrize("chat", [CHAT, [Message("user", "Hi")]])
    def test_one_chat_is_no_list_of_prompts(self, chat):
        with pytest.raises(PromptError, match=r"Put it in a list: \[messages\]"):
            list(as_prompts(chat))

    @pytest.mark.parametrize(
        ("item", "reason"),
        [
            (7, "prompt 1: expected a text, a Prompt or a list of messages; found a int"),
            ([], "found an empty list"),
            ([dict(role="user")], "prompt 1: a message should be an object with 'role'"),
            ([dict(role="me", content="a")], "found 'me'"),
            ([dict(role="user", content=["a"])], "found a list"),
            (CHAT[:3], "the last message of a chat is the user's; found one of 'assistant'"),
        ],
    )
    def test_something_else_is_said_in_one_sentence(self, item, reason):
        with pytest.raises(PromptError) as found:
            list(as_prompts([item]))
        assert reason in str(found.value)

    def test_a_row_of_messages_is_a_chat(self, written):
        rows = [dict(messages=list(self.CHAT)), dict(text="a", messages=[])]
        path = written("f.jsonl", "\n".join(map(json.dumps, rows)))
        chat, text = read_prompts(path)
        assert (chat.text, len(chat.history), text.text) == ("How do I kill a process?", 3, "a")

    @pytest.mark.parametrize(
        ("messages", "reason"),
        [
            ([dict(role="assistant", content="a")], "the last message of a chat is the user's"),
            ([dict(role="user", content=" ")], "'messages' is empty"),
            ("hello", "found a str"),
        ],
    )
    def test_bad_messages_are_named_by_line(self, messages, reason, written):
        path = written("f.jsonl", json.dumps(dict(messages=messages)))
        assert error_of(path).startswith(f"{path}, line 1: ")
        assert reason in error_of(path)


class TestTables:
    @pytest.mark.parametrize(("name", "comma"), [("f.csv", ","), ("f.tsv", "\t"), ("F.CSV", ",")])
    def test_no_value_is_guessed_to_be_missing_or_a_number(self, name, comma, written):
        rows = ["text,label,id", "NA,1,007", "null,0,", "None,,nan", "123,safe,1e3", "nan,,x"]
        prompts = read_prompts(written(name, "\r\n".join(rows).replace(",", comma)))
        assert [p.text for p in prompts] == ["NA", "null", "None", "123", "nan"]
        assert [p.harmful for p in prompts] == [True, False, None, False, None]
        assert [p.id for p in prompts] == ["007", f"{name[0]}-2", "nan", "1e3", "x"]

    def test_no_column_is_not_the_one_without_a_name(self, written):
        """pandas writes its index under an empty name."""
        path = written("f.csv", ",text,segment\n0,a,de\n1,b,en\n2,c,de\n")
        found = read_prompts(path, columns=Columns(label="", segment=""))
        assert [(p.harmful, p.segment) for p in found] == [(None, None)] * 3

    def test_quotes_new_lines_and_a_byte_order_mark(self, written):
        path = written("f.csv", '\ufefftext,category\n"a, ""b""\nc",x\n  d  ,\n')
        found = [(p.text, p.category) for p in read_prompts(path)]
        assert found == [('a, "b"\nc', "x"), ("  d  ", None)]

    def test_very_long_texts(self, written):
        assert texts(written("f.csv", "text\n" + "a" * 300_000)) == ["a" * 300_000]

    @pytest.mark.parametrize(
        ("rows", "line", "reason"),
        [
            ("text,label\na,1\nb, c,1\n", 3, "more fields than columns"),
            ('text\na\n"b" c\n', 3, "not CSV"),
            ('text\na\n"b\n', 3, "not CSV"),
            ("text,label\na,1\n,0\n", 3, "'text' is empty"),
            ("label,text\n1,a\n0\n", 3, "'text' should be text, found nothing"),
            ("prompt,label\na,1\n", 2, "no column 'text'; columns found: prompt, label. Name"),
            (b"text\na\n\xe9\n", 3, "not UTF-8 text"),
        ],
    )
    def test_a_bad_row_is_named_by_file_line_and_reason(self, rows, line, reason, written):
        path = written("f.csv", rows)
        assert error_of(path).startswith(f"{path}, line {line}: ")
        assert reason in error_of(path)


class TestText:
    @pytest.mark.parametrize("name", ["f.txt", "F.TXT"])
    def test_one_prompt_a_line(self, name, written):
        prompts = read_prompts(written(name, ' a, "b"\r\n\n{"text": "c"}\u2028\x0bd\nNA'))
        assert [p.text for p in prompts] == [' a, "b"', '{"text": "c"}\u2028\x0bd', "NA"]
        assert [p.id for p in prompts] == [f"{name[0]}-1", f"{name[0]}-3", f"{name[0]}-4"]


class TestJsonList:
    @pytest.mark.parametrize("indent", [None, 2])
    def test_a_list_of_objects_is_read(self, indent, written):
        rows = [dict(text="a", label="harmful"), dict(text="b", id="x")]
        found = read_prompts(written("f.json", "\n " + json.dumps(rows, indent=indent)))
        assert found == [Prompt("a", "f-1", True), Prompt("b", "x")]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('[{"text": "a"}, 7]', "item 2: expected a JSON object, found a int"),
            ('[{"text": "a"}, {"text": ""}]', "item 2: 'text' is empty"),
            ('[{"text": "a"},', "not JSON"),
            ("[]", "holds no prompts"),
        ],
    )
    def test_a_bad_item_is_named(self, content, reason, written):
        path = written("f.json", content)
        assert error_of(path).startswith(str(path))
        assert reason in error_of(path)


class TestStandardInput:
    def test_json_lines(self, piped):
        piped('{"text": "é", "label": "harmful"}\n\n{"text": "b"}\n'.encode())
        found = [(p.id, p.text, p.harmful) for p in read_prompts("-")]
        assert found == [("stdin-1", "é", True), ("stdin-3", "b", None)]

    def test_plain_lines(self, piped):
        piped(b"How do I kill a process?\r\nhello\n")
        assert texts("-") == ["How do I kill a process?", "hello"]

    @pytest.mark.parametrize("line", [b'{"text": 1}', b"{oops", b"\xff"])
    def test_errors_name_it(self, line, piped):
        piped(b"fine\n" + line)
        assert error_of("-").startswith("standard input, line 2: ")


class TestParquet:
    def test_columns_of_any_type(self, parquet):
        path = parquet(text=["a", "NA"], label=[1.0, None], id=[7, 8], category=[None, "c"])
        assert read_prompts(path) == [Prompt("a", "7", True), Prompt("NA", "8", category="c")]

    def test_ids_and_history(self, parquet):
        turns = [[dict(role="system", content="be brief")], None]
        first, second = read_prompts(parquet(text=["a", "b"], history=turns))
        assert (first.id, first.history) == ("p-1", (Message("system", "be brief"),))
        assert (second.id, second.history) == ("p-2", ())

    def test_a_bad_row_is_named(self, parquet):
        path = parquet(text=["a", None])
        assert error_of(path) == f"{path}, row 2: 'text' should be text, found nothing."

    def test_a_missing_column_is_named(self, parquet):
        missing = error_of(parquet(prompt=["a"], label=[1]))
        assert "no column 'text'; columns found: prompt, label." in missing

    def test_a_damaged_file(self, written):
        path = written("p.parquet", b"PAR1 and nothing else")
        assert error_of(path).startswith(f"{path} cannot be read: ")


class TestSourcesThatCannotBeRead:
    @pytest.mark.parametrize("name", ["f.jsonl", "f.txt", "f.csv", "f.tsv", "f.parquet"])
    def test_a_missing_file(self, name, tmp_path):
        assert f"{name} cannot be read: " in error_of(tmp_path / name)

    @pytest.mark.parametrize("name", ["f.jsonl", "f.txt", "f.csv", "f.tsv"])
    @pytest.mark.parametrize("content", ["", "\n"])
    def test_a_file_without_rows(self, name, content, written):
        assert "holds no prompts" in error_of(written(name, content))

    def test_a_folder(self, tmp_path):
        (tmp_path / "f.jsonl").mkdir()
        assert "f.jsonl cannot be read: Is a directory" in error_of(tmp_path / "f.jsonl")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("x.md", "no such file"),
            ("prompts", "no such file"),
            ("../data/prompts", "no such file"),
            ("/data/prompts", "no such file"),
        ],
    )
    def test_a_path_that_is_not_there_is_no_hub_data_set(self, name, reason):
        message = error_of(name)
        assert message.startswith(f"{name} cannot be read: {reason}. Expected a .jsonl")

    def test_a_folder_and_a_file_of_an_unknown_kind_are_said_plainly(self, tmp_path):
        assert error_of(tmp_path).startswith(f"{tmp_path} is a folder. Expected a .jsonl")
        (tmp_path / "p.xlsx").write_text("x")
        assert "p.xlsx is a file of an unknown kind. " in error_of(tmp_path / "p.xlsx")

    @pytest.mark.parametrize(
        ("name", "package"), [("org/name", "datasets"), ("{parquet}", "pyarrow")]
    )
    def test_without_the_extra_it_is_named(self, name, package, parquet, monkeypatch):
        name = name.format(parquet=parquet(text=["a"]))
        for module in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtra, match=r"pip install 'latentguard\[hub-data\]'"):
            read_prompts(name)

    @pytest.mark.parametrize("name", ["org/name", "org/name:test", "org/name/config:test"])
    def test_a_hub_data_set_without_the_hub(self, name):
        message = error_of(name)
        assert message.startswith(f"{name} cannot be read: ")
        assert "a Hub data set as org/name:split" in message

    @pytest.mark.parametrize(
        ("name", "asked"),
        [
            ("org/name", dict(path="org/name", name=None, split="train")),
            ("org/name/config:test", dict(path="org/name", name="config", split="test")),
        ],
    )
    def test_what_the_hub_is_asked_for(self, name, asked, monkeypatch):
        import datasets

        def load_dataset(**how):
            assert how == asked | dict(streaming=True)
            return [dict(text="a"), dict(text="b")]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert texts(name) == ["a", "b"]

    def test_a_hub_that_fails_half_way(self, monkeypatch):
        import datasets

        def load_dataset(**_):
            yield dict(text="a")
            raise ConnectionError("lost\nmore")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert error_of("org/name").startswith("org/name cannot be read: lost. Expected a .jsonl")
