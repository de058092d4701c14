"""What a report's page must be in a real browser."""


def check(chromium, path, width, scheme):
    """Every figure drawn, nothing logged, nothing fetched, nothing cut off, text readable."""
    logged, fetched = [], []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(path.as_uri(), timeout=120_000)  # megabytes of figures, on a busy machine
    page.wait_for_function(DRAWN, timeout=60_000)
    assert logged == []
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    ink, paper = page.evaluate(COLOURS)
    assert contrast(ink, paper) >= 7
    page.close()


DRAWN = """() => [...document.querySelectorAll('.plot')].every(plot => {
    const drawn = plot.querySelector('.main-svg');
    return drawn && drawn.clientHeight > 100;
})"""

OUTSIDE = """() => [...document.querySelectorAll('.plot .main-svg, h1, h2, h3, p, nav')]
    .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80))"""

COLOURS = (
    """() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"""
)


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
