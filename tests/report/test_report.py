"""Reports: self-contained pages, tables in four forms, files that are whole or not there."""

import csv
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from latentguard.report import charts
from latentguard.report.document import (
    FIGURE_FORMATS,
    Figure,
    Report,
    Section,
    Table,
    file_names,
    format_cell,
    remove_report,
    slug,
)
from latentguard.stats.estimate import Estimate

EVIL = "</script><script>alert('x')</script>"
TABLE = Table(
    "Rates & more",
    ("set", "value", "n", "good"),
    (("a,b", 0.123456, 3, True), ('say "x"', 1.0, 0, False), (EVIL, None, -2, None)),
    note=f"n = 3 {EVIL}",
)


def figure(title="Scores", caption="What"):
    scores, labels = np.arange(20.0), np.arange(20) > 9
    plot = charts.score_histogram(scores, labels, 9.5, of=title).plot
    return Figure(title, plot, caption)


@pytest.fixture(scope="module")
def report():
    parts = (TABLE, figure(), figure(EVIL, EVIL))
    sections = (Section("First", f"About {EVIL}", parts), Section(EVIL, "Second."))
    return Report(f"Title {EVIL}", sections, {"model": EVIL, "n": 3, "nested": {"a": [1.5]}})


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._inside = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside.append(tag)

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._inside[-1] if self._inside else ""
        (self.scripts if inside == "script" else self.text).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html())


class TestInANotebook:
    def test_repr_names_the_sections_and_counts_the_parts(self, report):
        assert repr(report).startswith("Report(")
        assert "1 table, 2 figures; sections: First, " in repr(report)
        assert len(repr(report)) < 300

    def test_a_report_is_shown_as_its_page_in_a_frame(self, report):
        (frame,) = Page(report._repr_html_()).of("iframe")
        assert frame["srcdoc"] == report.html()

    def test_repr_of_a_table_gives_its_size(self):
        assert repr(TABLE) == "Table('Rates & more', 3 rows x 4 columns)"

    def test_a_table_is_shown_with_its_cells_escaped(self):
        page = Page(TABLE._repr_html_())
        assert [len(page.of(tag)) for tag in ("th", "td", "script")] == [4, 12, 0]
        assert EVIL in page.text

    def test_a_figure_is_shown_as_plotly_shows_it(self):
        shown = figure("Scores", "What")
        assert repr(shown) == "Figure('Scores', 'What')"
        assert shown._repr_mimebundle_() == shown.plot._repr_mimebundle_()


class TestPage:
    def test_no_request_leaves_it(self, report, page):
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                if name in ("src", "href", "action", "data", "poster", "srcset"):
                    assert value.startswith(("#", "data:")), (tag, name, value)
        styles = report.html().partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in styles
        assert "@import" not in styles
        assert not any("src" in attributes for attributes in page.of("script"))

    def test_texts_are_escaped(self, page):
        shown = "".join(page.text)
        assert shown.count(EVIL) >= 5  # titles, text, cell, note, caption, provenance
        own = [s for s in page.scripts if "alert(" in s and "plotly" not in s.lower()[:2000]]
        assert own == []
        kinds = [attributes.get("type") for attributes in page.of("script")]
        assert kinds == [None, "application/json", "application/json", None]

    def test_every_section_can_be_reached(self, page):
        places = {attributes["id"] for attributes in page.of("section")}
        assert {"first", "provenance"} <= places
        links = {attributes["href"].removeprefix("#") for attributes in page.of("a")}
        assert links == places

    def test_cells(self, page):
        cells = "".join(page.text)
        for words in ("0.123", "1.000", "yes", "no", "a,b", 'say "x"', "n = 3"):
            assert words in cells

    def test_figures_are_data_that_plotly_reads(self, page):
        data = [json.loads(s) for s in page.scripts if s.lstrip().startswith('{"data"')]
        assert len(data) == 2
        assert [trace["name"] for trace in data[0]["data"]] == ["harmless", "harmful"]
        assert data[0]["data"][0]["x"] == [float(n) for n in range(10)]  # no packed arrays

    def test_provenance(self, page):
        assert '"nested": {' in "".join(page.text)

    def test_figures_are_described_for_those_who_do_not_see_them(self, page):
        labels = [a["aria-label"] for a in page.of("div") if a.get("role") == "img"]
        assert labels == ["Scores. What", f"{EVIL}. {EVIL}"]


class TestTable:
    def test_csv(self):
        rows = list(csv.reader(io.StringIO(TABLE.csv())))
        assert rows[0] == ["set", "value", "n", "good"]
        assert rows[1] == ["a,b", "0.123456", "3", "True"]
        assert rows[2] == ['say "x"', "1.0", "0", "False"]
        assert rows[3] == [EVIL, "", "-2", ""]

    @pytest.mark.parametrize(
        ("cell", "text"),
        [(None, ""), (True, "yes"), (False, "no"), (3, "3"), (0.98765, "0.988"), ("x", "x")],
    )
    def test_show(self, cell, text):
        assert format_cell(cell) == text


class TestFiles:
    def test_what_is_saved(self, report, tmp_path):
        folder = report.save(tmp_path / "new" / "r")
        files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
        assert files == {"report.html", "report.json", "tables/rates-more.csv"}
        assert (folder / "report.html").read_text("utf-8") == report.html()
        assert (folder / "tables" / "rates-more.csv").read_text() == TABLE.csv()

    def test_json(self, report, tmp_path):
        read = json.loads((report.save(tmp_path) / "report.json").read_text())
        assert read["title"] == report.title
        assert read["meta"] == report.meta
        assert [t["title"] for t in read["tables"]] == ["Rates & more"]
        assert read["tables"][0]["rows"][1] == ['say "x"', 1.0, 0, False]
        assert read["tables"][0]["columns"] == ["set", "value", "n", "good"]
        assert read["tables"][0]["note"] == TABLE.note

    def test_two_tables_of_one_title_do_not_overwrite_each_other(self, tmp_path):
        parts = (Table("Rates", ("a",), ((1,),)), Table("Rates!", ("a",), ((2,),)))
        folder = Report("r", (Section("s", parts=parts),)).save(tmp_path)
        found = sorted(f.read_text() for f in (folder / "tables").iterdir())
        assert found == ["a\n1\n", "a\n2\n"]

    def test_an_earlier_report_leaves_nothing_behind_and_other_files_stay(self, report, tmp_path):
        parts = (Table("Old", ("a",), ((1,),)), figure("Old picture"), report.figures[0])
        Report("old", (Section("s", parts=parts),)).save(tmp_path)
        again = file_names(["Old picture", report.figures[0].title])
        mine = [tmp_path / "tables" / "mine.csv", tmp_path / "figures" / "mine.png"]
        (tmp_path / "figures").mkdir()
        for path in (
            *mine,
            *(tmp_path / "figures" / f"{n}.{k}" for n in again for k in FIGURE_FORMATS),
        ):
            path.touch()
        report.save(tmp_path)  # pictures of the same titles go too: they show what was found then
        assert {f.name for f in (tmp_path / "tables").iterdir()} == {"rates-more.csv", "mine.csv"}
        assert [f.name for f in (tmp_path / "figures").iterdir()] == ["mine.png"]

    def test_it_is_cleared_away(self, report, tmp_path):
        remove_report(report.save(tmp_path / "r"))
        assert not (tmp_path / "r").exists()
        (report.save(tmp_path / "r") / "tables" / "mine.csv").touch()
        remove_report(tmp_path / "r")
        assert [f.name for f in (tmp_path / "r").rglob("*")] == ["tables", "mine.csv"]

    @pytest.mark.parametrize("held", ["", "[]", "{}", '{"tables": [1], "figures": []}', "\udc00"])
    def test_a_file_of_the_reports_name_that_is_none(self, report, tmp_path, held):
        (tmp_path / "report.json").write_bytes(held.encode("utf-8", "surrogatepass"))
        report.save(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["figures"]

    @pytest.mark.parametrize(
        ("title", "name"), [("A  b/c: D!", "a-b-c-d"), ("../../etc", "etc"), ("Δ rates", "rates")]
    )
    def test_slug(self, title, name):
        assert slug(title) == name


class TestPlots:
    def test_histogram_of_equal_scores(self):
        found = charts.score_histogram(np.ones(4), np.arange(4) > 1, 0.5, of="x")
        assert found.title == "Scores on x"
        assert "2 harmful, 2 harmless" in found.caption
        assert found.plot.data[0].xbins.size > 0

    def test_roc(self):
        labels, scores = np.array([0, 0, 1, 1], dtype=bool), np.array([1.0, 2.0, 3.0, 4.0])
        found = charts.roc_curves({"ours": scores, "theirs": -scores}, labels, of="x").plot
        assert [trace.name for trace in found.data] == ["ours", "theirs", "chance"]
        assert (found.data[0].x[-1], found.data[0].y[-1]) == (1.0, 1.0)
        assert max(y for x, y in zip(found.data[0].x, found.data[0].y, strict=True) if x == 0) == 1

    def test_every_rule_gets_a_curve(self):
        labels = np.array([0, 1], dtype=bool)
        rules = {f"rule {n}": np.array([0.0, 1.0]) for n in range(9)}
        assert len(charts.roc_curves(rules, labels, of="x").plot.data) == 10

    def test_labels_are_whole_and_keep_their_places(self):
        names = ["jailbreak: persuasion: logical appeal", "jailbreak: persuasion: endorsement"]
        found = charts.heat_map([[0.1, 0.2]], ["row"], names, title="t", caption="c").plot
        assert found.data[0].x is None and list(found.layout.xaxis.tickvals) == [0, 1]
        shown = [label.replace("<br>", " ") for label in found.layout.xaxis.ticktext]
        assert shown == names  # whole
        assert found.data[0].hovertext[0][1] == f"row, {names[1]}"
        one = Estimate(0.5, 0.4, 0.6, (3, 0))
        found = charts.dot_plot(names, {"s": [one, one]}, title="t", x="x", caption="c").plot
        assert list(found.data[0].y) == [0, 1]

    def test_lines(self):
        curve = ([0.5, 0.9], [0.4, 0.8], [0.6, 1.0])
        found = charts.lines_by_layer({"s": curve}, [1, 2], title="t", y="AUROC", caption="c")
        band, line = found.plot.data
        assert list(band.x) == [1, 2, 2, 1]
        assert list(band.y) == [0.6, 1.0, 0.8, 0.4]
        assert list(line.y) == [0.5, 0.9]

    def test_lines_as_numbers_are_in_the_report(self, tmp_path):
        curve = ([0.5, float("nan")], [0.4, 0.8], [0.6, 1.0])
        found = charts.lines_by_layer(
            {"s (n = 3)": curve}, [1, 2], title="t", y="AUROC", caption=""
        )
        read = json.loads(
            (Report("r", (Section("s", "", (found,)),)).save(tmp_path) / "report.json").read_text()
        )
        (curves,) = read["curves"]
        assert (curves["title"], curves["y"]) == ("t", "AUROC")
        assert curves["series"] == [
            dict(
                name="s (n = 3)",
                places=[1, 2],
                value=[0.5, None],
                low=[0.4, 0.8],
                high=[0.6, 1.0],
            )
        ]

    def test_layers_that_were_not_run_have_no_band(self):
        curve = ([0.5, 0.9, 0.7], [0.4, 0.8, 0.6], [0.6, 1.0, 0.8])
        how = dict(title="t", y="y", caption="")
        (points,) = charts.lines_by_layer({"s": curve}, [2, 6, 10], **how).plot.data
        assert points.fill is None
        assert list(points.error_y.array) == pytest.approx([0.1, 0.1, 0.1])

    def test_shares_are_stacked_only_at_layers_that_were_run(self):
        shares = {"Certainly": [0.2, 0.3], "No": [0.8, 0.7]}
        found = charts.stacked_shares(shares, [0, 15], title="t", caption="").plot
        assert {trace.type for trace in found.data} == {"bar"}
        assert [list(trace.x) for trace in found.data] == [["0", "15"]] * 2
        assert found.layout.xaxis.type == "category"

    def test_a_control_stands_beside_the_curve_that_it_is_named_after(self):
        names = ("harmfulness", "random, norm of harmfulness", "refusal", "random, norm of refusal")
        assert charts.control_panels(dict.fromkeys(names)) == {
            "harmfulness": names[:2],
            "refusal": names[2:],
        }
        assert charts.control_panels(dict.fromkeys(("a", "b", "random"))) == {
            "a": ("a", "random"),
            "b": ("b", "random"),
        }

    def test_each_panel_has_its_curves_and_the_legend_names_each_once(self):
        curve = ([0.5, 0.9], [0.4, 0.8], [0.6, 1.0])
        curves = {f"{group}, {at}": curve for at in ("x", "y") for group in ("g", "h")}
        panels = {at: [f"g, {at}", f"h, {at}"] for at in ("x", "y")}
        plot = charts.lines_by_layer(
            curves, [1, 2], title="t", y="y", caption="", zero=True, panels=panels
        ).plot
        assert {trace.xaxis for trace in plot.data} == {"x", "x2"}
        assert [trace.name for trace in plot.data if trace.showlegend] == ["g", "h"]
        assert len(plot.layout.shapes) == 2
        assert plot.layout.meta["panels"] == 2
        assert plot.layout.yaxis2.matches == "y"

    def test_every_curve_of_a_lone_panel_is_in_the_legend(self):
        curves = {n: ([0.5], [0.4], [0.6]) for n in ("harmfulness", "random, norm of harmfulness")}
        panels = charts.control_panels(curves)
        how = dict(title="t", y="y", caption="", panels=panels, limits=charts.SHARE)
        plot = charts.lines_by_layer(curves, [1], **how).plot
        assert {trace.name for trace in plot.data if trace.showlegend} == set(curves)
        assert plot.layout.yaxis.autorangeoptions.maxallowed == charts.SHARE["maxallowed"]

    def test_a_heat_map_parts_its_colours_at_a_half(self):
        how = dict(title="t", caption="")
        assert charts.heat_map([[0.1]], ["a"], ["b"], **how).plot.data[0].zmid == 0.5
        assert charts.heat_map([[0.1]], ["a"], ["b"], **how, middle=None).plot.data[0].zmid is None

    def test_bars_of_the_same_name_stay_apart(self):
        names = ["same words " * 9 + "a", "same words " * 9 + "b"]
        found = charts.bar_chart(names, [0.1, 0.9], title="t", x="x", caption="c").plot
        assert list(found.data[0].x) == [0.1, 0.9]
        assert len(set(found.data[0].y)) == 2
        lines = [line for label in found.layout.yaxis.ticktext for line in label.split("<br>")]
        assert max(map(len, lines)) <= 48
