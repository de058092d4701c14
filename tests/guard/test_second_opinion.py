"""Second opinions: guards, guard models, and endpoints against a stand-in server."""

import pytest

from fake_backend import FakeBackend, labelled
from guard.opinion_server import llama_guard, moderation, opinion_server
from latentguard.errors import GuardError, LatentGuardError, ModelError
from latentguard.guard import second_opinion
from latentguard.guard.latent_guard import LatentGuard
from latentguard.guard.second_opinion import (
    EndpointOpinion,
    GuardModelOpinion,
    GuardOpinion,
    open_second_opinion,
)
from latentguard.models.guard_models import is_unsafe_reply
from latentguard.prompts import Message, Prompt

BAD, GOOD = Prompt("a bad thing", id="1"), Prompt("a good thing", id="2")


class TestEndpoints:
    def test_a_moderation_endpoint(self):
        with opinion_server() as server:
            second = open_second_opinion(f"{server.url}/moderations#omni")
            assert [score > 0 for score in second.score([BAD, GOOD])] == [True, False]
            bodies = sorted((path, body["input"], body["model"]) for path, _, body in server.asked)
        assert bodies == [
            ("/v1/moderations", BAD.text, "omni"),
            ("/v1/moderations", GOOD.text, "omni"),
        ]

    def test_a_model_need_not_be_named_for_moderations(self):
        with opinion_server() as server:
            open_second_opinion(f"{server.url}/moderations").score([BAD])
            assert server.asked[0][2] == {"input": BAD.text}

    def test_a_guard_model_behind_a_chat_endpoint(self):
        with opinion_server(llama_guard) as server:
            second = open_second_opinion(f"{server.url}#meta/guard")
            assert [score > 0 for score in second.score([BAD, GOOD])] == [True, False]
            path, _, body = server.asked[0]
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("meta/guard", 0)

    def test_a_chat_is_sent_with_its_history(self):
        chat = Prompt("bad", history=(Message("user", "Hi."), Message("assistant", "Yes?")))
        with opinion_server(llama_guard) as server:
            EndpointOpinion(f"{server.url}#m").score([chat])
            assert [m["role"] for m in server.asked[0][2]["messages"]] == [
                "user",
                "assistant",
                "user",
            ]
        with opinion_server() as server:
            EndpointOpinion(f"{server.url}/moderations").score([chat])
            assert server.asked[0][2]["input"] == "Hi.\n\nYes?\n\nbad"

    def test_the_key_comes_from_the_environment(self, monkeypatch):
        monkeypatch.setenv(second_opinion.KEY, "secret")
        with opinion_server() as server:
            second = EndpointOpinion(f"{server.url}/moderations")
            second.score([GOOD])
            assert server.asked[0][1] == "Bearer secret"
        assert "secret" not in second.name

    @pytest.mark.parametrize(
        "reply", [500, 429, b"no JSON", [], {"results": []}, {"results": [{"flagged": "yes"}]}]
    )
    def test_one_that_fails_says_so_of_each_prompt(self, reply):
        with opinion_server(lambda body: reply) as server:
            second = EndpointOpinion(f"{server.url}/moderations")
            assert second.score([BAD, GOOD]) == [None, None]
            with pytest.raises(GuardError, match=r"does not answer .* Check the address"):
                second.load()

    def test_one_that_is_not_there(self):
        with opinion_server() as server:
            url = f"{server.url}/moderations"
        assert EndpointOpinion(url).score([BAD]) == [None]

    def test_one_that_is_slow(self, monkeypatch):
        import threading

        monkeypatch.setattr(second_opinion, "SECONDS", 0.05)
        release = threading.Event()

        def reply(body):
            release.wait(10)
            return moderation(body)

        with opinion_server(reply) as server:
            assert EndpointOpinion(f"{server.url}/moderations").score([BAD]) == [None]
            release.set()

    def test_a_chat_model_that_is_no_guard_model(self):
        def reply(body):
            return {"choices": [{"message": {"content": "No, I can't help with that."}}]}

        with opinion_server(reply) as server:
            assert EndpointOpinion(f"{server.url}#any").score([BAD]) == [None]

    def test_texts_stay_out_of_the_log(self, caplog):
        with opinion_server(lambda body: 500) as server:
            EndpointOpinion(f"{server.url}/moderations").score([BAD])
        assert "status 500" in caplog.text
        assert BAD.text not in caplog.text

    @pytest.mark.parametrize(
        "url",
        [
            "http://host/v1",
            "http:///v1/moderations",
            "http://user:key@host/v1/moderations",
            "http://:key@host/v1/moderations",
            "http://:key@host/v1#org/model",
            "http://host/v1/moderations?key=secret",
        ],
    )
    def test_urls_that_cannot_be_used(self, url):
        with pytest.raises(GuardError, match="should end with /moderations, or with #"):
            open_second_opinion(url)


class TestGuards:
    @pytest.fixture(scope="class")
    def guard(self):
        return LatentGuard.fit(FakeBackend(), labelled(40))

    def test_its_score_is_over_0_where_it_would_block(self, guard):
        second = GuardOpinion(guard)
        second.load()
        assert [score > 0 for score in second.score([BAD, GOOD])] == [True, False]

    def test_a_folder_is_opened(self, guard, tmp_path):
        guard.save(tmp_path)
        second = open_second_opinion(str(tmp_path))
        assert second.name == GuardOpinion(guard).name == f"guard {guard.digest[:12]} of fake"

    def test_a_prompt_that_cannot_be_read_fails_alone(self, guard, monkeypatch):
        class Choosy(FakeBackend):
            def capture(self, prompts, **how):
                for states in super().capture(prompts, **how):
                    if any(not p.text for p in states.prompts):
                        raise LatentGuardError("empty")
                    yield states

        choosy = guard.with_model(Choosy())
        bad, none, good = GuardOpinion(choosy).score([BAD, Prompt("", id="3"), GOOD])
        assert none is None
        assert bad > 0 > good

    def test_what_is_not_there(self):
        with pytest.raises(GuardError, match="There is no folder 'nowhere'"):
            open_second_opinion("nowhere")


class TestGuardModels:
    def test_it_blocks_what_is_likelier_unsafe(self, monkeypatch):
        class Fake:
            def __init__(self, source):
                pass

            def load(self):
                pass

            def __call__(self, prompts):
                return [0.9 if "bad" in p.text else 0.1 for p in prompts]

        monkeypatch.setattr(second_opinion, "LazyGuardModel", Fake)
        second = GuardModelOpinion("org/guard-model")
        second.load()
        assert [score > 0 for score in second.score([BAD, GOOD])] == [True, False]
        assert second.name == "guard model org/guard-model"

    def test_a_folder_without_a_guard_is_one(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="no known guard model"):
            open_second_opinion(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "is_unsafe"),
    [
        ("\n\nsafe", False),
        ("unsafe\nS1,S2", True),
        ("Safety: Unsafe\nCategories: Violent", True),
        ("Safety: Controversial\nCategories: None", True),
        ("Safety: Safe\nCategories: None", False),
    ],
)
def test_replies_of_guard_models(text, is_unsafe):
    assert is_unsafe_reply(text) is is_unsafe


@pytest.mark.parametrize("text", ["", "Yes", "No", "safely", "safe, I think", "Safety: Maybe"])
def test_other_replies_are_no_verdict(text):
    with pytest.raises(ModelError, match="Expected the verdict of a guard model"):
        is_unsafe_reply(text)
