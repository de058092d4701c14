"""Several reports on one page: verdicts as they were, curves on each other, nothing else."""

import json
from dataclasses import replace

import pytest

from latentguard.errors import StudyError
from latentguard.report import charts
from latentguard.report.document import Report, Section
from latentguard.stats.estimate import Estimate
from latentguard.study.claims import CLAIMS
from latentguard.study.claims_report import COLUMNS, claims_section
from latentguard.study.compare import compare, read_reports

DROP = CLAIMS[0].conditions[0].effect


def saved(folder, name, protocol, value, *, depth=4, curve=0.5):
    """A report whose first claim rests on one effect, with one curve for each layer."""
    effect = Estimate(value, value - 0.25, value + 0.25, (30, 0))
    line = ([curve] * depth, [curve - 0.1] * depth, [curve + 0.1] * depth)
    figure = charts.lines_by_layer(
        {"accepted harmful (n = 5)": line, "random": line},
        range(1, depth + 1),
        title="Clusters at t_inst",
        y="s",
        caption="n = 5",
    )
    meta = dict(
        name=name,
        depth=depth,
        model=dict(model=f"/home/me/{name}", weights="f" * 64),
        settings=dict(protocol=protocol, fit=depth),
        template="own",
        pools=dict(harmful=dict(n=3)),
        judge="built-in",
        versions=dict(latentguard="1"),
    )
    sections = (claims_section({"template": {DROP: effect}}), Section("Figure 2", "", (figure,)))
    return Report(f"Study of {name}", sections, meta).save(folder)


@pytest.fixture
def folders(tmp_path):
    return [
        saved(tmp_path / "a", "small", "controlled", 0.4),
        saved(tmp_path / "b", "small", "paper", -0.4),
        saved(tmp_path / "c", "large", "paper", 0.0, depth=8, curve=0.7),
    ]


def test_each_verdict_stands_under_its_report(folders):
    report = compare(read_reports(folders))
    verdicts, claims = report.tables[:2]
    assert verdicts.columns == ("", "claim", "small, controlled", "small, paper", "large, paper")
    assert verdicts.rows[0] == (
        *(1, CLAIMS[0].name),
        *("replicated", "not replicated", "cannot tell"),
    )
    assert len(verdicts.rows) == len(CLAIMS)
    assert len(claims.rows) == 3 * len(CLAIMS)
    assert claims.columns[3:] == COLUMNS[2:-1]
    assert claims.rows[1][2:6] == (
        "small, paper",
        "not replicated",
        f"{DROP} > 0",
        -0.4,
    )


def test_two_sentences_say_where_reports_agree(folders):
    (text, *_) = (section.text for section in compare(read_reports(folders)).sections)
    rest = ", ".join(str(n) for n in range(2, len(CLAIMS) + 1))
    assert text == (
        f"{len(CLAIMS) - 1} of {len(CLAIMS)} claims have the same verdict in all 3 reports: "
        f"{len(CLAIMS) - 1} were not run ({rest}). Verdicts differ on claim 1; claim 1 is "
        "replicated in one report and not replicated in another."
    )
    same = compare(read_reports([folders[0], saved(folders[0].parent / "d", "x", "paper", 0.5)]))
    assert same.sections[0].text.endswith("The reports differ in no verdict.")


def test_curves_of_models_of_other_depths_share_the_depth(folders):
    (figure,) = compare(read_reports(folders)).figures
    lines = {trace.name: trace for trace in figure.plot.data if trace.showlegend}
    assert set(lines) == {"small, controlled", "small, paper", "large, paper"}
    assert list(lines["small, paper"].x) == [0.25, 0.5, 0.75, 1.0]
    assert lines["large, paper"].x[-1] == 1.0 and len(lines["large, paper"].x) == 8
    assert "depth" in figure.plot.layout.xaxis.title.text


def test_curves_of_models_of_one_depth_keep_their_layers(folders):
    (figure,) = compare(read_reports(folders[:2])).figures
    assert list(figure.plot.data[1].x) == [1, 2, 3, 4]
    assert figure.plot.layout.xaxis.title.text == "layer (blocks passed)"


def test_settings_that_differ_are_shown(folders):
    (table,) = (t for t in compare(read_reports(folders)).tables if "differently" in t.title)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows == {"protocol": ("controlled", "paper", "paper"), "fit": ("4", "4", "8")}


def test_reports_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [saved(tmp_path / name, "m", "paper", 0.1) for name in ("step-1", "step-2")]
    labels = [one.label for one in read_reports(folders)]
    assert labels == ["m, paper (step-1)", "m, paper (step-2)"]
    with pytest.raises(StudyError, match="named twice"):
        read_reports([folders[0], folders[0]])


@pytest.mark.parametrize("content", [None, "{", "[]", '{"tables": [], "meta": {}}'])
def test_a_folder_that_is_no_report_is_named(tmp_path, content):
    folder = tmp_path / "r"
    folder.mkdir()
    if content is not None:
        (folder / "report.json").write_text(content)
    with pytest.raises(StudyError, match=str(folder)):
        read_reports([folder])


def test_a_report_of_an_earlier_version_says_what_to_do(folders):
    path = folders[0] / "report.json"
    record = json.loads(path.read_text())
    del record["curves"]
    path.write_text(json.dumps(record))
    with pytest.raises(StudyError, match="Run 'latentguard study' again with the same --out"):
        read_reports(folders)


def test_figures_keep_the_colour_of_each_report(folders):
    first, _, third = read_reports(folders)
    two = replace(third, curves={"Clusters at t_inst": third.curves["Clusters at t_inst"]})
    both, pair = (compare(of).figures[0] for of in ([first, two], [first, two, first]))
    colours = [
        {t.name: t.line.color for t in f.plot.data if t.showlegend}[third.label]
        for f in (both, pair)
    ]
    assert colours[0] == colours[1]
