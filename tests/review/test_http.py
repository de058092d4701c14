"""The page's server: who may ask, what it sends, and what it writes."""

import contextlib
import json
import time

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from latentguard.errors import LatentGuardError
from latentguard.review.local import MAX_BODY, LocalServer
from review.desks import TEXTS, adapt, items, local, made_review

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
ANN = {"reviewer": "Ann"}


@contextlib.contextmanager
def desk(tmp_path, **how):
    """A client that has the token, and its server."""
    with local(made_review(tmp_path, **how)) as server:
        headers = {"authorization": f"Bearer {server.token}"}
        address = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=address, headers=headers, timeout=20) as client:
            client.port = server.port
            yield client


@pytest.fixture
def client(tmp_path):
    with desk(tmp_path) as made:
        yield made


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]


DATA = [("GET", "about"), ("GET", "tokens?key=1"), ("GET", "teach")]
DATA += [("POST", name) for name in ("next", "label", "undo", "teach")]


class TestWhoMayAsk:
    @pytest.mark.parametrize(("method", "path"), DATA)
    @pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", "Bearer \xe9"])
    def test_nothing_is_said_without_the_token(self, client, tmp_path, method, path, key):
        headers = {"authorization": key.encode("latin-1") if key else b""}
        body = ANN | {"key": "1", "label": "harmful"}
        how = {"json": body} if method == "POST" else {}
        answer = client.request(method, f"/review/{path}", headers=headers, **how)
        assert answer.status_code == 401
        assert rows(tmp_path) == []
        assert not any(text in answer.text for text in TEXTS)

    def test_the_token_in_the_address_of_a_request_is_no_token(self, client):
        token = client.headers["authorization"].removeprefix("Bearer ")
        answer = client.get(f"/review/about?token={token}", headers={"authorization": ""})
        assert answer.status_code == 401

    @pytest.mark.parametrize("name", ["evil.example", "evil.example:{port}", "127.0.0.1", ""])
    def test_other_names_are_refused_even_with_the_token(self, client, name):
        for path in ("/", "/review", "/review/about"):
            answer = client.get(path, headers={"host": name.format(port=client.port)})
            assert answer.status_code in (400, 403)

    def test_localhost_is_this_machine(self, client):
        headers = {"host": f"localhost:{client.port}"}
        assert client.get("/review/about", headers=headers).status_code == 200

    def test_no_other_page_may_ask(self, client):
        """The header that carries the token makes browsers ask first, and they are not allowed."""
        headers = {
            "origin": "https://evil.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = client.options("/review/label", headers=headers)
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in answer.headers

    def test_long_bodies_are_not_read(self, client):
        answer = client.post("/review/next", content=b" " * (MAX_BODY + 1))
        assert answer.status_code == 413
        answer = client.post("/review/next", content=iter([b"{}"]))
        assert answer.status_code == 413

    def test_it_listens_on_this_machine_alone(self, tmp_path):
        review = made_review(tmp_path)
        server = LocalServer(review)
        assert server._socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(LatentGuardError, match=r"cannot be had.*--port"):
            LocalServer(review, server.port)
        server._socket.close()
        review.session.labels.close()


class TestPage:
    @pytest.mark.parametrize("path", ["/", "/review", "/review/page.css", "/review/page.js"])
    def test_its_files_have_a_strict_policy_and_hold_nothing_of_anybody(self, client, path):
        answer = client.get(path, headers={"authorization": ""})
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"

    def test_the_page_has_no_script_of_its_own(self, client):
        page = client.get("/").text
        assert page.count("<script") == page.count('<script src="/review/page.js"') == 1
        assert "<style" not in page
        assert " style=" not in page
        assert "innerHTML" not in client.get("/review/page.js").text

    def test_markup_in_a_prompt_is_sent_as_json(self, tmp_path):
        with desk(tmp_path, kept=items(["<script>alert(1)</script>"], [0.0])) as client:
            answer = client.post("/review/next", json=ANN)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["item"]["text"] == "<script>alert(1)</script>"


class TestLabelling:
    def test_a_label_is_written_and_the_next_prompt_comes(self, client, tmp_path):
        first = client.post("/review/next", json=ANN).json()["item"]
        answer = client.post(
            "/review/label", json=ANN | dict(key=first["key"], label="harmless")
        ).json()
        assert answer["labelled"]["label"] == "harmless"
        assert answer["item"]["text"] == TEXTS[1]
        assert answer["counts"]["harmless"] == 1
        (row,) = rows(tmp_path)
        assert row["text"] == TEXTS[0]
        assert (row["label"], row["score"], row["guard"]) == ("harmless", 0.4, "0" * 12)

    def test_undo(self, client, tmp_path):
        first = client.post("/review/next", json=ANN).json()["item"]
        client.post("/review/label", json=ANN | dict(key=first["key"], label="harmful"))
        answer = client.post("/review/undo", json=ANN).json()
        assert answer["item"]["key"] == first["key"]
        assert answer["counts"]["harmful"] == 0
        assert [row["label"] for row in rows(tmp_path)] == ["harmful", None]
        again = client.post("/review/undo", json=ANN)
        assert again.status_code == 409
        assert "nothing to undo" in again.json()["error"]["message"]

    def test_tokens_are_those_of_the_prompt(self, client):
        key = client.post("/review/next", json=ANN).json()["item"]["key"]
        tokens = client.get(f"/review/tokens?key={key}").json()["tokens"]
        assert "".join(text for text, _ in tokens) == TEXTS[0]

    @pytest.mark.parametrize(
        "change",
        [
            {"label": "evil"},
            {"label": None},
            {"reviewer": " "},
            {"reviewer": "a\nb"},
            {"reviewer": "a" * 81},
            {"which": "mine"},
            {"extra": 1},
        ],
        ids=str,
    )
    def test_odd_requests_are_refused_in_words(self, client, tmp_path, change):
        key = client.post("/review/next", json=ANN).json()["item"]["key"]
        body = ANN | dict(key=key, label="harmful") | change
        answer = client.post("/review/label", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
        assert rows(tmp_path) == []

    def test_a_prompt_that_is_not_there(self, client):
        answer = client.post("/review/label", json=ANN | dict(key="0", label="harmful"))
        assert answer.status_code == 404
        assert "not in the list any more" in answer.json()["error"]["message"]

    def test_a_label_that_cannot_be_written_is_said(self, client, tmp_path, monkeypatch):
        key = client.post("/review/next", json=ANN).json()["item"]["key"]

        def fail(_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.fsync", fail)
        answer = client.post("/review/label", json=ANN | dict(key=key, label="harmful"))
        assert answer.status_code == 503
        assert "cannot be written: Input/output error" in answer.json()["error"]["message"]
        assert rows(tmp_path) == []


def taught(client):
    """How the teaching ended."""
    deadline = time.monotonic() + 20
    while (state := client.get("/review/teach").json())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return state


def label_some(client, count):
    for _ in range(count):
        key = client.post("/review/next", json=ANN).json()["item"]["key"]
        client.post("/review/label", json=ANN | dict(key=key, label="harmless"))


class TestTeaching:
    def test_it_shows_before_and_after_and_offers_the_guard(self, client, tmp_path):
        label_some(client, 3)
        assert client.post("/review/teach", json={}).json()["state"] in ("running", "done")
        state = taught(client)
        assert state["state"] == "done"
        assert state["tables"][0]["columns"] == ["what", "before", "after"]
        assert state["folder"] == str(tmp_path / "labels-guard")
        assert state["command"] == f"latentguard serve {tmp_path / 'labels-guard'}"
        assert (tmp_path / "labels-guard" / "guard.json").read_text() == "3"

    def test_an_earlier_guard_is_kept(self, client, tmp_path):
        label_some(client, 2)
        for folder in ("labels-guard", "labels-guard-2", "labels-guard-3"):
            client.post("/review/teach", json={})
            assert taught(client)["folder"] == str(tmp_path / folder)

    def test_too_few_labels_are_said(self, client):
        assert client.post("/review/teach", json={}).status_code == 409
        label_some(client, 1)
        client.post("/review/teach", json={})
        state = taught(client)
        assert (state["state"], state["error"]) == (
            "failed",
            "Adapting needs at least 2 labels; found 1.",
        )

    def test_disagreements_are_left_out(self, client):
        label_some(client, 3)
        key = client.post("/review/next", json={"reviewer": "Ben"}).json()["item"]["key"]
        body = {"reviewer": "Ben", "key": key, "label": "harmful"}
        client.post("/review/label", json=body)
        client.post("/review/teach", json={})
        assert taught(client)["labels"] == 2

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_an_unexpected_error_ends_the_run_in_words(self, tmp_path):
        def broken(_):
            raise ZeroDivisionError

        with desk(tmp_path, adapt=broken) as client:
            label_some(client, 1)
            client.post("/review/teach", json={})
            assert "not expected" in taught(client)["error"]

    def test_one_run_at_a_time(self, tmp_path):
        def slow(prompts):
            time.sleep(0.5)
            return adapt(prompts)

        with desk(tmp_path, adapt=slow) as client:
            label_some(client, 2)
            client.post("/review/teach", json={})
            assert client.post("/review/teach", json={}).status_code == 409
            assert taught(client)["state"] == "done"

    def test_a_guard_that_cannot_be_adapted(self, tmp_path):
        with desk(tmp_path, adapt=None) as client:
            assert client.get("/review/about").json()["can_teach"] is False
            assert client.post("/review/teach", json={}).status_code == 409
