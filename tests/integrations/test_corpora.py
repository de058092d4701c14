"""Corpora: blocks hold every row once, whatever the format; parts are whole or not there."""

import json
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fake_backend import FakeBackend, labelled
from latentguard.data.prompt_files import Columns, stream_prompts
from latentguard.errors import PromptError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.ray.corpora import cut, find_files, read_block, survey
from latentguard.integrations.ray.shards import SUCCESS, finished, record, write_part, write_success

COLUMNS = Columns(label="")
ROWS = [{"id": f"row-{n}", "text": f"Tell me of thing {n}"} for n in range(1000)]


def lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows=ROWS, group=170):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def blocks_of(*paths, rows=64, mark="guard"):
    return cut([survey(str(path), rows) for path in paths], rows, mark)


def rows_of(blocks, columns=COLUMNS):
    return [row for block in blocks for row in read_block(block, columns)]


class TestBlocks:
    @pytest.mark.parametrize("size", [1, 64, 170, 1000, 5000])
    @pytest.mark.parametrize("write", [lines, parquet])
    def test_every_row_once_and_in_order(self, write, size, tmp_path):
        blocks = blocks_of(
            write(tmp_path / f"a.{write.__name__}".replace("lines", "jsonl")), rows=size
        )
        assert [b.stop - b.start for b in blocks[:-1]] == [size] * (-(-1000 // size) - 1)
        rows = rows_of(blocks)
        assert [row.number for row in rows] == list(range(1000))
        assert [row.id for row in rows] == [row["id"] for row in ROWS]
        assert [row.prompt.text for row in rows] == [row["text"] for row in ROWS]

    @pytest.mark.parametrize("write", [lines, parquet])
    def test_prompts_are_those_of_one_reader(self, write, tmp_path):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        rows = [{"text": f"Thing {n}", "history": chat, "more": n} for n in range(100)]
        path = write(tmp_path / f"a.{write.__name__}".replace("lines", "jsonl"), rows)
        found = [row.prompt for row in rows_of(blocks_of(path, rows=7))]
        assert found == list(stream_prompts(path, columns=COLUMNS))
        assert found[5].id == "a-6"
        assert len(found[5].history) == 2

    def test_files_follow_each_other(self, tmp_path):
        parquet(tmp_path / "b.parquet", ROWS[500:])
        lines(tmp_path / "a.jsonl", ROWS[:500])
        (tmp_path / "_SUCCESS").write_text("")
        files = find_files(str(tmp_path), COLUMNS, tmp_path)
        rows = rows_of(blocks_of(*files))
        assert [row.number for row in rows] == list(range(1000))
        assert [row.id for row in rows] == [row["id"] for row in ROWS]
        assert find_files(str(tmp_path / "*.jsonl"), COLUMNS, tmp_path) == files[:1]

    def test_blank_lines_and_torn_ends(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "four"}')
        rows = rows_of(blocks_of(path, rows=2))
        assert [(row.number, row.id, row.prompt.text) for row in rows] == [
            (0, "a-1", "one"),
            (3, "a-4", "four"),
        ]

    def test_a_bad_row_is_named_and_stays(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": ""}\n{"text": 3}\nno\n\xff\n{"other": "x"}\n{"text": "good"}\n')
        *bad, good = rows_of(blocks_of(path))
        assert good.prompt.text == "good"
        assert [row.prompt for row in bad] == [None] * 5
        for n, (row, reason) in enumerate(
            zip(
                bad,
                ["is empty", "found a int", "not JSON", "not UTF-8", "no column 'text'"],
                strict=True,
            )
        ):
            assert row.error.startswith(f"{path}, line {n + 1}: ")
            assert reason in row.error

    def test_names_change_with_all_that_makes_the_verdicts(self, tmp_path):
        one = lines(tmp_path / "a.jsonl")
        names = {blocks_of(one)[1].name}
        names |= {blocks_of(one, rows=65)[1].name, blocks_of(one, mark="other")[1].name}
        lines(one, [*ROWS[:-1], {"text": "other"}])
        names.add(blocks_of(one)[1].name)
        other = lines(tmp_path / "b.jsonl")
        names |= {blocks_of(other)[1].name, blocks_of(one, other)[17].name}
        assert len(names) == 6
        assert blocks_of(other) == blocks_of(other)


class TestSources:
    def test_a_hub_set_is_copied_once(self, tmp_path, monkeypatch):
        read = []

        def load(**what):
            read.append(what)
            return iter([{"text": "a", "n": 1}, {"text": "b", "n": 2}])

        monkeypatch.setattr(datasets, "load_dataset", load)
        for _ in range(2):
            (path,) = find_files("org/name:test", COLUMNS, tmp_path)
        assert [what["split"] for what in read] == ["test"]
        assert [row.prompt for row in rows_of(blocks_of(path))] == list(
            stream_prompts("org/name:test", columns=COLUMNS)
        )

    def test_labels_are_copied_where_they_are_wanted(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("text,label,refused\nx,harmful,1\ny,harmless,\n")
        (copy,) = find_files(str(path), Columns(), tmp_path / "staged")
        rows = rows_of(blocks_of(copy), Columns())
        assert [row.prompt for row in rows] == list(stream_prompts(path))
        assert rows[0].prompt.group == "refused_harmful"

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("-", "Standard input"),
            ("{}", "holds no .parquet"),
            ("{}/*.jsonl", "holds no .parquet"),
            ("{}/x.csv", "cannot be read"),
        ],
    )
    def test_no_files(self, source, reason, tmp_path):
        with pytest.raises(PromptError, match=reason):
            find_files(source.format(tmp_path), COLUMNS, tmp_path / "staged")

    def test_verdicts_that_are_to_go_where_the_corpus_lies(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}')
        with pytest.raises(PromptError, match=r"All of the 1 files .* name another folder"):
            find_files(str(tmp_path), COLUMNS, tmp_path / "staged", apart=tmp_path)

    @pytest.mark.parametrize("name", ["no.parquet", "no.jsonl"])
    def test_a_file_that_cannot_be_read(self, name, tmp_path):
        with pytest.raises(PromptError, match="cannot be read"):
            survey(str(tmp_path / name), 10)
        (tmp_path / "bad.parquet").write_text("not Parquet")
        with pytest.raises(PromptError, match="cannot be read"):
            survey(str(tmp_path / "bad.parquet"), 10)


class TestParts:
    @pytest.fixture
    def scored(self, tmp_path):
        backend = FakeBackend()
        guard = LatentGuard.fit(backend, labelled(60))
        path = lines(tmp_path / "a.jsonl", [*ROWS[:99], {"text": ""}])
        out = tmp_path / "out"
        (block,) = blocks_of(path, rows=100)
        assert finished(out, [block]) == set()
        *rows, bad = rows_of([block])
        verdicts = list(guard.scan(backend, [row.prompt for row in rows]))
        records = [*map(record, rows, verdicts), record(bad, None)]
        write_part(out, block, records)
        return out, path, block, verdicts

    def test_verdicts_are_there_bit_by_bit(self, scored):
        out, _, block, verdicts = scored
        table = pq.read_table(out)
        assert table["row"].to_pylist() == list(range(100))
        assert table["score"].to_pylist() == [*(v.score for v in verdicts), None]
        assert [dict(b) for b in table["beliefs"].to_pylist()[:-1]] == [v.beliefs for v in verdicts]
        assert next(e for e in table["error"].to_pylist() if e).endswith("give it a text.")
        assert finished(out, [block]) == {block.name}

    def test_success_says_what_is_there(self, scored):
        out, path, block, verdicts = scored
        total = write_success(out, "digest", [survey(str(path), 100)], [block])
        assert total.rows == 100
        assert total.unscored == 1
        assert total.flagged == sum(v.flagged for v in verdicts)
        said = json.loads((out / SUCCESS).read_text())
        assert said["guard"] == "digest"
        assert said["files"] == [block.name]
        assert len(pq.read_table(out)) == 100  # readers of folders pass it over

    def test_leftovers_go_and_strangers_stop_the_run(self, scored):
        out, _, block, _ = scored
        (out / f".{block.name}.1234").write_text("torn")
        assert finished(out, [block]) == {block.name}
        assert [p.name for p in out.iterdir()] == [block.name]
        other = replace(block, name="part-000000-other.parquet")
        with pytest.raises(PromptError, match="1 files of verdicts by another guard"):
            finished(out, [other])
