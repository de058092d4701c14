"""Verdicts in a file: killed runs go on, nothing is scored twice, no line is torn."""

import errno
import fcntl
import json
from dataclasses import asdict, replace
from itertools import islice

import pytest

from fake_backend import FakeBackend, labelled, texts
from latentguard.errors import LatentGuardError, PromptError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.score_files import score_to_file
from latentguard.guard.verdict import Verdict
from latentguard.prompts import Prompt

COUNT = 40


class Killed(FakeBackend):
    """Is interrupted after so many batches."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def capture(self, prompts, **how):
        yield from islice(super().capture(prompts, **how), self.batches)
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def guard():
    return LatentGuard.fit(FakeBackend(), labelled(30))


@pytest.fixture(scope="module")
def other(guard):
    return LatentGuard.fit(FakeBackend(), labelled(30), probe="centroid")


@pytest.fixture
def prompts():
    return [Prompt(text, id=f"p-{n}") for n, text in enumerate(texts(COUNT, bad=True, start=90))]


@pytest.fixture
def whole(guard, prompts, tmp_path):
    score_to_file(guard, FakeBackend(), prompts, tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def kill(guard, prompts, out, batches=3):
    """Start a run and interrupt it; returns what it has written."""
    with pytest.raises(KeyboardInterrupt):
        score_to_file(guard, Killed(batches), prompts, out)
    return partial(out).read_bytes()


def partial(out):
    return out.with_name(f"{out.name}.partial")


class TestAWholeRun:
    def test_lines(self, guard, prompts, whole):
        rows = [json.loads(line) for line in whole.splitlines()]
        assert [row["id"] for row in rows] == [p.id for p in prompts]
        verdicts = list(guard.scan(FakeBackend(), prompts))
        assert rows == [json.loads(json.dumps(asdict(v))) for v in verdicts]
        assert list(rows[0])[:5] == ["id", "score", "probability", "flagged", "beliefs"]

    def test_no_text_of_a_prompt_is_written(self, whole):
        assert b"Please" not in whole

    def test_it_leaves_one_file(self, guard, prompts, tmp_path):
        out = tmp_path / "new" / "v.jsonl"
        assert score_to_file(guard, FakeBackend(), prompts, out) == 0
        assert [f.name for f in out.parent.iterdir()] == ["v.jsonl"]

    def test_an_earlier_result_is_replaced_only_at_the_end(self, guard, prompts, tmp_path):
        out = tmp_path / "v.jsonl"
        out.write_text("old\n")
        kill(guard, prompts, out)
        assert out.read_text() == "old\n"
        score_to_file(guard, FakeBackend(), prompts, out)
        assert len(out.read_text().splitlines()) == COUNT

    def test_of_nothing(self, guard, tmp_path):
        assert score_to_file(guard, FakeBackend(), [], tmp_path / "v") == 0
        assert (tmp_path / "v").read_bytes() == b""

    def test_odd_ids_stay_on_one_line(self, guard, tmp_path):
        ids = ["a\nb", "\u2028", 'q"', "é", "a\r"]
        prompts = [Prompt("some text", id=name) for name in ids]
        kill(guard, prompts * 4, tmp_path / "v", batches=1)
        assert score_to_file(guard, FakeBackend(), prompts * 4, tmp_path / "v") == 7
        rows = (tmp_path / "v").read_bytes().split(b"\n")[:-1]
        assert [json.loads(row)["id"] for row in rows] == ids * 4

    def test_a_line_is_the_verdict_and_reads_back(self, guard, tmp_path):
        score_to_file(guard, FakeBackend(), [Prompt("good", id="1")], tmp_path / "v")
        (verdict,) = guard.scan(FakeBackend(), [Prompt("good", id="1")])
        row = json.loads((tmp_path / "v").read_text())
        assert row == verdict.to_dict()
        assert Verdict.from_dict(row) == verdict
        assert list(row)[:4] == ["id", "score", "probability", "flagged"]


class TestResume:
    @pytest.mark.parametrize("batches", [0, 1, 3, 5])
    def test_the_same_bytes_and_nothing_twice(self, guard, prompts, whole, tmp_path, batches):
        out = tmp_path / "v.jsonl"
        written = kill(guard, prompts, out, batches)
        assert written == b"".join(whole.splitlines(keepends=True)[: 7 * batches])
        backend, counts = FakeBackend(), []
        done = score_to_file(guard, backend, iter(prompts), out, progress=counts.append)
        assert done == 7 * batches
        assert backend.captured == [p.text for p in prompts[done:]]
        assert sum(counts) == COUNT
        assert out.read_bytes() == whole
        assert sorted(f.name for f in tmp_path.iterdir()) == ["v.jsonl", "whole.jsonl"]

    def test_killed_again_and_again(self, guard, prompts, whole, tmp_path):
        out = tmp_path / "v.jsonl"
        for _ in range(5):
            kill(guard, prompts, out, batches=1)
        assert score_to_file(guard, FakeBackend(), prompts, out) == 35
        assert out.read_bytes() == whole

    def test_a_source_that_fails(self, guard, prompts, whole, tmp_path):
        def source():
            yield from prompts[:17]
            raise PromptError("line 18: not JSON")

        out = tmp_path / "v.jsonl"
        with pytest.raises(PromptError, match="line 18"):
            score_to_file(guard, FakeBackend(), source(), out)
        assert score_to_file(guard, FakeBackend(), prompts, out) == 14
        assert out.read_bytes() == whole

    def test_a_torn_last_line_is_cut(self, guard, prompts, whole, tmp_path):
        out = tmp_path / "v.jsonl"
        written = kill(guard, prompts, out)
        for torn in range(1, 60, 7):
            partial(out).write_bytes(written[:-torn])
            kill(guard, prompts, out, batches=0)
            assert partial(out).read_bytes() == b"".join(written.splitlines(keepends=True)[:20])
        assert score_to_file(guard, FakeBackend(), prompts, out) == 20
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        wanted = [json.loads(line) for line in whole.splitlines()]
        assert [row["id"] for row in rows] == [row["id"] for row in wanted]
        for row, want in zip(rows, wanted, strict=True):
            assert row["score"] == pytest.approx(want["score"], abs=1e-5)

    def test_killed_after_the_last_line(self, guard, prompts, whole, tmp_path):
        out = tmp_path / "v.jsonl"
        kill(guard, prompts, out, batches=99)
        backend = FakeBackend()
        assert score_to_file(guard, backend, prompts, out) == COUNT
        assert backend.captured == []
        assert out.read_bytes() == whole


class TestAnotherRun:
    def test_another_guard_starts_anew(self, guard, other, prompts, tmp_path):
        out = tmp_path / "v.jsonl"
        kill(other, prompts, out)
        backend = FakeBackend()
        assert score_to_file(guard, backend, prompts, out) == 0
        assert len(backend.captured) == COUNT

    def test_another_threshold_is_another_guard(self, guard, prompts, tmp_path):
        from dataclasses import replace

        out = tmp_path / "v.jsonl"
        kill(guard, prompts, out)
        assert score_to_file(replace(guard, threshold=-9.0), FakeBackend(), prompts, out) == 0
        assert all(json.loads(line)["flagged"] for line in out.read_text().splitlines())

    @pytest.mark.parametrize(
        "change",
        [
            lambda prompts: prompts[1:],
            lambda prompts: prompts[::-1],
            lambda prompts: prompts[:5],
            lambda prompts: [],
            lambda prompts: [Prompt(p.text, id=f"other-{p.id}") for p in prompts],
            # such as a file whose rows have no ids, edited before the run was started again
            lambda prompts: [Prompt(f"{p.text}, please", id=p.id) for p in prompts],
            lambda prompts: [replace(p, segment="de") for p in prompts],  # other thresholds
        ],
        ids=["shifted", "reversed", "fewer", "none", "renamed", "edited", "sliced"],
    )
    def test_other_prompts_are_an_error(self, guard, prompts, tmp_path, change):
        out = tmp_path / "v.jsonl"
        written = kill(guard, prompts, out)
        with pytest.raises(PromptError, match="written for other prompts than these; remove it"):
            score_to_file(guard, FakeBackend(), change(prompts), out)
        assert partial(out).read_bytes() == written
        assert not out.exists()
        partial(out).unlink()  # as the message says
        assert score_to_file(guard, FakeBackend(), change(prompts), out) == 0

    def test_more_prompts_at_the_end_are_welcome(self, guard, prompts, tmp_path):
        out = tmp_path / "v.jsonl"
        kill(guard, prompts, out)
        assert score_to_file(guard, FakeBackend(), [*prompts, Prompt("one more")], out) == 21
        assert len(out.read_text().splitlines()) == COUNT + 1


def test_two_runs_do_not_write_one_file(guard, prompts, tmp_path):
    class Slow(FakeBackend):
        def capture(self, *args, **how):
            said = r"Another run \(process \d+\) is writing .*v\.jsonl; wait for it"
            with pytest.raises(LatentGuardError, match=said):
                score_to_file(guard, FakeBackend(), prompts, tmp_path / "v.jsonl")
            return super().capture(*args, **how)

    assert score_to_file(guard, Slow(), prompts, tmp_path / "v.jsonl") == 0
    assert [f.name for f in tmp_path.iterdir()] == ["v.jsonl"]


def test_a_file_system_without_locks(guard, prompts, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    kill(guard, prompts, tmp_path / "v.jsonl")
    assert not list(tmp_path.glob("*.lock"))
    assert score_to_file(guard, FakeBackend(), prompts, tmp_path / "v.jsonl") > 0


def test_a_folder_is_no_file(guard, prompts, tmp_path):
    with pytest.raises(PromptError, match="is a folder"):
        score_to_file(guard, FakeBackend(), prompts, tmp_path)
