"""``/v1/moderations`` and ``/v1/score``: OpenAI's schema, and the verdicts of ``guard.scan``."""

from dataclasses import replace

import pytest

from latentguard.data.hazards import MODERATION
from latentguard.serve.moderation import moderation_result, moderation_scores
from latentguard.serve.scoring import ScoredPrompt
from serve.running import PROMPTS, flagged, offline, opener, passed, post, running, tiny_guard


def moderate(url, given):
    return post(f"{url}/v1/moderations", json={"input": given}).json()


def close(verdict, result):
    assert result["flagged"] == verdict.flagged
    assert result["latentguard"]["score"] == pytest.approx(verdict.score, abs=1e-4)
    assert result["latentguard"]["probability"] == pytest.approx(verdict.probability, abs=1e-4)
    assert (result["category_scores"]["illicit"] > 0.5) == verdict.flagged
    assert result["latentguard"]["beliefs"] == pytest.approx(verdict.beliefs, abs=1e-5)


def test_a_list_is_judged_as_offline_in_order(service):
    answer = moderate(service, PROMPTS)
    assert [r["flagged"] for r in answer["results"]].count(True) == len(PROMPTS) // 2
    for text, result in zip(PROMPTS, answer["results"], strict=True):
        close(offline()[text], result)


@pytest.mark.parametrize("choose", [flagged, passed])
def test_one_text_has_every_key_of_the_schema(service, choose):
    text = choose()
    answer = moderate(service, text)
    assert set(answer) == {"id", "model", "results"}
    assert answer["id"].startswith("modr-")
    (result,) = answer["results"]
    for part in ("categories", "category_scores", "category_applied_input_types"):
        assert tuple(result[part]) == MODERATION
    assert len(MODERATION) == 13
    assert [n for n, is_so in result["categories"].items() if is_so] == (
        ["illicit"] if text == flagged() else []
    )
    close(offline()[text], result)


def test_content_parts_are_one_message(service):
    parts = [{"type": "text", "text": flagged()}]
    (result,) = moderate(service, parts)["results"]
    close(offline()[flagged()], result)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "input"),
        ("", "input"),
        ("   ", "is empty"),
        (["fine", "\n"], "is empty"),
        ([{"type": "image_url", "image_url": {"url": "https://example.org"}}], "text only"),
        (7, "input"),
        (None, "input"),
        (["x"] * 1000, "at most 128"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_client(service, given, said):
    answer = post(f"{service}/v1/moderations", json={"input": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]


def test_a_long_prompt_is_413_and_harms_nobody(service):
    long = post(f"{service}/v1/moderations", json={"input": "word " * 900})
    assert long.status_code == 413
    assert "tokens long" in long.json()["error"]["message"]
    close(offline()[passed()], moderate(service, passed())["results"][0])


def test_score_tells_beliefs_by_layer(service):
    text = flagged()
    answer = post(f"{service}/v1/score", json={"input": text}).json()
    (result,), guard = answer["results"], tiny_guard()
    assert answer["threshold"] == guard.threshold
    assert answer["layers"] == list(guard.probe.layers)
    assert set(result["by_layer"]) == {"harmful", "refuse"}
    for name, layers in result["by_layer"].items():
        assert sum(layers) / len(layers) == pytest.approx(result["beliefs"][name], abs=1e-5)
    assert result["quadrant"].startswith("harmful, ")
    assert result["explanation"] is None


def test_score_says_the_most_severe_reading_of_a_chat(service):
    guard, model = opener()
    from latentguard.prompts import Message, Prompt

    prompt = Prompt(flagged(), history=(Message("user", "Hello"), Message("assistant", "Hi.")))
    texts = [Prompt(text) for text in ("Hello", "Hi.", flagged())]
    expected = max(guard.scan(model, [prompt, *texts]), key=lambda verdict: verdict.score)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": flagged()}]},
    ]
    answer = post(f"{service}/v1/score", json={"messages": messages}).json()
    (result,) = answer["results"]
    assert result["score"] == pytest.approx(expected.score, abs=1e-4)
    assert result["readings"] == 4


@pytest.mark.parametrize("body", [{}, {"input": "a", "messages": [{"role": "user"}]}])
def test_score_wants_one_of_two(service, body):
    assert post(f"{service}/v1/score", json=body).status_code == 400


@pytest.mark.parametrize("reading", ["sealed", "t_inst"])
def test_other_readings_are_judged_as_offline(reading):
    with running(lambda: opener(reading)) as url:
        answer = moderate(url, PROMPTS[:8])
    for text, result in zip(PROMPTS[:8], answer["results"], strict=True):
        close(offline(reading)[text], result)


class TestCategories:
    """What a verdict with categories becomes in OpenAI's schema."""

    def scores(self, *, over=True, category="hate", **chances):
        verdict = next(v for v in offline().values() if v.flagged == over)
        verdict = replace(verdict, category=category, category_scores=chances)
        guard = tiny_guard()
        return moderation_scores(guard, ScoredPrompt(verdict, {}, guard.threshold))

    @pytest.mark.parametrize("over", [True, False])
    def test_a_category_is_true_exactly_if_the_input_is_flagged(self, over):
        scores = self.scores(over=over, hate=0.9, privacy=0.2)
        assert tuple(scores) == MODERATION
        assert (scores["hate"] > 0.5) == over
        assert max(scores, key=scores.get) == "hate"
        assert 0 < scores["illicit"] < scores["hate"]
        assert [n for n, s in scores.items() if not s] == [
            n for n in MODERATION if n not in {"hate", "illicit"}
        ]

    def test_one_that_is_as_likely_is_true_as_well(self):
        scores = self.scores(hate=0.9, suicide_self_harm=0.9)
        assert scores["hate"] == scores["self-harm"] > 0.5

    def test_the_category_that_is_named_counts_even_if_another_scores_more(self):
        scores = self.scores(category="sexual", hate=0.9, sexual=0.6)
        assert scores["sexual"] > 0.5

    def test_a_pack_with_a_name_of_openais(self):
        name = "violence/graphic"
        assert self.scores(category=name, **{name: 0.7})[name] > 0.5

    def test_a_guard_without_categories_calls_it_illicit(self):
        scores = self.scores(category=None)
        assert [n for n, s in scores.items() if s] == ["illicit"]

    def test_what_is_judged_is_said(self):
        guard = tiny_guard()
        verdict = next(v for v in offline().values() if v.flagged)
        verdict = replace(verdict, category="hate", category_scores={"hate": 0.9})
        types = moderation_result(
            guard, ScoredPrompt(verdict, {}, guard.threshold)
        ).category_applied_input_types
        assert [n for n, of in types.items() if of] == ["hate", "illicit"]
