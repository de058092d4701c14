"""The page in Debian's Chromium: what it shows, by keyboard, at 400 px, light and dark.

Set ``LATENTGUARD_SCREENSHOTS`` to a folder to keep the pictures.
"""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from latentguard.prompts import Prompt
from latentguard.serve.drift import DriftReference
from latentguard.serve.server import GuardSource
from serve.running import (
    PROMPTS,
    band_guard,
    flagged,
    get,
    offline,
    opener,
    passed,
    post,
    reviewed,
    running,
    tiny_guard,
    tiny_model,
)
from serve.shadow_guards import contrary

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
LONG = "Please tell me " + "a very long story about the sea and the wind, " * 12


def point_of(verdict):
    return dict(score=verdict.score, beliefs=verdict.beliefs, flagged=verdict.flagged)


@pytest.fixture(scope="module")
def url():
    points = tuple(point_of(verdict) for verdict in offline().values())
    with running(reference=DriftReference(points)) as made:
        yield made


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def visit(browser):
    """Open the page; anything that the browser complains of fails the test."""
    opened = []

    def visit(url, *, width=1000, scheme="light"):
        size = dict(width=width, height=900)
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.complaints = []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(str(url))
        opened.append(page)
        return page

    yield visit
    for page in opened:
        assert page.complaints == []
        page.close()


def read(page, text):
    page.fill("#chat", text)
    page.click("#ask button")
    page.wait_for_selector("#verdict:not([hidden])")
    page.wait_for_selector("#ask button:not([disabled])")


CUT = """() => [...document.querySelectorAll('svg text')].filter(text => {
    const [box, around] = [text.getBBox(), text.ownerSVGElement.viewBox.baseVal];
    return box.x < 0 || box.y < 0 || box.x + box.width > around.width
        || box.y + box.height > around.height;
}).map(text => text.textContent)"""


def keep(page, name):
    """Nothing in the figures is cut off; keep a picture if asked."""
    assert page.evaluate(CUT) == []
    if folder := os.environ.get("LATENTGUARD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def numbers(text):
    """Each number of a text, as the page writes them."""
    return [float(one) for one in re.findall(r"-?[0-9]+\.[0-9]+", text.replace("\u2212", "-"))]


def test_a_flagged_prompt(url, visit):
    page = visit(url)
    read(page, flagged())
    assert page.inner_text("#verdict-word") == "Flagged"
    shown = "".join(page.locator("#tokens span:not(.template)").all_text_contents())
    assert shown == flagged()
    assert page.locator("#tokens span.template").count() > 0
    assert f"{offline()[flagged()].score:.3f}" in page.inner_text("#figures")
    assert page.locator("#layers rect").count() == len(tiny_guard().probe.layers)
    assert page.locator("#known rect").count() > 1
    assert page.locator("#plane circle.known").count() == len(PROMPTS) + 1
    keep(page, "flagged")


def test_the_sum_is_the_score(url, visit):
    """What stands beside the verdict is what decided it, and adds up."""
    page = visit(url)
    for text, side in ((flagged(), "over"), (passed(), "not over")):
        read(page, text)
        words = page.inner_text("#sum")
        baseline, tokens, score, threshold = numbers(words)
        added = tokens if "+ tokens" in words else -tokens
        assert baseline + added == pytest.approx(score, abs=2e-3)
        assert score == pytest.approx(offline()[text].score, abs=1e-3)
        assert f", {side} the threshold" in words
        assert (score > threshold) is (side == "over")
        titles = page.locator("#tokens span").evaluate_all("all => all.map(e => e.title)")
        each = [float(one.replace("\u2212", "-")) for one in titles]
        assert baseline + sum(each) == pytest.approx(score, abs=2e-3 + 1e-3 * len(each))


def test_the_papers_belief_comes_second_and_is_named(url, visit):
    page = visit(url)
    read(page, flagged())
    assert "which does not decide" in page.inner_text("#belief-title")
    assert "harmful" in page.inner_text("#belief-words")
    assert page.locator("#belief-layers polyline").count() == 2
    assert "".join(page.locator("#beliefs span").all_text_contents()) == flagged()
    order = page.locator("main > section").evaluate_all("all => all.map(e => e.id)")
    assert order.index("tokens-card") < order.index("belief-card")


def test_examples_are_offered_until_something_was_asked(url, visit):
    page = visit(url)
    page.click("#examples button >> nth=0")
    page.wait_for_selector("#verdict:not([hidden])")
    assert page.input_value("#chat") == "How do I kill a Python process?"
    assert page.locator("#examples").is_hidden()
    keep(page, "example")


CHANCES = {"a": 0.2, "b": 0.3, "c": 0.1}


@pytest.mark.parametrize(
    ("decision", "chance", "named"),
    [("block", 0.9, True), ("block", 0.5, False), ("review", 0.9, True), ("allow", 0.99, False)],
)
def test_a_category_is_named_only_if_it_is_surer_than_chance(url, visit, decision, chance, named):
    """Of four categories, its odds have to beat the three others, and the prompt not be allowed."""

    def answer(route):
        response = route.fetch()
        body = response.json()
        scores = CHANCES | {"made_up": chance}
        body["results"][0] |= dict(decision=decision, category="made_up", category_scores=scores)
        route.fulfill(response=response, json=body)

    page = visit(url)
    page.route("**/v1/score", answer)
    read(page, flagged())
    assert ("made up" in page.inner_text("#figures")) is named


def test_the_threshold_changes_what_would_be_flagged(url, visit):
    page = visit(url)
    read(page, passed())
    assert page.inner_text("#verdict-word") == "Not flagged"
    assert "would not be flagged, as now" in page.inner_text("#threshold-words")
    page.focus("#threshold")
    page.keyboard.press("Home")
    said = page.inner_text("#threshold-words")
    assert "would be flagged, unlike now" in said
    assert f"{len(PROMPTS)} of {len(PROMPTS)} reference prompts" in said
    page.click("#threshold-reset")
    assert "as now" in page.inner_text("#threshold-words")


def test_by_keyboard_alone(url, visit):
    page = visit(url)
    page.keyboard.press("Tab")
    page.keyboard.insert_text(flagged())
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#verdict:not([hidden])")
    page.focus("#tokens span[tabindex='0']")
    assert "t_inst" in page.inner_text("#token-words")
    page.keyboard.press("Home")
    assert page.inner_text("#token-words").startswith("Token 1 of")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token-words").startswith("Token 2 of")


def test_a_chat(url, visit):
    page = visit(url)
    page.fill("#chat", f"System: Be brief.\nUser: Hello\nAssistant: Hi.\nUser: {flagged()}")
    with page.expect_request("**/v1/score") as sent:
        page.click("#ask button")
    said = sent.value.post_data_json["messages"]
    assert [m["role"] for m in said] == ["system", "user", "assistant", "user"]
    assert said[-1]["content"] == Prompt(flagged()).text
    page.wait_for_selector("#verdict:not([hidden])")


def test_what_a_shadow_guard_would_decide(visit):
    with running(guards=GuardSource(shadow=contrary())) as url:
        post(f"{url}/v1/score", json={"input": [flagged(), passed()]})
        page = visit(url, width=400)
        page.wait_for_selector("#shadow-card:not([hidden])")
        assert contrary().digest[:12] in page.inner_text("#shadow-words")
        rows = page.locator("#shadow-table tr").all_inner_texts()
        assert ["only the guard blocks" in row for row in rows] == [False, True, False]
        assert ["only the shadow blocks" in row for row in rows] == [False, False, True]
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        keep(page, "shadow")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_400_px_nothing_sticks_out(url, visit, scheme):
    page = visit(url, width=400, scheme=scheme)
    read(page, LONG)
    read(page, flagged())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    keep(page, f"narrow-{scheme}")


def test_in_the_dark(url, visit):
    page = visit(url, scheme="dark")
    read(page, passed())
    read(page, LONG)
    keep(page, "dark")


def test_a_guard_of_several_layers(visit):
    with running(lambda: opener("t_inst", "centroid")) as url:
        page = visit(url)
        read(page, flagged())
        assert "layers 1 to 4" in page.inner_text("#about")
        points = page.locator("#belief-layers polyline.harmful").get_attribute("points")
        assert len(points.split()) == 4
        assert page.locator("#layers rect").count() == 4
        page.click("#layers-card summary")
        assert page.locator("#layers-table tr").count() == 7
        assert "8 canary prompts" in page.inner_text("#known-words")
        assert page.locator("#plane-part").is_hidden()
        keep(page, "layers")


WORDS = {"block": "Flagged", "review": "To review", "allow": "Not flagged"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_guard_with_a_band_to_review(visit, scheme):
    """In words, a shape and a colour of their own; the threshold can be moved past it."""
    guard, model = band_guard(), tiny_model()
    found = list(guard.scan(model, PROMPTS))
    many = [v.decision for v in found].count("review")
    known = DriftReference(tuple(point_of(verdict) for verdict in found))
    with running(lambda: (guard, model), reference=known) as url:
        page = visit(url, width=400, scheme=scheme)
        colours = set()
        for text, decision in ((flagged(), "block"), (passed(), "allow"), (reviewed(), "review")):
            read(page, text)
            assert page.inner_text("#verdict-word") == WORDS[decision]
            box = page.locator("#verdict")
            colours.add(box.evaluate("e => getComputedStyle(e).borderLeftColor"))
            assert page.locator("#asked td:last-child").first.inner_text() == (
                WORDS[decision].lower()
            )
        assert len(colours) == 3
        assert "Chats to review: annotate." in page.inner_text("#about")
        assert "Review above" in page.inner_text("#figures")
        assert page.locator("#plane circle.review").count() == many + 1
        assert "hollow is to review" in page.inner_text("#plane-words")
        assert page.locator("#known line.cut").count() == 2
        said = page.inner_text("#threshold-words")
        assert "would be left to review, as now" in said
        assert f"and {many + 1} left to review" in said
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        keep(page, f"review-{scheme}")
        page.focus("#threshold")
        page.keyboard.press("Home")
        said = page.inner_text("#threshold-words")
        assert "would be flagged, unlike now" in said
        assert "and 0 left to review" in said
        assert page.locator("#plane circle.review").count() == 0


def test_a_guard_without_a_refusal_axis(visit):
    guard, model = band_guard(), tiny_model()
    guard = replace(guard, axes=guard.axes[:1], quadrants=None, categories=None)
    with running(lambda: (guard, model)) as url:
        page = visit(url)
        read(page, reviewed())
        assert page.locator("#belief-layers polyline").count() == 1
        assert page.locator("#known line.cut").count() == 2
        keep(page, "review-lines")


def test_calibration_scores_are_drawn_without_a_text(visit):
    guard, model = band_guard(), tiny_model()
    with running(lambda: (guard, model), reference=DriftReference.of(guard, None)) as url:
        page = visit(url)
        read(page, flagged())
        assert f"{len(PROMPTS)} harmless calibration prompts" in page.inner_text("#known-words")
        known = get(f"{url}/v1/guard").json()["reference"]
        assert known["scores"] == pytest.approx(guard.thresholds.common.scores.tolist())
        assert known["points"] == []
        keep(page, "calibration")


def test_a_chat_shows_the_message_that_decided(url, visit):
    page = visit(url)
    read(page, f"User: {flagged()}\nAssistant: No.\nUser: {passed()}")
    shown = "".join(page.locator("#tokens span:not(.template)").all_text_contents())
    assert shown == flagged()
    assert page.inner_text("#tokens-of") == "Of the text that decided:"


def test_errors_of_the_service_are_told_in_words(url, visit):
    page = visit(url)
    page.fill("#chat", "word " * 4000)
    page.click("#ask button")
    page.wait_for_selector("#problem:not([hidden])")
    assert "tokens" in page.inner_text("#problem")
    page.complaints = [c for c in page.complaints if "413" not in c]


def test_text_is_never_markup(url, visit):
    page = visit(url)
    text = "<img src=x onerror=alert(1)> <b>bold</b>"
    read(page, text)
    assert page.locator("main b, main img").count() == 0
    assert "".join(page.locator("#tokens span:not(.template)").all_text_contents()) == text


def test_errors_are_said(visit):
    with running(keys=["secret"]) as url:
        page = visit(url)
        page.fill("#chat", "Hello")
        page.click("#ask button")
        page.wait_for_selector("#problem:not([hidden])")
        assert "API key" in page.inner_text("#problem")
        page.fill("#key", "secret")
        read(page, "Hello")
        assert page.locator("#problem").is_hidden()
        keep(page, "keys")
        page.complaints = [c for c in page.complaints if "401" not in c]


def test_nothing_is_loaded_from_elsewhere(url, visit, browser):
    asked = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(str(url))
    page.wait_for_selector("#about:text('Guard of')")
    page.close()
    assert asked
    assert all(one.startswith(str(url)) for one in asked)
