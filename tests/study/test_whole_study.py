"""The whole study on a tiny random model: every experiment, once; killed; resumed; in a browser."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from browser.pages import check
from latentguard.errors import LatentGuardError, StudyError
from latentguard.report.document import Report
from latentguard.study.cached_model import CachedModel
from latentguard.study.claims import CLAIMS
from latentguard.study.run import EXPERIMENTS, STORE, Study, run
from models.architectures import chat_model
from study.small_study import PAPER_SETTINGS, save_study, study_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An unbroken study, saved; its folder."""
    out = tmp_path_factory.mktemp("whole")
    study_report(folder, out).save(out)
    return out


def test_every_experiment_has_its_section(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Not run:" not in page
    titles = [t["title"] for t in json.loads((whole / "report.json").read_text())["tables"]]
    assert titles[:2] == ["Claims", "Conditions"]
    assert len(titles) > len(EXPERIMENTS)


@pytest.fixture(scope="module")
def paper(folder, tmp_path_factory):
    """The same under the authors' protocol: its tables and meta."""
    out = tmp_path_factory.mktemp("paper")
    study_report(folder, out, PAPER_SETTINGS).save(out)
    assert "Not run:" not in (out / "report.html").read_text(encoding="utf-8")
    return json.loads((out / "report.json").read_text())


def test_the_authors_protocol_runs_whole_and_says_by_what_it_deviates(paper):
    tables = {t["title"]: t for t in paper["tables"]}
    assert paper["meta"]["settings"]["protocol"] == "paper"
    assert paper["meta"]["template"] == "the model's own chat template"
    beside = [row[-1] for row in tables["Claims"]["rows"]]
    assert all("template: the model's own chat template (Table 4)" in cell for cell in beside)
    found = {row[0] for row in tables["Deviations from the protocol"]["rows"]}
    assert {"template", "judge", "fit", "steered", "prompts: harmful"} <= found
    assert "built-in judge: refused" in tables["Refusal rates"]["columns"]
    printed = {"Figure 9b as printed", "Table 8: ToxicChat", "Table 9: one category at a time"}
    printed |= {"Held-out prompts along the refusal direction", "Fine-tuning, run by run"}
    assert printed <= set(tables)


def test_examples_are_shown_only_when_texts_are_asked_for(folder, whole):
    """Tables 5, 10, 11 and Figure 19 hold prompts and replies."""
    titles = ("Table 5: refused harmless prompts", "Table 11: jailbreak prompts")
    shown = study_report(folder, whole, only=["beliefs"], show_prompts=True)
    hidden = study_report(folder, whole, only=["beliefs"])
    assert set(titles) <= {table.title for table in shown.tables}
    assert not set(titles) & {table.title for table in hidden.tables}


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_is_drawn_whole(chromium, whole, width, scheme):
    check(chromium, whole / "report.html", width, scheme)


def test_every_claim_is_measured(whole):
    """Each condition names an effect that its experiment makes when all groups are there."""
    conditions = json.loads((whole / "report.json").read_text())["tables"][1]["rows"]
    assert len(conditions) >= sum(len(claim.conditions) + len(claim.form) for claim in CLAIMS)
    missing = {row[2].split(" > ")[0].split(" < ")[0] for row in conditions if row[3] is None}
    assert missing <= NOT_ON_A_RANDOM_MODEL


NOT_ON_A_RANDOM_MODEL = {
    "drop without post-instruction tokens",  # it does not answer
    "No along reverse harmfulness minus random",  # nor does it say Certainly or No
    "No along reverse harmfulness minus reverse refusal",
    "Certainly along harmfulness minus random",
    "Certainly along reverse refusal, where it acts, surely",
    "change of Delta_harmful over its gap to harmless",  # its beliefs may have no gap
    "guard recall after minus before",  # nor does its guard catch half before
    "cosine, refusal minus harmfulness",  # one category may have no two refused prompts
    "cosine, refusal minus harmfulness, beyond chance",
    "Latent Guard minus baseline guard accuracy",  # no guard model is given
    "flip to Certainly, t_inst minus the strongest other position",  # no direction turns answers
    "No along refusal, where it acts, surely",
    "own minus other category flip rate",
    "refusal along the direction after fine-tuning minus random",  # too few are then accepted
}


def test_every_number_has_company(whole):
    """Settings, versions, seeds and data digests are in the report; no reply is."""
    meta = json.loads((whole / "report.json").read_text())["meta"]
    assert meta["settings"]["seed"] == 0
    assert set(meta) == {
        "name",
        "depth",
        "model",
        "settings",
        "template",
        "pools",
        "judge",
        "versions",
    }
    assert meta["judge"] == "built-in"
    assert all(len(pool["sha256"]) == 64 for pool in meta["pools"].values())


def test_a_second_run_asks_the_model_nothing(folder, whole, monkeypatch):
    forbid_the_model(monkeypatch)
    again = json.dumps(study_report(folder, whole).to_dict(), indent=1)
    assert again == (whole / "report.json").read_text()


def test_a_store_copied_to_another_place_goes_on_there(folder, whole, tmp_path, monkeypatch):
    """As on another machine: neither the model nor the report lies where it lay."""
    moved_model = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    moved = shutil.copytree(whole, tmp_path / "results")
    forbid_the_model(monkeypatch)
    again = study_report(moved_model, moved).to_dict()
    before = json.loads((whole / "report.json").read_text())
    assert json.loads(json.dumps(again["tables"])) == before["tables"]
    assert json.loads(json.dumps(again["curves"])) == before["curves"]


def forbid_the_model(monkeypatch):
    """Whatever is asked of the model fails: all must come out of the store."""
    from latentguard.models.chat_model import ChatModel
    from latentguard.models.lora import Finetuning

    def nothing(*args, **how):
        raise AssertionError("asked again")

    for name in ("capture", "sweep"):
        monkeypatch.setattr(ChatModel, name, nothing)
    monkeypatch.setattr(Finetuning, "__call__", nothing)


def test_a_killed_study_gives_the_same_report(folder, whole, tmp_path):
    """Killed without warning three times, at growing sizes of the store."""
    processes = multiprocessing.get_context("forkserver")
    loaded_once = ["latentguard.models.chat_model", "latentguard.study.run"]  # for all four
    processes.set_forkserver_preload(loaded_once)
    kills = 0
    for size in (0.2, 0.5, 0.8):
        wanted = size * (whole / STORE).stat().st_size
        process = processes.Process(target=save_study, args=(folder, tmp_path))
        process.start()
        while process.is_alive() and stored(tmp_path) < wanted:
            time.sleep(0.02)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills > 0
    assert not (tmp_path / "report.json").exists()
    process = processes.Process(target=save_study, args=(folder, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "report.json").read_text() == (whole / "report.json").read_text()


def test_one_experiment_alone(folder, whole):
    report = study_report(folder, whole, only=["inversion"])
    titles = [section.title for section in report.sections]
    assert len(titles) == 4  # claims, protocol, groups, inversion
    assert isinstance(report, Report)


def test_a_judge_that_fails_stops_the_run(folder, whole, monkeypatch):
    """It is no finding about the model; what is kept stays, and the run goes on later."""
    monkeypatch.setattr(CachedModel, "replies", broken)
    with pytest.raises(StudyError, match="no disk"):
        study_report(folder, whole, only=["inversion"])


KEPT = CachedModel.replies


def broken(self, prompts, *rest, what="", **how):
    """As a full disk, once the groups are known."""
    if what.startswith("ask:"):
        return KEPT(self, prompts, *rest, what=what, **how)
    raise StudyError("no disk")


def test_an_unknown_experiment_is_named(folder, whole):
    with pytest.raises(LatentGuardError, match="no experiment 'inverse'; expected template"):
        study_report(folder, whole, only=["inverse"])


def test_an_experiment_without_prompts_is_refused_before_anything_is_asked():
    study = Study(None, None, PAPER_SETTINGS, "none")
    with pytest.raises(LatentGuardError, match="'dose' needs prompts: set 'interventions'"):
        run(study, only=["dose"])


def test_texts_are_shown_only_when_asked(folder, whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    shown = study_report(folder, whole, only=["beliefs"], show_prompts=True).html()
    hidden = study_report(folder, whole, only=["beliefs"]).html()
    from study.small_study import pools

    texts = [p.text for p in pools().harmful]
    assert sum(text in shown for text in texts) > 0
    assert not any(text in hidden or text in page for text in texts)


def stored(out):
    return sum(p.stat().st_size for p in Path(out).glob(f"{STORE}*"))
