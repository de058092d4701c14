"""The review page in a real browser: labelled by keys and by touch, light and dark, on a phone.

Set ``LATENTGUARD_SCREENSHOTS`` to a folder to keep the pictures.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from browser.pages import contrast
from latentguard.prompts import Message
from review.desks import SCORES, TEXTS, item, items, local, made_review
from serve.running import passed, post, running

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def desk(folder, chromium):
    """Open the page of a review; anything that the browser complains of fails the test."""
    running, opened = [], []

    def open_page(review=None, *, width=1100, height=900, scheme="light", wait=True):
        server = local(review or made_review(folder))
        running.append(server)
        size = dict(width=width, height=height)
        page = chromium.new_page(viewport=size, color_scheme=scheme)
        page.complaints, page.fetched = [], []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.fetched.append(request.url))
        page.server = server.__enter__()
        page.goto(page.server.url)
        opened.append(page)
        if wait:
            tokens(page)
        return page

    yield open_page
    for page in opened:
        assert page.complaints == []
        address = f"http://127.0.0.1:{page.server.port}/"
        assert [url for url in page.fetched if not url.startswith(address)] == []
        page.close()
    for server in running:
        server.__exit__(None, None, None)


def tokens(page):
    """Wait until the tokens are coloured."""
    page.wait_for_selector("#legend .hot")


def says(page, id, words):
    """Wait until an element says something; the page's policy forbids to evaluate a string."""
    page.locator(f"#{id}", has_text=words).wait_for()


def press(page, key):
    """Press a key, and wait until its request is answered."""
    with page.expect_response(lambda answer: answer.request.method == "POST"):
        page.keyboard.press(key)
    page.wait_for_timeout(50)


def keep(page, name):
    """Nothing sticks out; keep a picture if asked."""
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("LATENTGUARD_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def rows(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def test_two_keys_label(desk, folder):
    page = desk()
    assert page.inner_text("#text") == TEXTS[0]
    assert page.inner_text("#decision") == "Flagged"
    assert "0.400" in page.inner_text("#numbers")
    keep(page, "review-first")
    press(page, "l")
    assert page.inner_text("#text") == TEXTS[1]
    press(page, "h")
    assert [(row["text"], row["label"]) for row in rows(folder)] == [
        (TEXTS[0], "harmless"),
        (TEXTS[1], "harmful"),
    ]
    assert page.inner_text("#counts") == "2 of 6 labelled: 1 harmful, 1 harmless"
    assert page.inner_text("#last") == "Labelled harmful."
    tokens(page)
    keep(page, "review-two")


def test_undo_brings_the_prompt_back(desk, folder):
    page = desk()
    press(page, "h")
    press(page, "u")
    assert page.inner_text("#text") == TEXTS[0]
    assert page.inner_text("#counts").startswith("0 of 6")
    assert rows(folder)[-1]["label"] is None


def test_skipped_prompts_come_again(desk, folder):
    page = desk()
    press(page, "s")
    for _ in TEXTS[1:]:
        press(page, "l")
    assert page.inner_text("#end-title") == "The end of this list."
    assert page.locator("#harmful").is_disabled()
    keep(page, "review-end")
    page.click("#again")
    page.wait_for_selector("#item:not([hidden])")
    assert page.inner_text("#text") == TEXTS[0]
    press(page, "l")
    assert page.inner_text("#end-title") == "All prompts are labelled."
    assert len(rows(folder)) == len(TEXTS)


def test_labelled_prompts_are_skipped_after_a_restart(desk, folder, chromium):
    page = desk()
    press(page, "l")
    page.server.server.should_exit = True
    page.close()
    labels = folder / "labels.jsonl"
    other = folder / "again"
    other.mkdir()
    (other / "labels.jsonl").write_bytes(labels.read_bytes() + b'{"id": "torn')
    again = desk(made_review(other))
    assert again.inner_text("#text") == TEXTS[1]
    assert (other / "labels.jsonl").read_bytes() == labels.read_bytes()
    page.complaints.clear()


def test_lists_and_orders(desk):
    page = desk()
    page.select_option("#order", "highest")
    says(page, "text", "cake")
    page.select_option("#which", "allowed")
    page.select_option("#order", "lowest")
    says(page, "text", "poem")
    assert page.inner_text("#decision") == "Allowed"


def test_a_letter_in_a_field_labels_nothing(desk, folder):
    page = desk()
    page.click("#who")
    page.keyboard.press("h")
    assert rows(folder) == []
    page.fill("#name", "Hal")
    page.click("#enter button")
    page.wait_for_selector("#item:not([hidden])")
    assert page.inner_text("#who") == "Reviewer: Hal"
    page.focus("#which")
    page.keyboard.press("l")
    assert rows(folder) == []


def test_the_others_label_is_shown_after_ones_own(desk, folder):
    review = made_review(folder)
    first = review.session.items.get(review.session.items.keys("file")[0])
    review.session.label(first, "harmful", "Ben")
    page = desk(review)
    assert "Ben" not in page.inner_text("body")
    press(page, "l")
    said = page.inner_text("#last")
    assert "Ben: harmful" in said
    assert "You disagree, so it does not count yet." in said
    keep(page, "review-dispute")
    page.select_option("#which", "disputed")
    says(page, "own", "Ben")
    assert page.inner_text("#text") == TEXTS[0]


def test_text_is_never_markup(desk, folder):
    text = "<script>document.title = 'caught'</script><img src=x onerror=alert(1)> <b>bold</b>"
    kept = items([text], [1.0])
    kept.add(item("Go on.", 0.1, history=(Message("user", "<i>x</i><script>0</script>"),)))
    page = desk(made_review(folder, kept))
    assert page.inner_text("#text") == text
    press(page, "l")
    assert "<i>x</i>" in page.inner_text("#history")
    assert page.locator("main script, main img, main i, #text b").count() == 0
    assert page.title() == "Review · latentguard"


def test_an_address_without_the_token_shows_nothing(desk):
    page = desk()
    stranger = page.context.browser.new_page()
    stranger.goto(f"http://127.0.0.1:{page.server.port}/#wrong")
    stranger.wait_for_selector("#problem:not([hidden])")
    assert "address in the terminal" in stranger.inner_text("#problem")
    assert TEXTS[0] not in stranger.content()
    stranger.close()


def test_teaching(desk, folder):
    page = desk()
    assert page.locator("#teach").is_disabled()
    press(page, "l")
    assert page.inner_text("#teach") == "Teach the guard with this 1 label"
    page.click("#teach")
    says(page, "teach-words", "needs")
    press(page, "l")
    page.click("#teach")
    page.wait_for_selector("#offer:not([hidden])", timeout=10_000)
    assert page.locator("#tables td").count() == 6
    assert str(folder / "labels-guard") in page.inner_text("#command")
    page.locator("#teach-card").scroll_into_view_if_needed()
    page.mouse.wheel(0, 2000)
    page.wait_for_timeout(200)
    keep(page, "review-taught")


def test_a_program_that_has_ended_is_said(desk):
    page = desk()
    page.route("**/review/label", lambda route: route.abort())
    page.keyboard.press("h")
    page.wait_for_selector("#problem:not([hidden])")
    assert "cannot be reached" in page.inner_text("#problem")
    page.complaints = [one for one in page.complaints if "ERR_FAILED" not in one]


def test_the_page_of_the_service_asks_for_name_and_key(chromium, tmp_path):
    labels = tmp_path / "labels.jsonl"
    with running(keys=["client"], admin_key="admin-key", review_labels=labels) as url:
        client = {"authorization": "Bearer client"}
        post(f"{url}/v1/score", json={"input": passed()}, headers=client)
        page = chromium.new_page(viewport=dict(width=390, height=844))
        page.goto(f"{url}/review")
        page.fill("#name", "Ann")
        page.fill("#key", "wrong")
        page.click("#enter button")
        says(page, "problem", "not the admin key")
        page.fill("#key", "admin-key")
        keep(page, "review-service")
        page.click("#enter button")
        tokens(page)
        assert page.inner_text("#text") == passed()
        press(page, "l")
        assert page.inner_text("#end-title") == "All prompts are labelled."
        page.close()
    assert '"reviewer": "Ann"' in labels.read_text()


COLOURS = """id => {
    const ground = (node) => {
        const own = getComputedStyle(node).backgroundColor;
        return own.startsWith('rgba') ? ground(node.parentElement) : own;
    };
    const node = document.getElementById(id);
    return [getComputedStyle(node).color, ground(node)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_it_is_readable_and_nothing_sticks_out(desk, folder, scheme, width):
    long = "Please summarise this letter. " + "The ferry leaves at nine, wind permitting. " * 30
    kept = items([*TEXTS, long, "w" * 300], [*SCORES, 0.05, 0.06])
    turns = (Message("system", "You help in a book shop."), Message("user", "Books on the sea?"))
    kept.add(item("And which of them is good for children?", 0.2, "chat-1", turns))
    page = desk(made_review(folder, kept), width=width, height=844, scheme=scheme)
    for name in ("text", "counts", "legend", "harmful", "harmless", "skip", "about", "last"):
        assert contrast(*page.evaluate(COLOURS, name)) >= 4.5, name
    for number in range(9):
        tokens(page)
        if number in (0, 6, 8):
            keep(page, f"review-{width}-{scheme}-{number}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        buttons = page.locator("#buttons button")
        for n in range(4):
            box = buttons.nth(n).bounding_box()
            assert box["height"] >= 44
            assert box["y"] + box["height"] <= 844
        press(page, "s")
