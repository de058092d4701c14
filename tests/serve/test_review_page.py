"""The review page of the service: off by default, for admins alone, recent prompts in memory."""

import json
import threading
import time

import pytest

from latentguard.data.prompt_files import read_prompts
from latentguard.errors import LatentGuardError
from latentguard.guard.latent_guard import LatentGuard
from latentguard.serve import review as review_module
from review.desks import FakeAdaptation, FakeGuard
from serve.running import flagged, get, offline, passed, post, running, tiny_guard

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
ADMIN = {"authorization": "Bearer admin-key"}
ANN = {"reviewer": "Ann"}


@pytest.fixture
def labels(tmp_path):
    return tmp_path / "labels.jsonl"


@pytest.fixture
def url(labels):
    with running(keys=["client"], admin_key="admin-key", review_labels=labels) as made:
        yield made


def ask(url, text):
    """Score a text as a client does."""
    client = {"authorization": "Bearer client"}
    answer = post(f"{url}/v1/score", json={"input": text}, headers=client)
    assert answer.status_code == 200


def next_item(url, **how):
    answer = post(f"{url}/review/next", json=ANN | how, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()["item"]


def label(url, key, word):
    body = ANN | dict(key=key, label=word)
    return post(f"{url}/review/label", json=body, headers=ADMIN)


class TestWhoMaySeeIt:
    @pytest.mark.parametrize("keys", [(), ("client",)])
    def test_without_the_option_there_is_no_page(self, keys):
        with running(keys=keys, admin_key="admin-key") as url:
            for path in ("review", "review/page.js", "review/about"):
                assert get(f"{url}/{path}", headers=ADMIN).status_code == 404
                assert get(f"{url}/{path}").status_code == 404
            assert url.server.service.review is None

    @pytest.mark.parametrize("key", ["", "Bearer client", "Bearer admin", "admin-key"])
    def test_only_the_admin_key_opens_it(self, url, labels, key):
        ask(url, flagged())
        shown = {"authorization": key} if key else {}
        assert get(f"{url}/review", headers=shown).status_code == 200  # nothing is in it
        for path in ("about", "teach", "tokens?key=1"):
            assert get(f"{url}/review/{path}", headers=shown).status_code == 401
        for path in ("next", "label", "undo", "teach"):
            body = ANN | dict(key="1", label="harmful")
            answer = post(f"{url}/review/{path}", json=body, headers=shown)
            assert answer.status_code == 401
            assert flagged() not in answer.text
        assert labels.read_text() == ""

    def test_the_admin_key_is_no_clients_key(self, url):
        answer = post(f"{url}/v1/score", json={"input": passed()}, headers=ADMIN)
        assert answer.status_code == 401

    def test_it_needs_an_admin_key(self, labels):
        with (
            pytest.raises(LatentGuardError, match="set LATENTGUARD_ADMIN_KEY"),
            running(review_labels=labels),
        ):
            pass

    def test_it_is_not_in_the_openapi_document(self, url):
        assert "/review" not in get(f"{url}/openapi.json", headers=ADMIN | CLIENT).text


CLIENT = {"authorization": "Bearer client"}


class TestReviewing:
    def test_what_was_scored_is_labelled(self, url, labels):
        ask(url, flagged())
        ask(url, passed())
        item = next_item(url)
        assert item["text"] == flagged()
        assert item["score"] == pytest.approx(offline()[flagged()].score, abs=1e-3)
        assert item["decision"] == "block"
        assert label(url, item["key"], "harmful").json()["item"]["text"] == passed()
        label(url, next_item(url)["key"], "harmless")
        assert next_item(url) is None
        assert [(p.text, p.harmful) for p in read_prompts(labels)] == [
            (flagged(), True),
            (passed(), False),
        ]
        row = json.loads(labels.read_text().splitlines()[0])
        assert row["guard"] == tiny_guard().digest[:12]

    def test_of_a_chat_the_text_that_decided_comes(self, url):
        turns = [
            {"role": "user", "content": flagged()},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": passed()},
        ]
        answer = post(f"{url}/v1/moderations", json={"messages": turns}, headers=CLIENT)
        assert answer.status_code == 200
        assert next_item(url)["text"] == flagged()

    def test_the_tokens_speak(self, url):
        ask(url, flagged())
        key = next_item(url)["key"]
        answer = get(f"{url}/review/tokens?key={key}", headers=ADMIN)
        assert "".join(text for text, _ in answer.json()["tokens"]) == flagged()

    def test_only_recent_prompts_are_kept(self, labels, monkeypatch):
        monkeypatch.setattr(review_module, "RECENT", 2)
        with running(admin_key="admin-key", review_labels=labels) as url:
            for text in ("One?", "Two?", "Three?"):
                post(f"{url}/v1/score", json={"input": text})
            counts = post(f"{url}/review/next", json=ANN, headers=ADMIN).json()["counts"]
        assert counts["total"] == 2

    def test_half_a_character_does_no_harm(self, url):
        answer = post(f"{url}/v1/score", content=b'{"input": "odd \\ud800"}', headers=CLIENT)
        assert answer.status_code in (200, 400)
        ask(url, passed())
        assert next_item(url)["text"] == passed()

    def test_two_processes_do_not_share_a_label_file(self, url, labels):
        with (
            pytest.raises(LatentGuardError, match="Another process writes"),
            running(admin_key="admin-key", review_labels=labels),
        ):
            pass


def read_all(guard, prompts, *, name):
    """Stands for adapting: reads every prompt with the guard's model, on this thread."""
    assert threading.current_thread().name == "teach"
    scores = [verdict.score for verdict in guard.scan(guard.model, prompts)]
    assert scores == pytest.approx([offline()[p.text].score for p in prompts], abs=1e-3)
    return FakeAdaptation(FakeGuard(len(prompts)))


def test_teaching_reads_on_the_scoring_thread(labels, monkeypatch, tmp_path):
    monkeypatch.setattr(LatentGuard, "adapt", read_all, raising=False)
    texts = list(offline())[:20]
    with running(admin_key="admin-key", review_labels=labels) as url:
        post(f"{url}/v1/score", json={"input": texts})
        while (item := next_item(url)) is not None:
            label(url, item["key"], "harmless")
        assert get(f"{url}/review/about", headers=ADMIN).json()["can_teach"]
        post(f"{url}/review/teach", json={}, headers=ADMIN)
        deadline = time.monotonic() + 60
        while (state := get(f"{url}/review/teach", headers=ADMIN).json())["state"] == "running":
            assert post(f"{url}/v1/score", json={"input": "And now?"}).status_code == 200
            assert time.monotonic() < deadline
    assert state["state"] == "done", state
    assert (tmp_path / "labels-guard" / "guard.json").read_text() == "20"
