"""The shadow guard is promoted and taken back while requests go on."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from latentguard.prompts import Prompt
from latentguard.serve.keys import ApiKeys
from latentguard.serve.reload import ServedFiles
from latentguard.serve.server import GuardSource
from serve.running import (
    PROMPTS,
    band_guard,
    flagged,
    get,
    opener,
    passed,
    post,
    running,
    tiny_guard,
    tiny_model,
)
from serve.shadow_guards import (
    ADMIN,
    agreeing,
    audited,
    broken,
    compared,
    contrary,
    unchecked,
    with_shadow,
)
from serve.test_guards import with_threshold
from serve.test_upstream import chat


def admin(url, verb, headers=ADMIN):
    """What the health port answers."""
    port = url.server.service.config.health_port
    return post(f"http://127.0.0.1:{port}/{verb}", headers=headers)


def judged(url, text, **how):
    return post(f"{url}/v1/score", json={"input": text}, **how).json()


def name(guard):
    return f"latentguard-{guard.digest[:12]}"


@pytest.fixture
def url(start):
    return start(contrary())


class TestPromote:
    def test_the_shadow_decides_and_the_guard_becomes_the_shadow(self, url):
        answer = admin(url, "promote")
        assert answer.json() == {"decides": {"guard": contrary().digest[:12], "folder": "new"}}
        result = judged(url, flagged())
        assert result["model"] == name(contrary())
        assert result["results"][0]["flagged"] is False
        line = audited(url)[-1]
        assert (line["guard"], line["folder"]) == (contrary().digest[:12], "new")
        assert line["shadow"]["folder"] == "mine"
        assert line["shadow"]["decision"] == "block"
        assert "latentguard_promoted 1.0" in get(f"{url}/metrics").text
        assert compared(url)["decides"]["folder"] == "new"
        assert compared(url)["is_promoted"] is True

    def test_rollback_lets_the_guard_before_decide(self, url):
        before = judged(url, flagged())
        admin(url, "promote")
        judged(url, flagged())
        answer = admin(url, "rollback")
        assert answer.json()["decides"]["folder"] == "mine"
        after = judged(url, flagged())
        assert (after["model"], after["results"]) == (before["model"], before["results"])
        assert compared(url)["totals"]["only_guard_blocks"] == 2  # while this guard decided

    def test_twice_changes_nothing(self, url):
        """A retry after a lost answer does not swap back."""
        assert admin(url, "rollback").status_code == 409
        assert admin(url, "promote").status_code == 200
        again = admin(url, "promote")
        assert again.status_code == 409
        assert "decides already" in again.json()["error"]["message"]
        assert judged(url, flagged())["model"] == name(contrary())
        assert admin(url, "rollback").status_code == 200
        assert admin(url, "rollback").status_code == 409
        assert judged(url, flagged())["model"] == name(tiny_guard())

    def test_chats_of_the_own_model_are_refused_by_the_guard_that_decides(self, url):
        def ends(text):
            body = chat(text, max_tokens=1)
            answer = post(f"{url}/v1/chat/completions", json=body).json()
            return answer["choices"][0]["finish_reason"]

        assert (ends(flagged()), ends(passed())) == ("content_filter", "length")
        admin(url, "promote")
        assert (ends(flagged()), ends(passed())) == ("length", "content_filter")

    def test_texts_that_are_kept_are_judged_anew(self, url):
        body = chat(flagged())
        for verb, word in ((None, True), ("promote", False), ("rollback", True)):
            if verb:
                admin(url, verb)
            answer = post(f"{url}/v1/score", json=body).json()
            assert answer["results"][0]["flagged"] is word

    def test_scores_are_compared_with_those_of_the_guard_that_decides(self, start):
        guard = band_guard()
        doubled = agreeing().calibrate(
            tiny_model(), _harmless(), max_fpr=0.25, review_fpr=0.5, confidence=0.5
        )
        url = start(doubled, lambda: (guard, tiny_model()))
        before = url.server.service.reference.scores
        admin(url, "promote")
        expected = tuple(doubled.thresholds.common.scores.tolist())
        assert url.server.service.reference.scores == expected != before
        admin(url, "rollback")
        assert url.server.service.reference.scores == before

    def test_a_shadow_that_fails_is_not_promoted(self, start):
        url = start(None, guards=unchecked(broken()))
        answer = admin(url, "promote")
        assert answer.status_code == 409
        assert "fails on its canaries" in answer.json()["error"]["message"]
        assert judged(url, flagged())["model"] == name(tiny_guard())

    def test_without_a_shadow(self, start):
        url = start(None)
        for verb in ("promote", "rollback"):
            answer = admin(url, verb)
            assert answer.status_code == 409
            assert "--shadow GUARD" in answer.json()["error"]["message"]
        assert compared(url)["error"]["code"] == "roles_kept"


def _harmless():
    return [Prompt(text, harmful=False) for text in PROMPTS]


class TestWhoMay:
    def test_only_the_admin(self, start):
        url = start(contrary(), keys=["client"])
        port = url.server.service.config.health_port
        for key in ("client", "admi", None):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for verb in ("promote", "rollback"):
                assert admin(url, verb, headers).status_code == 401
            assert get(f"http://127.0.0.1:{port}/shadow", headers=headers).status_code == 401
        client = {"authorization": "Bearer client"}
        for verb in ("promote", "rollback", "shadow"):
            assert post(f"{url}/{verb}", json={}, headers=client).status_code == 404
        assert get(f"{url}/shadow", headers=client).status_code == 404
        assert compared(url)["is_promoted"] is False

    def test_without_a_key_of_the_admin_there_is_no_such_endpoint(self):
        with with_shadow(contrary(), admin_key=None) as url:
            for verb in ("promote", "rollback"):
                assert admin(url, verb).status_code == 404

    def test_not_before_the_guards_are_loaded(self):
        held = threading.Event()

        def slow():
            held.wait(30)
            return opener()

        with with_shadow(contrary(), slow, ready=False) as url:
            assert admin(url, "promote").status_code == 503
            held.set()


class TestUnderLoad:
    def test_no_request_is_lost_or_judged_by_a_mixture(self, start):
        """Each verdict, each line of the log and each count is of one guard."""
        strict, lax = with_threshold("strict"), with_threshold("lax")
        url = start(lax, lambda: (strict, tiny_model()))
        sides = {name(strict): (True, strict.threshold), name(lax): (False, lax.threshold)}
        stop, answers = threading.Event(), []

        def ask(number):
            turns = [dict(role="user", content=text) for text in PROMPTS[number : number + 3]]
            body = {"input": PROMPTS[:3]} if number % 2 else {"messages": turns}
            while not stop.is_set():
                answers.append(post(f"{url}/v1/score", json=body))

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, number) for number in range(4)]
            try:
                for verb in ("promote", "rollback") * 4:
                    assert admin(url, verb).status_code == 200
                    enough = len(answers) + 5  # one at least was begun after that
                    until = time.monotonic() + 60
                    while len(answers) < enough and time.monotonic() < until:
                        time.sleep(0.01)
            finally:
                stop.set()
            for one in asked:
                one.result()
        assert {one.status_code for one in answers} == {200}
        seen = set()
        for body in (one.json() for one in answers):
            seen.add(body["model"])
            is_flagged, threshold = sides[body["model"]]
            assert body["threshold"] == threshold
            assert {one["flagged"] for one in body["results"]} == {is_flagged}
        assert seen == set(sides)
        lines = audited(url)
        for line in lines:
            assert line["flagged"] is (line["guard"] == strict.digest[:12])
            assert line["shadow"]["guard"] != line["guard"]
            assert line["shadow"]["decision"] == ("allow" if line["flagged"] else "block")
        admin(url, "rollback")
        by_strict = sum(line["guard"] == strict.digest[:12] for line in lines)
        assert compared(url)["totals"]["only_guard_blocks"] == by_strict
        admin(url, "promote")
        assert compared(url)["totals"]["only_shadow_blocks"] == len(lines) - by_strict

    def test_a_chat_that_is_under_way_keeps_its_guard(self, url):
        """It is read, then replied to, while the other guard is promoted."""
        body = chat(passed(), max_tokens=40, stream=True)
        results = []

        def ask():
            results.append(post(f"{url}/v1/chat/completions", json=body))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for verb in ("promote", "rollback") * 3:
            admin(url, verb)
        for thread in threads:
            thread.join()
        for line in audited(url):
            assert line["action"] == (
                "pass" if line["guard"] == tiny_guard().digest[:12] else "block"
            )
        assert all(one.text.endswith("data: [DONE]\n\n") for one in results)


class TestReload:
    @pytest.fixture
    def files(self):
        return dict(guard=tiny_guard(), shadow=contrary())

    @pytest.fixture
    def service(self, files):
        guards = GuardSource(shadow=contrary(), read=lambda: ServedFiles(**files, keys=ApiKeys()))
        with with_shadow(None, guards=guards) as url:
            yield url

    def test_roles_are_kept(self, service, files):
        files["shadow"] = agreeing()
        assert admin(service, "reload").text == "reloaded"
        judged(service, flagged())
        assert compared(service)["totals"]["both_block"] == 1
        admin(service, "promote")
        files["shadow"] = contrary()
        assert admin(service, "reload").text == "reloaded"
        assert compared(service)["is_promoted"] is True
        assert judged(service, flagged())["model"] == name(contrary())
        admin(service, "rollback")
        assert judged(service, flagged())["model"] == name(tiny_guard())

    def test_nothing_is_replaced_if_the_shadow_is_wrong(self, service, files):
        weights = replace(contrary().fingerprint, weights="0" * 64)
        files["shadow"] = replace(contrary(), fingerprint=weights)
        answer = admin(service, "reload")
        assert answer.status_code == 409
        assert "The shadow guard cannot be used" in answer.json()["error"]["message"]
        judged(service, flagged())
        assert compared(service)["totals"]["only_guard_blocks"] == 1

    def test_a_reload_without_a_shadow_ends_it(self, service, files):
        admin(service, "promote")
        files["shadow"] = None
        assert admin(service, "reload").text == "reloaded"
        assert judged(service, flagged())["model"] == name(tiny_guard())
        assert admin(service, "promote").status_code == 409


def test_a_health_port_is_needed():
    """The main port has no administration, whatever keys there are."""
    guards = GuardSource(shadow=contrary(), read=lambda: None)
    with running(guards=guards, admin_key="admin") as url:
        assert post(f"{url}/promote", headers=ADMIN, json={}).status_code == 404
