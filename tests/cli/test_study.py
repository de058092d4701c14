"""``latentguard study`` as its user calls it: the folder, and what it says of bad input."""

import json

import pytest

from models.architectures import chat_model

SMALL = """
asked = 8
fit = 4
test = 4
reply_tokens = 4
inverted = 2
inversion_templates = 1
random_draws = 1
layer_step = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_the_report_is_written(lg, folder, config, tmp_path):
    out = tmp_path / "report"
    words = ("study", folder, "--out", out, "--config", config, "--only", "template")
    code, printed, err = lg(*words, "--only", "clusters")
    assert code == 0, err
    assert printed.splitlines()[-1] == str(out / "report.html")
    report = json.loads((out / "report.json").read_text())
    assert report["meta"]["settings"]["asked"] == 8
    assert {"Claims", "Conditions", "Groups"} <= {t["title"] for t in report["tables"]}
    assert (out / "tables" / "claims.csv").exists()
    assert (out / "figures").is_dir()


def test_several_models_are_studied_and_compared(lg, folder, config, tmp_path, monkeypatch):
    from latentguard.report import image_files as pictures

    monkeypatch.setattr(pictures, "_render", lambda jobs: None)
    other = tmp_path / "other-1.5b"
    other.symlink_to(folder)
    out = tmp_path / "report"
    code, printed, err = lg(
        *("study", folder, other, "--out", out, "--config", config, "--only", "clusters")
    )
    assert code == 0, err
    assert printed.splitlines()[-1] == str(out / "report.html")
    tables = json.loads((out / "report.json").read_text())["tables"]
    assert tables[0]["columns"][2:] == ["tiny, controlled", "other-1.5b, controlled"]
    assert (out / "tiny" / "store.sqlite").exists() and (
        out / "other-1-5b" / "report.html"
    ).exists()
    words = ("compare", out / "tiny", out / "other-1-5b", "--out", tmp_path / "again")
    code, printed, err = lg(*words)
    assert code == 0, err
    assert json.loads((tmp_path / "again" / "report.json").read_text())["tables"] == tables


def test_study_hands_the_device_map_to_the_loader(lg, folder, config, tmp_path):
    words = ("study", folder, "--out", tmp_path / "r", "--config", config, "--device-map")
    code, _, err = lg(*words, "nowhere", "--only", "template")
    assert (code, "nowhere" in err) == (1, True), err
    assert lg(*words, "auto", "--only", "template")[0] == 0


def test_without_a_browser_the_page_is_there(lg, folder, config, tmp_path, monkeypatch):
    from latentguard.errors import LatentGuardError
    from latentguard.report import image_files as pictures

    def no_browser(report, folder):
        raise LatentGuardError("No Chrome.")

    monkeypatch.setattr(pictures, "write_pictures", no_browser)
    out = tmp_path / "report"
    code, _, err = lg("study", folder, "--out", out, "--config", config, "--only", "clusters")
    assert code == 0
    assert "Warning: No Chrome." in err
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "inverse"], "There is no experiment 'inverse'; expected template, clusters"),
        (["--data-dir", "nowhere"], "--data-dir should be a folder; found nothing at nowhere"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_bad_input_is_named_before_the_model_loads(lg, tmp_path, words, said):
    code, _, err = lg("study", "default", "--out", tmp_path / "r", *words)
    assert code == 1
    assert said in err
    assert "Loading" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("askd = 3", "there is no setting 'askd'"),
        ("asked = 'many'", "'asked' should be like"),
        ("asked = ", "is not TOML"),
        ("[data]\nharmfull = ['x.jsonl']", "there is no pool 'harmfull'"),
        ("judge = 3", "'judge' should be a table"),
    ],
)
def test_a_bad_configuration_is_named(lg, tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    code, _, err = lg("study", "default", "--out", tmp_path / "r", "--config", path)
    assert code == 1
    assert said in err


def test_label_hands_the_device_map_to_the_loader(lg, folder, tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(dict(text="Name a thing.")) + "\n", encoding="utf-8")
    words = ("label", asked, "--model", folder, "--out", tmp_path / "out.jsonl", "--device-map")
    code, _, err = lg(*words, "nowhere")
    assert (code, "nowhere" in err) == (1, True), err
    assert lg(*words, "auto")[0] == 0
    assert "refused" in json.loads((tmp_path / "out.jsonl").read_text())


def test_a_judge_is_named_whole(lg, folder, tmp_path):
    path = tmp_path / "judge.toml"
    path.write_text("[judge]\nurl = 'http://localhost:1/v1'", encoding="utf-8")
    code, _, err = lg("study", folder, "--out", tmp_path / "r", "--config", path)
    assert code == 1
    assert "The table [judge] needs 'url' and 'model'" in err
