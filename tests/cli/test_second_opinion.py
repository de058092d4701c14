"""``--second-opinion`` of the verbs, on a tiny random model."""

import json

import pytest

from cli.tiny_files import rows, written
from guard.opinion_server import opinion_server
from latentguard.benchmark import run
from latentguard.guard.latent_guard import LatentGuard
from latentguard.prompts import Prompt


def sly(body):
    """Flags what holds the word "sly"."""
    return {"results": [{"flagged": "sly" in body["input"].split()}]}


@pytest.fixture
def server():
    with opinion_server(sly) as running:
        yield running


def verdicts(text):
    return [json.loads(line) for line in text.splitlines()]


RATES = ("--max-fpr", "0.1", "--review-fpr", "0.6")


@pytest.fixture
def url(server):
    return f"{server.url}/moderations"


@pytest.fixture
def ready(lg, guard, files, url):
    code, _, err = lg(
        "calibrate", guard, "--harmless", files["plain"], *RATES, "--second-opinion", url
    )
    assert code == 0, err
    return guard


class TestCalibrate:
    def test_the_guard_keeps_what_it_was_calibrated_with(self, ready, url, server):
        loaded = LatentGuard.load(ready)
        record = loaded.thresholds.second_opinion
        assert (record.name, record.blocked) == (url, 0)
        assert record.asked == len(server.asked) - 1  # the first is a trial
        assert loaded.bound.upper <= 0.1

    def test_it_prints_the_joint_promise(self, lg, guard, files, url):
        words = ["calibrate", guard, "--harmless", files["plain"], "--max-fpr", "0.1"]
        code, out, _ = lg(*words, "--second-opinion", url)
        assert code == 0
        assert f"with the second opinion {url}" in out
        assert f"Calibrated with the second opinion `{url}`" in out
        assert LatentGuard.load(guard).thresholds.common.review.max_fpr == 0.2
        assert f"with the second opinion {url}" in lg("show", guard)[1]

    def test_what_both_together_catch_is_compared(self, lg, guard, files, url, tmp_path):
        """The second opinion catches all of the band, so no less than the guard alone."""
        harmful = written(tmp_path / "sly.jsonl", rows(60, "sly", "harmful", start=900))
        words = ["--harmless", files["plain"], "--harmful", harmful, *RATES]
        code, out, err = lg("calibrate", guard, *words, "--second-opinion", url)
        assert code == 0, err
        assert "caught" in out
        assert "worse" not in err

    def test_one_that_blocks_too_much_is_reported(self, lg, guard, files):
        with opinion_server(lambda body: {"results": [{"flagged": True}]}) as strict:
            words = ["--second-opinion", f"{strict.url}/moderations"]
            code, _, err = lg("calibrate", guard, "--harmless", files["plain"], *RATES, *words)
        assert code == 0
        assert "Warning: the second opinion blocks so many harmless prompts" in err

    def test_too_few_prompts_are_noticed_before_a_model_is_loaded(self, lg, guard, files, url):
        words = ["--harmless", files["few"], "--max-fpr", "0.14", "--review-fpr", "0.5"]
        code, _, err = lg("calibrate", guard, *words, "--second-opinion", url)
        assert code == 1
        assert "with a second opinion; give at least" in err
        assert "Loading" not in err

    @pytest.mark.parametrize(
        "words", [["--balanced"], ["--segment-column", "id"], ["--cost-ratio", "5"]]
    )
    def test_what_does_not_go_with_it(self, fails, guard, files, url, words):
        more = ["--harmless", files["plain"], "--harmful", files["mixed"]]
        said = fails("calibrate", guard, *more, *words, "--second-opinion", url)
        assert "--second-opinion calibrates one rate" in said

    def test_an_endpoint_that_is_not_there(self, lg, guard, files):
        with opinion_server() as gone:
            url = f"{gone.url}/moderations"
        words = ["calibrate", guard, "--harmless", files["plain"], *RATES, "--second-opinion", url]
        code, _, err = lg(*words)
        assert code == 1
        assert f"The second opinion at {url} does not answer" in err


class TestScore:
    def test_the_band_is_decided_by_the_second_opinion(self, lg, ready, files, url):
        alone = verdicts(lg("score", ready, files["plain"])[1])
        code, out, err = lg("score", ready, files["plain"], "--second-opinion", url)
        assert code == 0
        assert "Warning" not in err
        band = [row for row in alone if row["decision"] == "review"]
        assert band
        for before, row in zip(alone, verdicts(out), strict=True):
            expected = "allow" if before in band else before["decision"]
            assert row["decision"] == expected
            assert row["second_opinion"] == ("allow" if before in band else None)
            assert row["calibrated"]

    def test_to_a_file(self, lg, ready, files, url, tmp_path):
        out = tmp_path / "verdicts.jsonl"
        words = ["score", ready, files["plain"], "--second-opinion", url]
        assert lg(*words, "--out", out)[0] == 0
        assert out.read_text() == lg(*words)[1]

    def test_another_guard_as_second_opinion(self, lg, ready, tiny_guard, files):
        code, out, err = lg("score", ready, files["plain"], "--second-opinion", tiny_guard)
        assert code == 0
        assert "so nothing is promised of both together" in err
        rows = verdicts(out)
        assert {row["second_opinion"] for row in rows} >= {None, "allow"}
        assert not any(row["calibrated"] for row in rows)
        assert {row["operating_point"] for row in rows} == {None}

    def test_a_guard_without_a_band(self, fails, guard, files, url):
        assert "no review band" in fails("score", guard, files["plain"], "--second-opinion", url)

    def test_what_does_not_go_with_it(self, lg, ready, files, url):
        for more in (["--replies"], ["--engine", "ray"]):
            code, _, err = lg("score", ready, files["plain"], "--second-opinion", url, *more)
            assert code == 2
            assert "--second-opinion" in err


class TestEvaluate:
    def test_shares_are_those_of_both_together(self, lg, ready, files, url, tmp_path):
        """All of the band is asked about, and the second opinion tells the kinds apart."""
        mixed = rows(40, "sly", "harmful", start=50) + rows(40, "kind", "harmless", start=900)
        labelled = written(tmp_path / "labelled.jsonl", mixed)
        words = ["evaluate", ready, labelled, "--json"]
        alone = json.loads(lg(*words)[1])["total"]
        code, out, err = lg(*words, "--second-opinion", url)
        both = json.loads(out)["total"]
        assert code == 0, err
        assert both["caught"]["value"] > alone["caught"]["value"]
        assert both["falsely_flagged"]["value"] <= alone["falsely_flagged"]["value"]


class TestBenchmark:
    def test_decisions_are_those_of_both_together(
        self, lg, ready, url, server, tmp_path, monkeypatch
    ):
        few = [Prompt(f"{w} {n}", harmful=w == "sly") for n in range(9) for w in ("sly", "ok")]
        monkeypatch.setattr(run, "load_training_rows", lambda: few)
        mixed = rows(20, "sly", "harmful", start=700) + rows(20, "kind", "harmless", start=700)
        written(tmp_path / "xstest.jsonl", mixed)
        out = tmp_path / "report"
        server.asked.clear()
        words = ["benchmark", ready, "--data-dir", tmp_path, "--out", out]
        code, said, err = lg(*words, "--second-opinion", url)
        assert code == 0, err
        assert f"with the second opinion {url}" in said
        asked = {body["input"] for _, _, body in server.asked if "sly" in body["input"]}
        assert asked
        [found] = json.loads((out / "figures.json").read_text())["sets"]
        assert found["asked"]["harmful"]["value"] == len(asked) / 20
        assert found["figures"]["this guard"]["recall"]["value"] >= len(asked) / 20
