"""A guard that is asked directly: texts, lists, chats; its own model; how it shows itself."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

import latentguard as lg
from fake_backend import FINGERPRINT, FakeBackend, labelled
from latentguard.errors import ModelMismatch, PromptError
from latentguard.guard import own_model
from latentguard.prompts import Message, Prompt

BAD, GOOD = "Please do the bad item number 1", "Please do the good item number 1"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": GOOD},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": BAD},
]


@pytest.fixture(scope="module")
def guard():
    return lg.LatentGuard.fit(FakeBackend(), labelled(40))


@pytest.fixture
def folder(guard, tmp_path):
    guard.save(tmp_path / "guard")
    return tmp_path / "guard"


@pytest.fixture
def loads(monkeypatch):
    """What is loaded as a guard's own model: (source, dtype, device)."""
    from latentguard.models.chat_model import ChatModel

    calls = []

    def load(source, *, dtype, device=None):
        calls.append((source, dtype, device))
        return FakeBackend()

    monkeypatch.setattr(ChatModel, "load", load)
    return calls


class TestCall:
    def test_a_text_gives_a_verdict_and_a_list_gives_a_list(self, guard):
        assert isinstance(guard(BAD), lg.Verdict)
        assert [v.flagged for v in guard([BAD, GOOD])] == [True, False]
        assert guard([]) == []

    def test_it_says_what_scan_says(self, guard):
        asked = [BAD, Prompt(GOOD, id="x"), CHAT]
        assert guard(asked) == list(guard.scan(FakeBackend(), asked))

    def test_a_chat_is_one_prompt(self, guard):
        history = tuple(Message(turn["role"], turn["content"]) for turn in CHAT[:-1])
        wanted = guard(Prompt(BAD, id="1", history=history))
        assert guard(CHAT) == wanted
        assert guard((*history, Message("user", BAD))) == wanted
        assert guard([CHAT, CHAT])[1].score == pytest.approx(wanted.score)

    def test_what_is_no_prompt_is_refused(self, guard):
        for wrong in ([3], [{"role": "user"}], [[]]):
            with pytest.raises(PromptError):
                guard(wrong)

    def test_probabilities_as_in_scikit_learn(self, guard):
        found = guard.predict_proba([BAD, GOOD])
        assert found.shape == (2, 2)
        np.testing.assert_allclose(found.sum(1), 1)
        assert found[0, 1] == guard(BAD).probability > 0.5 > found[1, 1]
        assert guard.predict([BAD, GOOD]).tolist() == [True, False]
        assert guard.predict([]).shape == (0,)


class TestOwnModel:
    def test_a_guard_loads_its_own_model_when_it_is_first_asked(self, folder, loads):
        guard = lg.load_guard(folder)
        assert loads == []
        assert guard(BAD).flagged and not guard(GOOD).flagged
        assert loads == [("fake", "float32", None)]

    def test_a_model_that_moved_and_a_device(self, folder, loads):
        guard = lg.load_guard(folder, "models/moved", device="cpu")
        guard(BAD)
        assert loads == [("models/moved", "float32", "cpu")]

    def test_a_model_that_is_loaded_already_is_used(self, folder, loads):
        backend = FakeBackend()
        guard = lg.load_guard(folder, backend)
        assert guard.model is backend
        assert guard(BAD).flagged
        assert loads == []

    def test_another_model_is_refused(self, folder):
        other = FakeBackend(fingerprint=replace(FINGERPRINT, weights="f" * 64))
        with pytest.raises(ModelMismatch, match="weights"):
            lg.load_guard(folder, other)
        bound = lg.load_guard(folder, other, allow_mismatch=True)
        assert bound.model is other
        assert bound.bound is None

    @pytest.mark.parametrize("model", [FakeBackend(), None, "models/moved"])
    def test_a_model_that_is_accepted_is_not_loaded_again(self, folder, loads, model):
        guard = lg.load_guard(folder, model, allow_mismatch=True)
        before = list(loads)
        assert guard(BAD).flagged
        assert loads == before

    def test_what_was_loaded_is_verified_by_canaries(self, folder, monkeypatch):
        shifted = FakeBackend(shift=0.5 * FakeBackend().harm)
        monkeypatch.setattr(own_model.OwnModel, "load", lambda self, fingerprint: shifted)
        with pytest.raises(ModelMismatch, match="canary prompts differently"):
            lg.load_guard(folder)(BAD)

    def test_a_guard_that_was_fitted_keeps_its_model(self, guard, loads):
        calibrated = guard.calibrate(
            guard.model, [f"A good day, number {n}" for n in range(60)], max_fpr=0.05
        )
        calibrated(BAD)
        assert loads == []

    def test_no_model_travels_with_a_copy_to_another_process(self, guard, loads):
        copied = pickle.loads(pickle.dumps(guard))
        assert copied.digest == guard.digest
        assert copied(BAD).flagged
        assert len(loads) == 1


class TestShown:
    def test_a_guard_in_one_line(self, guard):
        assert repr(guard) == (
            "LatentGuard('fake', reading='pooled', probe='linear', layers=(2, 3, 4), "
            "threshold=0 (uncalibrated))"
        ).replace("(2, 3, 4)", "2..4")

    def test_a_verdict_in_one_line(self, guard):
        shown = repr(guard(Prompt(BAD, id="7")))
        assert shown.startswith("Verdict(block, uncalibrated, probability=")
        assert shown.endswith("id='7')")

    def test_states_and_axes_in_one_line(self, guard):
        states = lg.States.collect(FakeBackend().capture(labelled(100)))
        assert repr(states) == "States(n=200, positions=(t_inst, t_post), layers=0..6, width=16)"
        assert repr(guard.axes[0]) == (
            "Axis(harmful at t_inst, layers=2..4, width=16, counts=(40, 40))"
        )

    def test_in_a_notebook_everything_is_escaped(self, guard):
        there = replace(guard, fingerprint=replace(guard.fingerprint, model="<script>"))
        verdict = guard(Prompt(BAD, id="<script>"))
        for html in (there._repr_html_(), verdict._repr_html_()):
            assert html.startswith("<table>")
            assert "<script>" not in html
            assert "&lt;script&gt;" in html


class TestProgress:
    def test_no_bar_outside_of_interactive_work(self, guard, capsys):
        list(guard.scan(FakeBackend(), [BAD, GOOD]))
        assert capsys.readouterr().err == ""

    def test_a_bar_at_an_interactive_prompt(self, guard, capsys, monkeypatch):
        monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
        list(guard.scan(FakeBackend(), [BAD, GOOD]))
        shown = capsys.readouterr().err
        assert "scan" in shown
        assert "2/2" in shown

    def test_a_progress_that_is_given_takes_the_place_of_the_bar(self, guard, capsys, monkeypatch):
        monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
        counts = []
        list(guard.scan(FakeBackend(), [BAD, GOOD], progress=counts.append))
        assert sum(counts) == 2
        assert capsys.readouterr().err == ""

    def test_capture_shows_one_too(self, model, capsys, monkeypatch):
        monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
        list(model.capture([BAD, GOOD]))
        assert "capture" in capsys.readouterr().err


class TestCalibrated:
    def test_a_verdict_says_whether_the_threshold_was_calibrated(self, guard):
        backend = FakeBackend()
        assert not guard(GOOD).calibrated
        there = guard.calibrate(
            backend, [f"A good day, number {n}" for n in range(60)], max_fpr=0.05
        )
        assert there(GOOD).calibrated
        assert not there.rebind(FakeBackend(shift=0.1))(GOOD).calibrated
        assert there(GOOD).to_dict()["calibrated"] is True
