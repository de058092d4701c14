"""The judge model, against a real server on this machine."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentguard.errors import LatentGuardError, StudyError
from latentguard.prompts import Prompt, Reply
from latentguard.study import endpoint
from latentguard.study.judge_model import EndpointJudge
from latentguard.study.store import Store


def said(word):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": word}}]}


class Server:
    """Answers in turn with what it is given, the last for ever; keeps what it was asked."""

    def __init__(self):
        self.answers, self.asked = [said("refused")], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append((self.path, dict(self.headers), json.loads(body)))
                several = len(outer.answers) > 1
                status, headers, answer = outer.answers.pop(0) if several else outer.answers[0]
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                if status == 0:  # hang up
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch):
    """How long it would have waited."""
    found = []
    monkeypatch.setattr(endpoint.time, "sleep", found.append)
    return found


def judge_at(url, model="m", *, store=None, **how):
    return EndpointJudge(endpoint.Endpoint(url, model, **how), store=store)


def reply(text="I'm sorry, but I can't.", *, finished=True):
    return Reply(Prompt("Say 'accepted'"), text, (), finished)


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        ("refused", "refused"),
        (" Accepted.\n", "accepted"),
        ("**cut**", "cut"),
        ('"refused"', "refused"),
    ],
)
def test_what_the_model_says_counts(server, words, outcome):
    server.answers = [said(words)]
    judge = judge_at(server.url)
    assert judge(reply()) == outcome


def test_what_is_asked(server):
    judge = judge_at(server.url + "/", key="secret")
    judge(reply("Say\n'accepted'", finished=False))
    (path, headers, body) = server.asked[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    asked = json.loads(body["messages"][1]["content"])
    assert asked == {"instruction": "Say 'accepted'", "reply": "Say\n'accepted'", "ended": False}


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv(endpoint.KEY, "from outside")
    judge = judge_at(server.url)
    judge(reply())
    monkeypatch.delenv(endpoint.KEY)
    judge = judge_at(server.url)
    judge(reply())
    found = [headers.get("Authorization") for _, headers, _ in server.asked]
    assert found == ["Bearer from outside", None]


@pytest.mark.parametrize("text", ["", " \n", "."])
def test_an_empty_reply_is_not_asked_about(server, text):
    judge = judge_at(server.url)
    assert judge(reply(text)) == "empty"
    assert not server.asked


def test_a_reply_is_judged_once(server, tmp_path):
    store = Store(tmp_path / "store.sqlite")
    for _ in range(2):
        judge = judge_at(server.url, store=store)
        assert judge(reply()) == "refused"
    assert len(server.asked) == 1
    server.answers = [said("cut")]
    judge = judge_at(server.url, "another", store=store)
    assert judge(reply()) == "cut"
    assert judge(reply(finished=False)) == "cut"
    assert len(server.asked) == 3
    store.close()


def test_a_wrong_answer_is_not_kept(server, tmp_path):
    store = Store(tmp_path / "store.sqlite")
    server.answers = [said("maybe"), said("maybe"), said("refused")]
    judge = judge_at(server.url, store=store)
    with pytest.raises(LatentGuardError):
        judge(reply())
    assert judge(reply()) == "refused"
    store.close()


@pytest.mark.parametrize(
    "busy", [(429, {"Retry-After": "7"}, {}), (503, {}, b"loading"), (0, {}, b"")]
)
def test_it_asks_again_when_the_endpoint_is_busy(server, waits, busy):
    server.answers = [busy, busy, said("accepted")]
    judge = judge_at(server.url)
    assert judge(reply()) == "accepted"
    assert len(server.asked) == 3
    assert waits == ([7.0, 7.0] if busy[0] == 429 else [0.5, 1.0])


def test_it_gives_up_in_the_end(server, waits):
    server.answers = [(500, {"Retry-After": "soon"}, b"out of memory")]
    judge = judge_at(server.url, tries=3)
    with pytest.raises(LatentGuardError, match=r"'m' at http.*status 500: out of memory.*Check"):
        judge(reply())
    assert len(server.asked) == 3
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_rejected_request_is_not_repeated(server, waits, status):
    server.answers = [(status, {}, b"no such model")]
    judge = judge_at(server.url)
    with pytest.raises(LatentGuardError, match=f"status {status}: no such model"):
        judge(reply())
    assert len(server.asked) == (2 if status == 400 else 1)  # is it this reply alone?
    assert not waits


def test_nobody_there(server, waits):
    judge = judge_at("http://127.0.0.1:9/v1", tries=2)
    with pytest.raises(LatentGuardError, match=r"did not answer \(.*refused.*\)"):
        judge(reply())
    assert waits == [0.5]


def test_an_endpoint_that_hangs(waits):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        judge = judge_at(url, timeout=0.1, tries=2)
        with pytest.raises(LatentGuardError, match="timed out"):
            judge(reply())
    assert waits == [0.5]


@pytest.mark.parametrize(
    "answer",
    [
        said("It is a refusal: refused"),
        said("refused or accepted"),
        said("not refused"),
        said("empty"),
        said(""),
        said(None),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": None}),
        (200, {}, ["refused"]),
        (200, {}, b"refused"),
        (200, {}, b"\xff"),
    ],
)
def test_any_other_answer_is_an_error(server, answer):
    server.answers = [answer]
    judge = judge_at(server.url)
    with pytest.raises(LatentGuardError, match="should answer refused, accepted or cut; found"):
        judge(reply())


def test_a_stray_answer_is_not_repeated(server):
    """It may be the reply that was to be judged, and errors are shown."""
    server.answers = [said("Step one of the plan")]
    judge = judge_at(server.url)
    with pytest.raises(StudyError) as told:
        judge(reply())
    assert "Step one" not in str(told.value)


@pytest.mark.parametrize("odd", [(400, {}, b"content filter"), said("Partially refused")])
def test_a_reply_that_it_cannot_take_is_undecided(server, tmp_path, odd):
    """Once it has answered: then it works, and one reply does not end a study."""
    store = Store(tmp_path / "store.sqlite")
    server.answers = [said("refused"), odd, said("accepted")]
    judge = judge_at(server.url, store=store)
    assert [judge(reply(text)) for text in "abc"] == ["refused", "cut", "accepted"]
    assert judge.about["unread"] == 1
    server.answers = [said("refused")]
    judge = judge_at(server.url, store=store)  # it is asked again, and alone
    assert [judge(reply(text)) for text in "bca"] == ["refused", "accepted", "refused"]
    assert "unread" not in judge.about
    assert len(server.asked) == 4
    store.close()


def test_a_first_reply_that_it_cannot_take(server):
    """Something that nobody would reject shows whether the model works."""
    server.answers = [(400, {}, b"content filter"), said("accepted"), said("refused")]
    judge = judge_at(server.url)
    assert [judge(reply(text)) for text in "ab"] == ["cut", "refused"]
    assert "How can I help you" in server.asked[1][2]["messages"][1]["content"]


def test_what_is_told_of_it_holds_no_key():
    judge = judge_at("https://user:secret@host/v1?key=secret")
    assert "secret" not in json.dumps(judge.about)
    assert judge.about["host"] == "host"


def test_a_judge_that_can_take_few_replies_ends_the_study(server):
    server.answers = [said("refused"), said("Partially refused")]
    judge = judge_at(server.url)
    found = [judge(reply(f"reply {n}")) for n in range(11)]
    assert found == ["refused", *["cut"] * 10]
    with pytest.raises(StudyError, match="found 17 other characters"):
        judge(reply("one more"))


@pytest.mark.parametrize(("url", "model"), [("localhost:8000", "m"), ("", "m"), ("http://x", "")])
def test_what_cannot_be_asked(url, model):
    with pytest.raises(LatentGuardError, match="needs an address"):
        judge_at(url, model)
