"""Several guards by name; guards and keys that are replaced while requests go on."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from latentguard.errors import GuardError, LatentGuardError
from latentguard.serve.keys import ApiKeys
from latentguard.serve.reload import ServedFiles
from latentguard.serve.server import GuardSource
from serve.running import flagged, get, opener, passed, post, running, tiny_guard
from serve.test_operations import free_port
from serve.test_upstream import answers, chat, upstream


def with_threshold(side):
    """The tiny guard with another threshold: ``strict`` flags everything, ``lax`` nothing."""
    guard = tiny_guard()
    scores = [canary.score for canary in guard.canaries]
    edge = max(scores) + 10 * guard.spread if side == "lax" else min(scores) - 10 * guard.spread
    return replace(guard, threshold=edge)


NAMED = GuardSource(named_guards={"strict": with_threshold("strict"), "lax": with_threshold("lax")})


def is_flagged(url, text, **more):
    (result,) = post(f"{url}/v1/moderations", json={"input": text, **more}).json()["results"]
    return result["flagged"]


class TestSeveralGuards:
    @pytest.fixture(scope="class")
    def url(self, tmp_path_factory):
        audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
        with running(guards=NAMED, audit=audit) as url:
            url.audit = audit
            yield url

    def test_the_model_of_a_request_names_one(self, url):
        for text in (passed(), flagged()):
            assert is_flagged(url, text, model="strict") is True
            assert is_flagged(url, text, model="lax") is False
        for model in ("omni-moderation-latest", None, "default", "stric"):
            assert is_flagged(url, passed(), model=model) is False
            assert is_flagged(url, flagged(), model=model) is True

    def test_they_do_not_share_a_batch_s_verdicts(self, url):
        """Prompts of all three wait together and are read in one batch."""
        models = ["strict", "lax", "default"] * 8
        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(lambda m: is_flagged(url, flagged(), model=m), models))
        assert found == [True, False, True] * 8

    def test_answers_and_the_log_name_the_guard(self, url):
        names = {}
        for model in ("strict", "lax", "default"):
            answer = post(f"{url}/v1/score", json={"input": passed(), "model": model})
            names[model] = answer.json()["model"]
            line = json.loads(url.audit.read_text().splitlines()[-1])
            assert names[model] == f"latentguard-{line['guard']}"
        assert len(set(names.values())) == 3
        assert get(f"{url}/v1/guard").json()["guards"] == ["default", "strict", "lax"]
        assert 'guard="strict"' in get(f"{url}/metrics").text

    def test_score_knows_its_guards(self, url):
        answer = post(f"{url}/v1/score", json={"input": passed(), "model": "stric"})
        assert answer.status_code == 400
        assert "there are: default, strict, lax" in answer.json()["error"]["message"]

    def test_a_chat_of_the_own_model_is_judged_by_the_one_it_names(self, url):
        for model, finish in (("strict", "content_filter"), ("lax", "length")):
            body = chat(flagged(), model=model, max_tokens=1)
            answer = post(f"{url}/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["finish_reason"] in (finish, "stop")
        again = post(f"{url}/v1/chat/completions", json=chat(passed(), model="strict")).json()
        assert again["choices"][0]["finish_reason"] == "content_filter"

    def test_texts_that_are_cached_for_one_are_read_by_the_others(self, url):
        turns = [
            dict(role="user", content=flagged()),
            dict(role="assistant", content="Well."),
            dict(role="user", content=passed()),
        ]
        for model in ("lax", "strict", "lax", "default", "lax"):
            body = {"messages": turns, "model": model}
            found = post(f"{url}/v1/score", json=body).json()["results"][0]["flagged"]
            assert found is {"lax": False, "strict": True, "default": True}[model]

    def test_before_an_upstream_the_model_s_name_is_the_guard_s(self):
        with upstream(answers) as (seen, where), running(guards=NAMED, upstream=where) as url:
            for model in ("strict", "lax"):
                body = chat(passed(), model=model)
                answer = post(f"{url}/v1/chat/completions", json=body).json()
                assert answer["latentguard"]["flagged"] is (model == "strict")
        assert [body["model"] for body in seen] == ["lax"]

    def test_a_named_guard_of_another_model_stops_the_service(self):
        guard = tiny_guard()
        other = replace(guard, fingerprint=replace(guard.fingerprint, weights="0" * 64))
        with running(guards=GuardSource(named_guards={"other": other}), ready=False) as url:
            deadline = time.monotonic() + 30
            while url.server.failure is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert "weights" in str(url.server.failure)


class Files:
    """What is read anew; tests change it."""

    def __init__(self, **now):
        self.now = now

    def read(self):
        if "error" in self.now:
            raise self.now["error"]
        return ServedFiles(**{"guard": tiny_guard()} | self.now)


class TestReload:
    @pytest.fixture
    def files(self):
        return Files()

    @pytest.fixture
    def service(self, files):
        how = dict(health_port=free_port(), admin_key="admin")
        with running(guards=GuardSource(read=files.read), keys=["old"], **how) as url:
            url.health = f"http://127.0.0.1:{how['health_port']}"
            yield url

    def reload(self, service, key="admin"):
        return post(f"{service.health}/reload", headers={"authorization": f"Bearer {key}"})

    def judge(self, service, text, key="old", **more):
        headers = {"authorization": f"Bearer {key}"}
        return post(f"{service}/v1/score", json={"input": text, **more}, headers=headers)

    def test_another_guard_judges_from_then_on(self, service, files):
        before = self.judge(service, passed()).json()
        files.now = dict(guard=with_threshold("strict"), keys=ApiKeys(["old"]))
        assert self.reload(service).text == "reloaded"
        after = self.judge(service, passed()).json()
        assert (before["results"][0]["flagged"], after["results"][0]["flagged"]) == (False, True)
        assert before["model"] != after["model"]
        assert after["threshold"] == with_threshold("strict").threshold
        assert (
            'latentguard_reloads_total{outcome="done"} 1.0' in get(f"{service.health}/metrics").text
        )

    def test_guards_by_name_come_and_go(self, service, files):
        assert self.judge(service, passed(), model="strict").status_code == 400
        files.now = dict(named_guards=NAMED.named_guards, keys=ApiKeys(["old"]))
        self.reload(service)
        answer = self.judge(service, passed(), model="strict").json()
        assert answer["results"][0]["flagged"] is True
        files.now = dict(keys=ApiKeys(["old"]))
        self.reload(service)
        assert self.judge(service, passed(), model="strict").status_code == 400

    def test_keys_are_rotated(self, service, files):
        files.now = dict(keys=ApiKeys(["old", "new"]))
        self.reload(service)
        assert [self.judge(service, passed(), k).status_code for k in ("old", "new")] == [200, 200]
        files.now = dict(keys=ApiKeys(["new"]))
        self.reload(service)
        assert [self.judge(service, passed(), k).status_code for k in ("old", "new")] == [401, 200]

    @pytest.mark.parametrize(
        ("now", "reason"),
        [
            (dict(error=GuardError("the guard is damaged")), "the guard is damaged"),
            (dict(error=OSError(2, "No such file")), "No such file"),
            (
                dict(
                    guard=replace(
                        tiny_guard(),
                        fingerprint=replace(tiny_guard().fingerprint, weights="0" * 64),
                    )
                ),
                "weights",
            ),
            (
                dict(
                    named_guards={
                        "moved": replace(
                            tiny_guard(),
                            canaries=tuple(
                                replace(c, score=c.score + 9) for c in tiny_guard().canaries
                            ),
                        )
                    }
                ),
                "canary prompts differently",
            ),
        ],
    )
    def test_nothing_is_replaced_if_anything_is_wrong(self, service, files, now, reason):
        before = self.judge(service, passed()).json()["model"]
        files.now = dict(keys=ApiKeys(["new"])) | now
        answer = self.reload(service)
        assert answer.status_code == 409
        assert "stay as they were" in answer.json()["error"]["message"]
        assert reason in answer.json()["error"]["message"]
        assert self.judge(service, passed()).json()["model"] == before
        assert 'outcome="failed"} 1.0' in get(f"{service.health}/metrics").text

    def test_a_certificate_that_cannot_be_loaded_replaces_no_guard(self, service, files):
        """The file may change after it was checked."""

        def renew():
            raise OSError("no certificate")

        before = self.judge(service, passed()).json()["model"]
        service.server.reloader.renew_certificate = renew
        files.now = dict(guard=with_threshold("strict"), keys=ApiKeys(["new"]))
        answer = self.reload(service)
        assert (answer.status_code, "no certificate" in answer.text) == (409, True)
        assert self.judge(service, passed()).json()["model"] == before

    def test_only_the_admin_may(self, service):
        for key in ("old", "x", "admi"):
            assert self.reload(service, key).status_code == 401
        other = post(f"{service}/reload", json={}, headers={"authorization": "Bearer old"})
        assert other.status_code == 404

    def test_without_a_key_of_the_admin_there_is_no_such_endpoint(self, files):
        how = dict(health_port=free_port())
        with running(guards=GuardSource(read=files.read), **how):
            answer = post(f"http://127.0.0.1:{how['health_port']}/reload")
        assert answer.status_code == 404

    def test_an_empty_key_of_the_admin_starts_no_service(self, files):
        how = dict(health_port=free_port(), admin_key="")
        with pytest.raises(LatentGuardError, match="key is empty"):
            running(guards=GuardSource(read=files.read), **how).__enter__()

    def test_no_request_is_dropped_or_judged_by_a_mixture(self, service, files):
        """Each verdict is the one of the guard that the answer names."""
        strict, plain = with_threshold("strict"), tiny_guard()
        thresholds = {f"latentguard-{g.digest[:12]}": g.threshold for g in (strict, plain)}
        stop = threading.Event()

        def ask(_):
            answers = []
            while not stop.is_set():
                answers.append(self.judge(service, passed()))
            return answers

        with ThreadPoolExecutor(4) as pool:
            asked = pool.map(ask, range(4))
            for guard in (strict, plain) * 3:
                files.now = dict(guard=guard, keys=ApiKeys(["old"]))
                assert self.reload(service).status_code == 200
            stop.set()
            answers = [one for several in asked for one in several]
        assert {one.status_code for one in answers} == {200}
        bodies = [one.json() for one in answers]
        assert {body["model"] for body in bodies} == set(thresholds)
        for body in bodies:
            assert body["threshold"] == thresholds[body["model"]]
            score = body["results"][0]["score"]
            assert body["results"][0]["flagged"] is (score > body["threshold"])


def test_the_upstream_is_shown_the_new_key(tmp_path):
    shown = []

    def script(handler, _):
        shown.append(handler.headers["authorization"])
        answers(handler)

    files = Files(upstream_key="second")
    how = dict(health_port=free_port(), admin_key="admin", upstream_key="first")
    with (
        upstream(script) as (_, where),
        running(opener, guards=GuardSource(read=files.read), upstream=where, **how) as url,
    ):
        post(f"{url}/v1/chat/completions", json=chat(passed()))
        headers = {"authorization": "Bearer admin"}
        assert post(f"http://127.0.0.1:{how['health_port']}/reload", headers=headers).is_success
        post(f"{url}/v1/chat/completions", json=chat(passed()))
    assert shown == ["Bearer first", "Bearer second"]
