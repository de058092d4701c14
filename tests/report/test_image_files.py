"""Figures as files; PNG and SVG need a browser, and the rest of a report does not."""

import json
import os
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest

from latentguard.errors import LatentGuardError
from latentguard.report import charts
from latentguard.report import image_files as pictures
from latentguard.report.document import Figure, Report, Section, Table
from latentguard.report.image_files import write_pictures

BROWSER = next(filter(shutil.which, ("chromium", "google-chrome", "chrome")), None)


def figure(title, heights=(1, 3, 2)):
    return Figure(title, go.Figure(go.Bar(y=list(heights), name="bars")), "n = 3")


def report(*parts):
    return Report("Study", (Section("One", "", parts[:1]), Section("Two", "", parts[1:])))


@pytest.fixture
def jobs(monkeypatch):
    """No browser is started; what it would draw is noted."""
    noted = []
    monkeypatch.setattr(pictures, "_render", noted.extend)
    return noted


class TestFiles:
    def test_names_are_titles_numbered(self, jobs, tmp_path):
        table = Table("Bars", ("a",), ((1,),))
        found = write_pictures(report(figure("Bars: s^l"), table, figure("Bars: s^l")), tmp_path)
        folder = tmp_path / "figures"
        names = [f"bars-s-l{n}.{kind}" for n in ("", "-2") for kind in ("png", "svg", "pdf")]
        assert found == [folder / name for name in names]
        assert sorted(os.listdir(folder)) == ["bars-s-l-2.json", "bars-s-l.json"]
        assert [job["path"] for job in jobs] == found
        assert [job["opts"]["format"] for job in jobs] == ["png", "svg", "pdf"] * 2

    def test_json_draws_the_same_figure_again(self, jobs, tmp_path):
        one = figure("Bars")
        write_pictures(report(one), tmp_path)
        again = go.Figure(json.loads((tmp_path / "figures" / "bars.json").read_text()))
        assert again == one.plot

    def test_the_page_keeps_its_figures_as_they_are(self, jobs, tmp_path):
        one = figure("Bars")
        before = one.plot.to_json()
        write_pictures(report(one), tmp_path)
        assert one.plot.to_json() == before
        titles = {job["opts"]["format"]: job["fig"].layout.title.text for job in jobs}
        assert titles == {"png": "Bars", "svg": None, "pdf": None}  # a paper has its own captions

    def test_panels_are_printed_over_both_columns(self, jobs, tmp_path):
        curve = ([0.1, 0.2], [0.0, 0.1], [0.2, 0.3])
        how = dict(title="t", y="y", caption="c")
        one = charts.lines_by_layer({"a": curve, "b": curve}, [1, 2], **how)
        two = charts.lines_by_layer(
            {"a": curve, "b": curve}, [1, 2], **how, panels={"a": ["a"], "b": ["b"]}
        )
        write_pictures(report(one, two), tmp_path)
        widths = [job["opts"]["width"] for job in jobs if job["opts"]["format"] == "pdf"]
        assert widths == [pictures.PRINT_WIDTH, pictures.PRINT_PANELS_WIDTH]

    def test_no_figure_needs_no_browser(self, monkeypatch, tmp_path):
        monkeypatch.setenv("BROWSER_PATH", "/none")
        assert write_pictures(report(Table("T", ("a",), ())), tmp_path) == []

    def test_drawn_again_over_what_is_there(self, jobs, tmp_path):
        write_pictures(report(figure("Bars")), tmp_path)
        write_pictures(report(figure("Bars", (7, 8))), tmp_path)
        kept = json.loads((tmp_path / "figures" / "bars.json").read_text())
        assert go.Figure(kept).data[0].y == (7, 8)


class TestBrowsers:
    def test_none(self, monkeypatch, tmp_path):
        monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
        with pytest.raises(
            LatentGuardError, match=r"Chrome or Chromium, and none was found\. Inst"
        ):
            write_pictures(report(figure("Bars")), tmp_path)
        assert os.listdir(tmp_path / "figures") == ["bars.json"]

    def test_one_that_does_not_start(self, monkeypatch, tmp_path):
        broken = tmp_path / "chromium"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("BROWSER_PATH", str(broken))
        with pytest.raises(
            LatentGuardError, match=r"failed: .*close.*\. All else is kept\."
        ) as told:
            write_pictures(report(figure("Bars")), tmp_path)
        assert "\n" not in str(told.value)
        assert os.listdir(tmp_path / "figures") == ["bars.json"]

    def test_a_figure_that_it_cannot_draw(self, monkeypatch, tmp_path):
        import kaleido

        failures = (ValueError("no such font\nand more"), RuntimeError())
        monkeypatch.setattr(kaleido, "write_fig_from_object_sync", lambda jobs: failures)
        with pytest.raises(
            LatentGuardError, match=r"2 of 3 pictures were not drawn: no such font\. "
        ):
            write_pictures(report(figure("Bars")), tmp_path)

    @pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to draw with")
    def test_pictures(self, tmp_path):
        png, svg, pdf = write_pictures(report(figure("Bars of Fig. 2")), tmp_path)
        assert png_size(png) == (900, 520)
        drawn = svg.read_text()
        assert drawn.startswith("<svg")
        assert f'width="{pictures.PRINT_WIDTH}"' in drawn
        assert "Bars of Fig. 2" not in drawn
        assert pdf.read_bytes().startswith(b"%PDF")


def png_size(path: Path):
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
