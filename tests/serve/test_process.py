"""The command in a process of its own: signals, crashes, exit codes, restarts."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time

import httpx
import pytest

from guard_files import edit_guard
from latentguard.serve import server
from latentguard.serve.config import ServeConfig
from serve.running import (
    Nursery,
    band_guard,
    flagged,
    get,
    offline,
    opener,
    passed,
    post,
    reviewed,
    tiny_guard,
    wait_ready,
)
from serve.shadow_guards import contrary
from serve.test_operations import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("guard")
    tiny_guard().save(where)
    return where


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture
def url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def port(url):
    return ["--port", url.rsplit(":", 1)[1]]


def under_load(url, answers, stop):
    while not stop.is_set():
        try:
            answer = post(f"{url}/v1/moderations", json={"input": [flagged(), passed()]})
            answers.append(answer)
        except httpx.HTTPError:
            time.sleep(0.1)


def test_kill_9_under_load_and_restart(nursery, folder, url, tmp_path):
    """No wrong verdict before, none after; the audit log has whole lines, all that was told."""
    audit, answers, stop = tmp_path / "audit.jsonl", [], threading.Event()
    flagged()  # known before the threads ask: making the model draws from one generator
    clients = [threading.Thread(target=under_load, args=(url, answers, stop)) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        for _ in range(2):
            with nursery.process(folder, *port(url), "--audit", audit) as child:
                wait_ready(url)
                before = len(answers)
                while len(answers) < before + 20:
                    time.sleep(0.01)
                child.kill(signal.SIGKILL)
                child.wait()
                with audit.open("a") as torn:  # as if the kernel had stopped in a line
                    torn.write('{"time": "2026-')
        with nursery.process(folder, *port(url), "--audit", audit) as child:
            wait_ready(url)
            before = len(answers)
            while len(answers) < before + 5:
                time.sleep(0.01)
            stop.set()
            child.kill(signal.SIGTERM)
            assert child.wait() == 0, child.stderr
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    told = [answer for answer in answers if answer.status_code == 200]
    assert len(told) >= 45
    for answer in told:
        assert [r["flagged"] for r in answer.json()["results"]] == [True, False]
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    logged = {line["request"] for line in lines}
    assert {answer.headers["x-request-id"] for answer in told} <= logged


def test_sigterm_lets_requests_finish(nursery, folder, url):
    with nursery.process(folder, *port(url)) as child:
        wait_ready(url)
        answers = []
        ask = threading.Thread(
            target=lambda: answers.append(post(f"{url}/v1/moderations", json={"input": "SLOW"}))
        )
        ask.start()
        time.sleep(0.25)
        child.kill(signal.SIGTERM)
        ask.join()
        assert child.wait() == 0
    assert answers[0].status_code == 200


@pytest.fixture
def keys_that_are_long_in_coming(tmp_path):
    """A pipe as file of keys, and what waits until it is being read."""
    fifo = tmp_path / "keys"
    os.mkfifo(fifo)
    writers = []

    def wait():
        until = time.monotonic() + 60
        while not writers and time.monotonic() < until:
            with contextlib.suppress(OSError):  # nobody reads it yet
                writers.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            time.sleep(0.01)
        assert writers

    yield fifo, wait
    for writer in writers:
        os.close(writer)


def test_sigterm_ends_it_before_it_serves(nursery, folder, url, keys_that_are_long_in_coming):
    fifo, wait = keys_that_are_long_in_coming
    with nursery.process(folder, *port(url), "--api-keys", fifo) as child:
        wait()
        child.kill(signal.SIGHUP)
        time.sleep(0.1)
        child.kill(signal.SIGTERM)
        assert child.wait() == 0, child.stderr


def test_signals_do_nothing_once_it_has_ended():
    """Between the last request and the exit code they would kill."""
    made = server.create_server(opener, ServeConfig())
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    async def serve_nobody():
        with made.capture_signals():
            assert all(callable(signal.getsignal(number)) for number in numbers)

    try:
        asyncio.run(serve_nobody())
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_dead_thread_ends_the_process_with_a_failure(nursery, folder, url):
    with nursery.process(folder, *port(url)) as child:
        wait_ready(url)
        assert post(f"{url}/v1/moderations", json={"input": "DIE"}).status_code == 503
        assert child.wait() == 1
        assert "scoring thread ended" in child.stderr


def test_a_guard_that_does_not_match_its_model(nursery, folder, url, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit_guard(tmp_path, lambda record: record["fingerprint"].update(weights="0" * 64))
    with nursery.process(tmp_path, *port(url)) as child:
        assert child.wait() == 1
        assert re.search("weights .* instead of", child.stderr)


def _of_another_model(record):
    record["fingerprint"]["weights"] = "0" * 64
    for canary in record["canaries"]:
        canary["score"] -= 2 * record["spread"]
        canary["flagged"] = canary["score"] > record["threshold"]


def test_another_model_is_allowed_by_name(nursery, url, tmp_path):
    """The shift is logged, the promise is gone, and the canaries count as they score now."""
    band_guard().save(tmp_path)
    edit_guard(tmp_path, _of_another_model)
    with nursery.process(tmp_path, *port(url), "--allow-mismatch") as child:
        wait_ready(url)
        assert "scores of 8 canary prompts moved by +2.00 standard deviations" in child.stderr
        assert "Nothing is promised of it here" in child.stderr
        assert "nothing is promised" in get(f"{url}/v1/guard").json()["promise"]
        assert post(f"{url}/v1/moderations", json={"input": "BREAK"}).status_code == 503
        assert get(f"{url}/readyz").status_code == 200
        (result,) = post(f"{url}/v1/moderations", json={"input": reviewed()}).json()["results"]
        assert result["latentguard"]["decision"] == "review"
        assert get(f"{url}/metrics").text.count("latentguard_score_bucket") == 10  # its deciles


def test_its_own_model_is_not_called_another(nursery, folder, url):
    with nursery.process(folder, *port(url), "--allow-mismatch") as child:
        wait_ready(url)
        assert "Not the guard's own model" not in child.stderr


def test_a_port_in_use_is_said_before_anything_is_loaded(nursery, folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = str(other.getsockname()[1])
        with nursery.process(folder, "--port", number) as child:
            assert child.wait() == 1
        assert f"Cannot listen on 127.0.0.1, port {number} (Address already in use)" in child.stderr
        assert "Serving" not in child.stderr


def test_run_says_that_it_cannot_listen(caplog):
    """And promises an exit code: whoever calls it is not ended by an exception."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        loaded = []
        how = dict(host="127.0.0.1", port=other.getsockname()[1])
        made = server.create_server(lambda: loaded.append(1), ServeConfig(), **how)
        assert server.run(made) == 1
    assert "Stopped: Cannot listen" in caplog.text
    assert not loaded


def test_a_free_port_is_told(nursery, folder):
    with nursery.process(folder, "--port", "0") as child:
        until = time.monotonic() + 20
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", child.stderr)):
            assert time.monotonic() < until, child.stderr
            time.sleep(0.02)
        assert found[1] != "0"
        wait_ready(found[0])
        child.kill(signal.SIGTERM)
        assert child.wait() == 0


def test_keys_come_from_the_environment(nursery, folder, url):
    known = {"LATENTGUARD_API_KEYS": "secret"}
    with nursery.process(folder, *port(url), environment=known):
        wait_ready(url)
        body = {"input": flagged()}
        assert post(f"{url}/v1/moderations", json=body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        answer = post(f"{url}/v1/moderations", json=body, headers=headers).json()
    assert answer["results"][0]["latentguard"]["score"] == pytest.approx(
        offline()[flagged()].score, abs=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "maybe"], "maybe"),
        (["--on-review", "maybe"], "is not one of"),
        (["--on-review", "block", "--policy", "shadow"], "answers even flagged"),
        (["--api-keys", "/nowhere"], "nowhere"),
        (["--upstream", "localhost:8000/v1"], "expected a URL"),
        (["--queue", "0"], "queue"),
        (["--port", "65536"], "port"),
    ],
)
def test_wrong_options_are_said(nursery, folder, arguments, said):
    with nursery.process(folder, *arguments) as child:
        assert child.wait() in (1, 2)
        assert said in child.stderr


def test_sighup_reads_guards_and_keys_anew(nursery, url, tmp_path):
    folder, keys = tmp_path / "guard", tmp_path / "keys"
    tiny_guard().save(folder)
    keys.write_text("old")

    def ask(key):
        headers = {"authorization": f"Bearer {key}"}
        return post(f"{url}/v1/moderations", json={"input": passed()}, headers=headers)

    def signal_and_wait(child, *words):
        child.kill(signal.SIGHUP)
        until = time.monotonic() + 20
        while not all(word in child.stderr for word in words):
            assert time.monotonic() < until, child.stderr
            time.sleep(0.02)

    with nursery.process(folder, *port(url), "--api-keys", keys) as child:
        wait_ready(url)
        before = ask("old").json()["model"]
        band_guard().save(folder)
        keys.write_text("old\nnew")
        signal_and_wait(child, "were read anew: default", band_guard().digest[:12])
        answer = ask("new").json()
        assert answer["model"] == f"latentguard-{band_guard().digest[:12]}" != before
        (folder / "guard.safetensors").write_bytes(b"rubbish")
        signal_and_wait(child, "stay as they were", "guard.safetensors is damaged")
        assert ask("new").json()["model"] == answer["model"]
        child.kill(signal.SIGTERM)
        assert child.wait() == 0


def test_lines_on_standard_error_are_objects(nursery, folder, url):
    with nursery.process(folder, *port(url), "--log-format", "json") as child:
        wait_ready(url)
        assert post(f"{url}/v1/moderations", json={"input": "BREAK"}).status_code == 503
        child.kill(signal.SIGTERM)
        assert child.wait() == 0
    lines = [json.loads(line) for line in child.stderr.splitlines()]
    serving, ready, crashed, *_ = [one for one in lines if one["logger"] == "latentguard.serve"]
    assert serving["message"].startswith(f"Serving {folder} on {url}")
    assert ready["level"] == "info"
    assert ready["message"].startswith(f"Ready: guard default {tiny_guard().digest[:12]} on ")
    assert (crashed["level"], "crashed" in crashed["message"]) == ("error", True)
    assert all(one["time"].endswith("+00:00") for one in lines)


def test_a_shadow_guard_is_promoted_until_the_process_is_started_anew(
    nursery, folder, url, tmp_path
):
    """GUARD decides, POST /promote lets the other decide, and a restart uses the command line."""
    tiny_guard().save(folder)
    contrary().save(tmp_path / "new")
    health = f"http://127.0.0.1:{free_port()}"
    audit = tmp_path / "audit.jsonl"
    options = ["--shadow", tmp_path / "new", "--health-port", health.rsplit(":", 1)[1]]
    start = (folder, *port(url), *options, "--audit", audit)
    admin = {"authorization": "Bearer admin"}

    def is_flagged():
        answer = post(f"{url}/v1/moderations", json={"input": flagged()}).json()
        return answer["results"][0]["flagged"]

    for _ in range(2):
        with nursery.process(*start, environment={"LATENTGUARD_ADMIN_KEY": "admin"}) as child:
            wait_ready(url)
            assert f"shadow {contrary().digest[:12]}" in child.stderr
            assert is_flagged() is True
            assert post(f"{health}/promote", headers=admin).json()["decides"]["folder"] == "new"
            assert is_flagged() is False
            assert post(f"{health}/reload", headers=admin).text == "reloaded"
            assert is_flagged() is False
            assert post(f"{health}/rollback", headers=admin).status_code == 200
            assert is_flagged() is True
            assert post(f"{health}/promote", headers=admin).status_code == 200
            child.kill(signal.SIGTERM)
            assert child.wait() == 0
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    decided = [(line["folder"], line["decision"], line["shadow"]["decision"]) for line in lines]
    mine, new = (folder.name, "block", "allow"), ("new", "allow", "block")
    assert decided == [mine, new, new, mine] * 2
