"""The site in Chromium, opened from its folder: narrow and wide, light and dark."""

import pytest

PAGES = ("index.html", "tutorials/first-guard.html", "reference/cli.html", "results/detection.html")
BROKEN = """() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"""
WIDTH = "document.documentElement.scrollWidth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_pages_are_whole_and_silent(chromium, site, width, scheme):
    logged, fetched = [], []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    for name in PAGES:
        page.goto((site / name).as_uri(), timeout=60_000)
        assert page.evaluate(BROKEN) == []
        assert page.evaluate(WIDTH) <= width
    page.close()
    assert logged == []
    own = ("file:", "data:", "blob:", "about:")
    assert [url for url in fetched if not url.startswith(own)] == []


def test_search_finds_a_page(chromium, site):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri(), timeout=60_000)
    page.click("button.md-search__button")
    page.fill("input[placeholder=Search]", "false-positive rate", timeout=60_000)
    page.wait_for_selector("text=Move a threshold >> visible=true", timeout=60_000)
    page.close()
