"""The audit log: whole lines, no texts, rotation, and disks that are full."""

import contextlib
import functools
import json
import os
import resource
import socket
import stat
import threading
import time

import pytest

from latentguard.prompts import Message, Prompt
from latentguard.serve import audit_log, audit_sinks
from latentguard.serve.audit_log import AuditLog
from latentguard.serve.errors import AuditUnavailable
from serve.running import flagged, get, offline, passed, post, running


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "audit.jsonl"


class TestFile:
    def test_every_record_is_a_line(self, path):
        log = AuditLog(path)
        log.write([{"n": 1}, {"n": 2}])
        log.write([{"n": 3, "text": "two\nlines"}])
        log.close()
        assert [line["n"] for line in lines(path)] == [1, 2, 3]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_torn_line_is_cut_off(self, path):
        path.parent.mkdir()
        path.write_text('{"n": 1}\n{"n": ')
        log = AuditLog(path)
        log.write([{"n": 2}])
        log.close()
        assert [line["n"] for line in lines(path)] == [1, 2]

    @pytest.mark.parametrize("keep", [0, 1, 3])
    def test_rotation_keeps_so_many_files_and_splits_no_line(self, path, keep):
        log = AuditLog(path, max_bytes=100, keep=keep)
        for n in range(60):
            log.write([{"n": n}])
        log.close()
        older = [path.with_name(f"audit.jsonl.{n}") for n in range(1, keep + 1)]
        beside = [path.with_name(f"audit.jsonl.{suffix}") for suffix in ("salt", "rejected")]
        assert sorted(path.parent.iterdir()) == sorted([path, *older, *beside])
        kept = [line["n"] for file in [*reversed(older), path] for line in lines(file)]
        assert kept == list(range(kept[0], 60))
        assert all(file.stat().st_size <= 100 for file in [path, *older])

    @pytest.mark.parametrize("fsync", ["never", "interval", "always"])
    def test_fsync(self, path, fsync, monkeypatch):
        from latentguard.serve import audit_log

        forced = []
        monkeypatch.setattr(audit_log.os, "fsync", forced.append)
        monkeypatch.setattr(audit_log, "INTERVAL", 0.05)
        log = AuditLog(path, fsync=fsync)
        for n in range(3):
            log.write([{"n": n}])
        time.sleep(0.5)
        assert (
            len(forced) in {"never": [0], "interval": [1, 2, 3], "always": [3]}[fsync]
        )  # an idle log is left alone
        log.close()

    def test_two_processes_cannot_write_one_log(self, path):
        log = AuditLog(path)
        with pytest.raises(OSError, match=r"Another process writes audit\.jsonl"):
            AuditLog(path)
        log.close()
        AuditLog(path).close()

    def test_a_rotation_that_fails_moves_nothing(self, path, monkeypatch):
        """No new file can be made, as on a disk without inodes: the older ones stay."""
        log = AuditLog(path, max_bytes=20, keep=3)
        for n in range(10):
            log.write([{"n": n}])
        before = {file: file.read_bytes() for file in path.parent.iterdir()}
        monkeypatch.setattr(log.sink, "_beside", lambda suffix: path.parent / "gone" / str(suffix))
        for _ in range(5):
            with pytest.raises(AuditUnavailable):
                log.write([{"n": "lost" * 9}])
        assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
        log.close()

    def test_threads_that_write_at_once_split_no_line_and_lose_none(self, path):
        log = AuditLog(path, max_bytes=2000, keep=100, fsync="always")

        def write(thread):
            for n in range(50):
                log.write([{"thread": thread, "n": n}])

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.close()
        kept = [
            row
            for file in path.parent.glob("audit.jsonl*")
            if file.suffix != ".salt"
            for row in lines(file)
        ]
        assert sorted((row["thread"], row["n"]) for row in kept) == [
            (thread, n) for thread in range(4) for n in range(50)
        ]

    def test_a_full_disk_loses_the_line_whole_and_goes_on_when_there_is_room(self, path):
        """A file-size limit fails a write in its middle, as a full disk does."""
        log = AuditLog(path)
        log.write([{"n": 0}])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            with pytest.raises(AuditUnavailable, match="audit log"):
                log.write([{"n": 1}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes().endswith(b"\n")
        log.write([{"n": 2}])
        assert [line["n"] for line in lines(path)] == [0, 2]
        assert log.lost == 1

    def test_prompts_are_named_by_a_salted_digest(self, path, tmp_path):
        first, other = AuditLog(path), AuditLog(tmp_path / "other.jsonl")
        first.close()
        prompt = Prompt("a text", history=(Message("user", "b"),))
        assert first.digest(prompt) == AuditLog(path).digest(Prompt(**vars(prompt) | {"id": "7"}))
        assert first.digest(prompt) != first.digest(Prompt("a text"))
        assert first.digest(prompt) != other.digest(prompt)
        salt = path.with_name("audit.jsonl.salt")
        assert stat.S_IMODE(salt.stat().st_mode) == 0o600

    @pytest.mark.parametrize("content", [b"ab", b"no hexadecimal digits, but long enough", b"\xff"])
    def test_a_damaged_salt(self, path, content):
        AuditLog(path).close()
        path.with_name("audit.jsonl.salt").write_bytes(content)
        with pytest.raises(OSError, match="holds no salt"):
            AuditLog(path)

    def test_a_file_that_others_may_read_is_taken_from_them(self, path):
        AuditLog(path).close()
        for file in (path, path.with_name("audit.jsonl.salt")):
            file.chmod(0o644)
        AuditLog(path).close()
        for file in (path, path.with_name("audit.jsonl.salt")):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_a_file_that_was_moved_goes_on_at_its_place_after_reopening(self, path):
        log = AuditLog(path)
        log.write([{"n": 1}])
        path.rename(path.with_name("moved"))
        log.write([{"n": 2}])
        log.reopen()
        log.write([{"n": 3}])
        log.close()
        assert [line["n"] for line in lines(path.with_name("moved"))] == [1, 2]
        assert [line["n"] for line in lines(path)] == [3]

    def test_a_file_that_was_truncated_goes_on_at_its_start(self, path):
        """As logrotate's ``copytruncate`` does; a failed write does not fill the gap with zeros."""
        log = AuditLog(path)
        log.write([{"n": 1, "text": "a" * 100}])
        os.truncate(path, 0)
        log.write([{"n": 2}])
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        try:
            with pytest.raises(AuditUnavailable):
                log.write([{"n": 3}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        log.write([{"n": 4}])
        log.close()
        assert [line["n"] for line in lines(path)] == [2, 4]

    def test_without_a_size_others_rotate(self, path):
        log = AuditLog(path, max_bytes=0)
        for n in range(100):
            log.write([{"n": n}])
        log.close()
        assert len(lines(path)) == 100


class TestStreams:
    def test_a_pipe_gets_every_line(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        found = []

        def read():
            with pipe.open() as file:
                found.extend(json.loads(line)["n"] for line in file)

        reader = threading.Thread(target=read)
        reader.start()
        log = _opened(pipe)
        for n in range(2000):
            log.write([{"n": n, "text": "a" * 100}])
        log.close()
        reader.join()
        assert found == list(range(2000))

    def test_a_pipe_that_nobody_reads_fails(self, tmp_path, monkeypatch):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with pytest.raises(OSError, match="No such device"):
            AuditLog(pipe)
        monkeypatch.setattr(audit_sinks, "PIPE_SECONDS", 0.1)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        log = AuditLog(pipe)
        with pytest.raises(AuditUnavailable):
            for _ in range(1000):
                log.write([{"text": "a" * 1000}])
        assert log.is_failing
        os.close(reader)
        log.close()

    def test_a_line_that_a_pipe_took_in_part_is_finished_before_the_next(
        self, tmp_path, monkeypatch
    ):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        monkeypatch.setattr(audit_sinks, "PIPE_SECONDS", 0.05)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        sink = audit_sinks.StreamSink(pipe)
        long = b"a" * (3 << 15) + b"\n"
        with pytest.raises(TimeoutError):
            sink.append(long + b"never begun\n")
        content = os.read(reader, 1 << 20)
        sink.append(b"next\n")
        content += os.read(reader, 1 << 20)
        assert content == long + b"next\n"
        sink.close()
        os.close(reader)

    def test_nobody_waits_for_a_pipe_that_just_took_no_line(self, tmp_path, monkeypatch):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        monkeypatch.setattr(audit_sinks, "PIPE_SECONDS", 0.05)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        log = AuditLog(pipe)
        with pytest.raises(AuditUnavailable, match="nobody reads"):
            log.write([{"text": "a" * (1 << 17)}])
        tries = []
        monkeypatch.setattr(log.sink, "append", tries.append)
        with pytest.raises(AuditUnavailable, match="not taken"):
            log.write([{"n": 1}])
        log.reject({"n": 2})
        assert tries == []
        monkeypatch.setattr(audit_log, "monotonic", lambda: time.monotonic() + 60)
        log.write([{"n": 3}])
        assert len(tries) == 1
        assert not log.is_failing
        os.close(reader)
        log.close()

    def test_standard_output(self, capfd):
        log = AuditLog("-")
        log.write([{"n": 1}])
        log.close()
        assert json.loads(capfd.readouterr().out) == {"n": 1}

    def test_the_syslog(self, tmp_path, monkeypatch):
        address = str(tmp_path / "log")
        monkeypatch.setattr(audit_sinks.SyslogSink.__init__, "__defaults__", (address,))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(address)
            log = AuditLog("syslog")
            log.write([{"n": 1}, {"n": 2}])
            found = [server.recv(1000) for _ in range(2)]
            log.close()
        assert found[0] == b'<134>latentguard: {"n": 1}'

    def test_a_line_that_is_too_long_for_the_syslog_is_not_cut(self, tmp_path, monkeypatch):
        """Nor are the lines before it written."""
        address = str(tmp_path / "log")
        monkeypatch.setattr(audit_sinks.SyslogSink.__init__, "__defaults__", (address,))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(address)
            log = AuditLog("syslog")
            with pytest.raises(AuditUnavailable, match="too long for the syslog"):
                log.write([{"n": 1}, {"text": "a" * 9000}])
            log.write([{"n": 2}])
            assert server.recv(1000) == b'<134>latentguard: {"n": 2}'
            log.close()

    def test_a_syslog_that_was_started_anew_gets_the_next_line(self, tmp_path):
        address = str(tmp_path / "log")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(address)
            sink = audit_sinks.SyslogSink(address)
        with pytest.raises(OSError, match="refused"):
            sink.append(b"lost\n")
        os.unlink(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
            server.bind(address)
            sink.append(b"next\n")
            assert server.recv(1000).endswith(b"next")
        sink.close()

    def test_a_slow_pipe_does_not_hold_up_other_requests(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        log = AuditLog(pipe, texts=True)
        assert log.may_block
        with running(audit=log) as url:
            fill = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(fill, b" " * 4096)
            body = {"input": passed()}
            waiting = threading.Thread(target=lambda: post(f"{url}/v1/moderations", json=body))
            waiting.start()
            for _ in range(10):
                assert get(f"{url}/healthz", timeout=2).status_code == 200
            os.set_blocking(reader, True)
            drained = threading.Thread(target=lambda: iter(lambda: os.read(reader, 65536), b"x"))
            os.read(reader, 1 << 20)
            waiting.join()
            drained.start()
            os.close(fill)
        os.close(reader)


def _opened(pipe):
    """A pipe can be opened once somebody reads it."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            return AuditLog(pipe)
        time.sleep(0.01)
    raise AssertionError("nobody reads")


class TestService:
    def test_a_line_for_each_verdict_without_a_text(self, path):
        with running(audit=path) as url:
            post(f"{url}/v1/moderations", json={"input": [passed(), flagged()]})
            chat = dict(messages=[{"role": "user", "content": flagged()}])
            post(f"{url}/v1/chat/completions", json=chat)
            answer = post(f"{url}/v1/score", json={"input": passed()})
            post(f"{url}/v1/moderations", json={"input": "long " * 900})
        written = lines(path)
        assert [line["endpoint"] for line in written] == [*["moderations"] * 2, "chat", "score"]
        assert [line["action"] for line in written] == ["score", "score", "block", "score"]
        (rejected,) = lines(path.with_name("audit.jsonl.rejected"))
        assert (rejected["endpoint"], rejected["error"]) == ("moderations", "too_large")
        assert [line["flagged"] for line in written[:4]] == [False, True, True, False]
        assert written[1]["prompt"] == written[2]["prompt"] != written[0]["prompt"]
        assert written[1]["score"] == pytest.approx(offline()[flagged()].score, abs=1e-4)
        assert written[3]["request"] == answer.headers["x-request-id"]
        assert passed()[:20] not in path.read_text() and flagged()[:20] not in path.read_text()

    def test_what_is_refused_leaves_a_line_elsewhere_without_a_text(self, path):
        """So that nobody can flush the history of verdicts; one line, whatever was refused."""
        picture = [{"type": "image_url", "image_url": {"url": "x"}}]
        chat = dict(messages=[dict(role="user", content=picture)])
        log = AuditLog(path, texts=True)
        with running(audit=log, keys=["k"], upstream="http://127.0.0.1:9/v1") as url:
            ask = functools.partial(post, headers={"authorization": "Bearer k"})
            post(f"{url}/v1/moderations", json={"input": "no key"})
            post(f"{url}/v1/chat/completions", json={"messages": []})
            ask(f"{url}/v1/moderations", json={"input": "long " * 9000})
            ask(f"{url}/v1/moderations", json={"input": 3})
            ask(f"{url}/v1/chat/completions", json=chat)
            get(f"{url}/healthz")
        assert path.read_text() == ""
        rejected = lines(path.with_name("audit.jsonl.rejected"))
        found = [(line["endpoint"], line.get("status") or line["error"]) for line in rejected]
        assert found == [
            ("moderations", 401),
            ("chat", 401),
            ("moderations", "too_large"),
            ("moderations", 400),
            ("chat", "invalid_request"),
        ]
        assert rejected[0]["address"] == "127.0.0.1"
        assert not any("text" in line for line in rejected)

    def test_the_clients_own_ids_are_logged(self, path):
        headers = {"x-request-id": "mine-7", "traceparent": "00-0af7-b7ad-01"}
        with running(audit=path) as url:
            post(f"{url}/v1/moderations", json={"input": passed()}, headers=headers)
        (line,) = lines(path)
        assert (line["client_request"], line["trace"]) == ("mine-7", "00-0af7-b7ad-01")

    def test_texts_if_asked(self, path):
        with running(audit=AuditLog(path, texts=True)) as url:
            post(f"{url}/v1/moderations", json={"input": passed()})
        assert lines(path)[0]["text"] == passed()

    @pytest.mark.parametrize("fsync", ["always", "never"])
    def test_no_verdict_leaves_unlogged_when_the_disk_is_full(self, tmp_path, fsync):
        full = tmp_path / "audit.jsonl"
        full.symlink_to("/dev/full")
        log = AuditLog(full, fsync=fsync)
        with running(audit=log) as url:
            for path, body in [
                ("moderations", {"input": passed()}),
                ("chat/completions", {"messages": [{"role": "user", "content": passed()}]}),
            ]:
                answer = post(f"{url}/v1/{path}", json=body)
                assert answer.status_code == 503
        assert log.lost == 2
