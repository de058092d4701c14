"""Tables as people read them: one interval, one column; verdicts; folded texts."""

from latentguard.report.document import Table
from latentguard.report.page_table import FOLDED, TONES, page_table
from latentguard.study.claims import Verdict


def texts(page):
    return [[cell.text for cell in row] for row in page.rows]


def test_a_small_interval_among_large_ones_keeps_its_digits():
    rows = ((0.9, 0.8, 1.0), (0.005, 0.002, 0.006), (0.0, -0.001, 0.3))
    page = page_table(("value", "low", "high"), rows)
    shown = ["0.90 [0.80, 1.00]", "0.005 [0.002, 0.006]", "0.00 [0.00, 0.30]"]
    assert texts(page) == [[one] for one in shown]


def test_an_interval_takes_one_column():
    columns = ("what", "rate", "low", "high", "n", "gap", "gap, low", "gap, high", "its high")
    rows = ((("a"), 0.5, 0.25, 0.75, 8, 0.0123, 0.001, 0.02, 3),)
    page = page_table(columns, rows)
    assert page.columns == ("what", "rate", "n", "gap", "its high")
    assert texts(page) == [["a", "0.50 [0.25, 0.75]", "8", "0.012 [0.001, 0.020]", "3"]]
    assert [cell.is_number for cell in page.rows[0]] == [False, True, True, True, True]


def test_what_was_not_measured_has_no_brackets():
    page = page_table(("rate", "low", "high"), ((None, None, None), (0.5, None, None)))
    assert texts(page) == [[""], ["0.50"]]


def test_a_table_without_rows_keeps_its_heads():
    assert page_table(("a", "low", "high"), ()).columns == ("a",)


def test_csv_keeps_the_ends_apart_and_markdown_does_not():
    table = Table("T", ("rate", "low", "high"), ((0.5, 0.25, 0.75),))
    assert table.csv().splitlines() == ["rate,low,high", "0.5,0.25,0.75"]
    assert "| 0.50 [0.25, 0.75] |" in table.markdown()


def test_a_cell_cannot_break_out_of_its_markdown_row():
    assert r"| a\|b c |" in Table("T", ("x",), (("a|b\nc",),)).markdown()


def test_every_verdict_has_a_tone():
    assert set(Verdict.__args__) <= set(TONES)
    page = page_table(("verdict",), (("not replicated",), ("something",)))
    assert [row[0].tone for row in page.rows] == ["bad", ""]


def test_only_long_texts_are_folded():
    page = page_table(("x",), (("word " * FOLDED,), ("short",)))
    assert page.rows[0][0].summary.endswith("...") and page.rows[1][0].summary == ""
