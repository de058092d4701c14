"""LatentGuard on a backend with planted truth: fit, calibrate, scan, save, load, refuse."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from fake_backend import FINGERPRINT, FakeBackend, labelled, texts, with_refusals
from latentguard.errors import GuardError, ModelMismatch
from latentguard.guard.compatibility import CANARY_COUNT
from latentguard.guard.latent_guard import LatentGuard
from latentguard.probes.capture_cache import CaptureCache
from latentguard.prompts import Message, Prompt
from latentguard.states import Reading, States
from latentguard.stats.detection import auroc

READINGS = ("t_inst", "t_post", "post+1", "sealed", "span", "pooled")


def harmless(count, start=5000):
    return [Prompt(text, id=str(n)) for n, text in enumerate(texts(count, bad=False, start=start))]


def scores(guard, backend, prompts):
    return np.array([v.score for v in guard.scan(backend, prompts)])


@pytest.fixture(scope="module")
def backend():
    return FakeBackend()


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, labelled(80))


@pytest.fixture(scope="module")
def paper(backend):
    return LatentGuard.fit(backend, labelled(80), reading="t_inst", probe="centroid")


class TestFit:
    @pytest.mark.parametrize("probe", ["linear", "centroid"])
    @pytest.mark.parametrize("reading", READINGS)
    def test_the_planted_truth_is_found(self, backend, reading, probe):
        guard = LatentGuard.fit(backend, labelled(80), reading=reading, probe=probe)
        fresh = labelled(60, start=900)
        labels = np.array([p.harmful for p in fresh])
        assert auroc(labels, scores(guard, backend, fresh)) > 0.999
        assert (guard.reading.name, guard.probe.kind) == (reading, probe)
        verdicts = list(guard.scan(backend, fresh))
        found = np.array([v.probability > 0.5 for v in verdicts])
        assert np.mean(found == labels) > 0.95
        beliefs = np.array([v.beliefs["harmful"] for v in verdicts])
        assert auroc(labels, beliefs) > 0.99

    def test_progress(self, backend):
        counts = []
        LatentGuard.fit(backend, labelled(30), progress=counts.append)
        assert sum(counts) == 60

    def test_what_it_was_made_of(self, guard, backend):
        made = guard.fitted
        assert (made["harmful"], made["harmless"]) == (80, 80)
        assert made["cross_validated_auroc"] == 1.0
        assert set(made["versions"]) == {"latentguard", "torch"}
        assert guard.fingerprint == backend.fingerprint
        other = LatentGuard.fit(backend, labelled(80, start=1))
        assert made["data_sha256"] != other.fitted["data_sha256"]

    def test_from_states_that_were_captured_already(self, guard, backend):
        reading = Reading.of("pooled", backend.post)
        batches = backend.capture(labelled(80), positions=("t_inst", "post", "t_post", "mean"))
        again = LatentGuard.from_states(backend, States.collect(batches), reading)
        assert again.digest == guard.digest

    def test_the_centroid_at_t_inst_is_the_papers_formula(self, backend, paper):
        """Delta_harmful (equations 2 to 4), written out in float64."""
        train = States.collect(backend.capture(labelled(80)))
        h = train.at("t_inst").double().numpy()
        harmful = np.array([p.harmful for p in train.prompts])
        mu_plus, mu_minus = h[harmful].mean(0), h[~harmful].mean(0)
        fresh = labelled(20, start=700)
        found = list(paper.scan(backend, fresh))
        for verdict, prompt in zip(found, fresh, strict=True):
            state = next(backend.capture([prompt])).at("t_inst")[0].double().numpy()
            s = []
            for layer in range(1, backend.depth + 1):
                a, plus, minus = state[layer], mu_plus[layer], mu_minus[layer]
                cosines = [a @ c / np.linalg.norm(a) / np.linalg.norm(c) for c in (plus, minus)]
                s.append(cosines[0] - cosines[1])
            assert verdict.score == pytest.approx(np.mean(s), abs=1e-6)
            assert verdict.beliefs["harmful"] == pytest.approx(np.mean(s), abs=1e-6)
        assert paper.probe.layers == tuple(range(1, 7))

    def test_platt_scaling(self, backend, guard):
        verdict = next(guard.scan(backend, ["Please do the bad item number 1"]))
        slope, intercept = guard.platt
        assert slope > 0
        assert verdict.probability == pytest.approx(expit(slope * verdict.score + intercept))

    def test_probabilities_are_those_of_equally_frequent_classes(self):
        """A hundred harmless prompts to each harmful one do not push the middle."""
        backend = FakeBackend(signal=0.5)
        prompts = labelled(400)
        few = [p for n, p in enumerate(prompts) if not p.harmful or n < 100]
        guards = [LatentGuard.fit(backend, some) for some in (prompts, few)]
        fresh = labelled(100, start=3000)
        for guard in guards:
            mean = np.mean([v.probability for v in guard.scan(backend, fresh)])
            assert mean == pytest.approx(0.5, abs=0.08)

    def test_a_killed_fit_goes_on_and_makes_the_same_guard(self, tmp_path):
        class Killed(FakeBackend):
            def capture(self, prompts, **how):
                for count, states in enumerate(super().capture(prompts, **how)):
                    if count == 5:
                        raise KeyboardInterrupt
                    yield states

        rows = labelled(40)
        with pytest.raises(KeyboardInterrupt), CaptureCache(tmp_path) as cache:
            LatentGuard.fit(Killed(), rows, cache=cache)
        backend = FakeBackend()
        with CaptureCache(tmp_path) as cache:
            resumed = LatentGuard.fit(backend, rows, cache=cache)
        assert resumed.digest == LatentGuard.fit(FakeBackend(), rows).digest
        assert not {p.text for p in rows[:35]} & set(backend.captured)
        assert list(tmp_path.iterdir()) == []


class TestRefusalAxis:
    def test_it_appears_when_refusals_are_known(self, backend):
        guard = LatentGuard.fit(backend, with_refusals(labelled(80)), reading="t_inst")
        assert [(a.name, a.position) for a in guard.axes] == [
            ("harmful", "t_inst"),
            ("refuse", "t_post"),
        ]
        assert guard.positions == ("t_inst", "t_post")
        refused, answered = guard.scan(backend, ["good thing 1 no", "good thing 2 yes"])
        assert refused.beliefs["refuse"] > 0 > answered.beliefs["refuse"]
        assert max(refused.beliefs["harmful"], answered.beliefs["harmful"]) < 0

    def test_and_not_otherwise(self, guard):
        assert [a.name for a in guard.axes] == ["harmful"]

    @pytest.mark.parametrize("known", ["refused_harmful", "accepted_harmless"])
    def test_one_of_the_two_groups_is_not_enough(self, backend, known):
        prompts = [p if p.group == known else replace(p, refused=None) for p in REFUSALS]
        assert len(LatentGuard.fit(backend, prompts).axes) == 1


REFUSALS = with_refusals(labelled(20))


class TestScan:
    def test_order_and_names(self, backend, guard):
        prompts = labelled(50, start=400)[::-1]
        verdicts = list(guard.scan(backend, prompts))
        assert [v.id for v in verdicts] == [p.id for p in prompts]
        alone = [next(guard.scan(backend, [p])).score for p in prompts]
        assert np.allclose([v.score for v in verdicts], alone, atol=1e-5)

    def test_plain_strings(self, backend, guard):
        asked = ["Please do the bad thing", Prompt("Please do the good thing", id="x"), "good"]
        verdicts = list(guard.scan(backend, iter(asked)))
        assert [v.id for v in verdicts] == ["1", "x", "3"]
        assert [v.score > 0 for v in verdicts] == [True, False, False]

    def test_it_is_lazy(self, backend, guard):
        taken = []

        def endless():
            while True:
                taken.append(1)
                yield "good"

        verdicts = guard.scan(backend, endless())
        next(verdicts)
        assert len(taken) <= 10

    def test_of_nothing(self, backend, guard):
        assert list(guard.scan(backend, [])) == []

    def test_progress(self, backend, guard):
        counts = []
        list(guard.scan(backend, harmless(20), progress=counts.append))
        assert sum(counts) == 20

    def test_sealed_reads_all_endings_alike(self, backend):
        guard = LatentGuard.fit(backend, labelled(30), reading="sealed")
        found = guard.scan(backend, ["Do the bad thing" + end for end in ("", ".", "?", "?!", " ")])
        assert len({v.score for v in found}) == 1

    def test_the_history_counts(self, backend, guard):
        said = [(), (Message("system", "Be brief."),)]
        found = [Prompt("Please do the bad thing", history=turns) for turns in said]
        first, second = scores(guard, backend, found)
        assert first != second

    def test_only_what_is_needed_is_captured(self, backend, paper):
        wanted = []

        class Watched(FakeBackend):
            def capture(self, prompts, *, positions, layers, queries=None, progress=None):
                wanted.append((positions, layers))
                return super().capture(prompts, positions=positions, layers=layers)

        list(paper.scan(Watched(), ["good"]))
        assert wanted == [(("t_inst",), (1, 2, 3, 4, 5, 6))]

    def test_flagged_is_above_the_threshold(self, backend, guard):
        score = next(guard.scan(backend, ["good"])).score
        for threshold, flagged in ((score, False), (score - 1e-9, True), (score + 1e-9, False)):
            there = replace(guard, threshold=threshold)
            assert next(there.scan(backend, ["good"])).flagged is flagged


class TestCalibrate:
    def test_the_rate_is_kept_on_fresh_draws(self):
        backend = FakeBackend(signal=0.4)  # so that the classes overlap
        guard = LatentGuard.fit(backend, labelled(80))
        rates, caught = [], []
        for n in range(8):
            some = harmless(150, start=10_000 * (n + 1))
            there = guard.calibrate(backend, some, max_fpr=0.05)
            fresh = scores(guard, backend, harmless(400, start=500_000))
            rates.append(np.mean(fresh > there.threshold))
            harmful = scores(guard, backend, texts(100, bad=True, start=700))
            caught.append(np.mean(harmful > there.threshold))
        assert sum(rate > 0.05 for rate in rates) <= 1
        assert np.mean(rates) > 0.001
        assert np.mean(caught) > 0.2

    def test_a_new_guard(self, backend, guard):
        before = guard.digest
        there = guard.calibrate(backend, harmless(60), max_fpr=0.05)
        assert guard.digest == before != there.digest
        assert (guard.threshold, guard.bound) == (0.0, None)
        assert there.threshold == there.bound.threshold
        assert (there.bound.n, there.bound.observed) == (60, 0)
        assert there.fitted["harmful"] == 80
        assert len(there.fitted["calibration_sha256"]) == 64
        assert "calibration_sha256" not in guard.fitted
        assert "95% confidence" in there.promise
        assert guard.promise == "not calibrated, so nothing is promised"

    def test_too_few(self, backend, guard):
        with pytest.raises(GuardError, match=r"58 harmless .* too few .* at least 59"):
            guard.calibrate(backend, harmless(58), max_fpr=0.05)

    def test_progress_and_generators(self, backend, guard):
        counts = []
        guard.calibrate(backend, iter(harmless(60)), max_fpr=0.05, progress=counts.append)
        assert sum(counts) == 60


class TestSaveAndLoad:
    def guards(self, backend):
        yield LatentGuard.fit(backend, labelled(30))
        yield LatentGuard.fit(backend, labelled(30), reading="t_post", probe="centroid")
        yield LatentGuard.fit(backend, with_refusals(labelled(30)), reading="sealed").calibrate(
            backend, harmless(60), max_fpr=0.05
        )

    def test_the_same_verdicts_bit_for_bit(self, backend, tmp_path):
        for guard in self.guards(backend):
            guard.save(tmp_path)
            loaded = LatentGuard.load(tmp_path, backend)
            prompts = labelled(40, start=800)
            assert list(loaded.scan(backend, prompts)) == list(guard.scan(backend, prompts))
            assert loaded.digest == guard.digest
            assert loaded.fitted == json.loads(json.dumps(guard.fitted))
            for field in ("reading", "fingerprint", "platt", "spread", "canaries", "bound"):
                assert getattr(loaded, field) == getattr(guard, field)

    def test_the_digest_is_of_everything(self, guard):
        changed = [
            replace(guard, threshold=1.0),
            replace(guard, platt=(1.0, 2.0)),
            replace(guard, reading=Reading("sealed", guard.reading.positions)),
            replace(guard, probe=replace(guard.probe, bias=9.0)),
            replace(guard, probe=replace(guard.probe, weight=guard.probe.weight + 1e-6)),
            replace(guard, axes=()),
            replace(guard, fingerprint=replace(guard.fingerprint, dtype="bfloat16")),
        ]
        assert len({g.digest for g in [guard, *changed]}) == 1 + len(changed)

    def test_it_cannot_be_changed(self, guard):
        with pytest.raises(dataclasses.FrozenInstanceError):
            guard.threshold = -1.0


class TestMismatch:
    @pytest.mark.parametrize("name", ["weights", "tokenizer", "template", "dtype"])
    def test_it_names_exactly_what_differs(self, guard, name):
        was, now = getattr(FINGERPRINT, name), "9" * 64
        other = FakeBackend(fingerprint=replace(FINGERPRINT, model="new", **{name: now}))
        wanted = f"'fake' and met 'new': {name} {now[:12]} instead of {was[:12]}"
        for act in (
            lambda: list(guard.scan(other, ["good"])),
            lambda: guard.calibrate(other, harmless(60)),
            lambda: guard.verify_model(other),
        ):
            with pytest.raises(ModelMismatch) as error:
                act()
            assert wanted in str(error.value)
        assert other.captured == []

    def test_several_at_once(self, guard):
        other = FakeBackend(fingerprint=replace(FINGERPRINT, template="z", dtype="bfloat16"))
        with pytest.raises(
            ModelMismatch, match=r"template z instead of c+ \(edited.*\); dtype bfloat16"
        ):
            guard.verify_model(other)

    def test_load_looks_too(self, guard, tmp_path):
        guard.save(tmp_path)
        other = FakeBackend(fingerprint=replace(FINGERPRINT, tokenizer="z"))
        LatentGuard.load(tmp_path)
        with pytest.raises(ModelMismatch, match="tokenizer"):
            LatentGuard.load(tmp_path, other)

    def test_the_same_model_at_another_place(self, guard):
        moved = FakeBackend(fingerprint=replace(FINGERPRINT, model="moved"))
        guard.verify_model(moved)
        assert len(list(guard.scan(moved, ["good"]))) == 1


class TestCanaries:
    def test_there_are_some(self, guard):
        assert len(guard.canaries) == CANARY_COUNT
        assert len({c.score for c in guard.canaries}) == CANARY_COUNT

    @pytest.mark.parametrize("probe", ["linear", "centroid"])
    def test_they_notice_shifted_states(self, backend, probe, tmp_path):
        guard = LatentGuard.fit(backend, labelled(40), probe=probe)
        guard.save(tmp_path)
        shifted = FakeBackend(shift=0.5 * backend.harm)
        assert shifted.fingerprint == guard.fingerprint
        with pytest.raises(ModelMismatch, match="canary prompts differently"):
            guard.verify_model(shifted)
        with pytest.raises(ModelMismatch, match="canary"):
            LatentGuard.load(tmp_path, shifted)

    def test_they_notice_other_weights(self, guard):
        with pytest.raises(ModelMismatch, match="standard deviations"):
            guard.verify_model(FakeBackend(salt="other"))

    @pytest.mark.parametrize("shift", [0.0, 1e-4])
    def test_rounding_is_forgiven(self, guard, shift):
        guard.verify_model(FakeBackend(shift=shift))

    def test_one_that_changes_side_may_move_by_rounding_only(self, guard, backend):
        """Though others may move five times as far."""
        scores = sorted(canary.score for canary in guard.canaries)
        moved = 0.05 * guard.spread
        near = replace(guard, threshold=scores[4] - moved / 2)
        canaries = tuple(
            replace(one, score=one.score - moved * (one.score == scores[4]))
            for one in guard.canaries
        )
        with pytest.raises(ModelMismatch, match="1 changed side of the threshold"):
            replace(near, canaries=canaries).verify_model(backend)
        far = replace(near, threshold=scores[4] + 3 * moved)
        replace(far, canaries=canaries).verify_model(backend)

    def test_undefined_states(self, guard):
        with pytest.raises(GuardError, match="not a finite number"):
            guard.verify_model(FakeBackend(shift=float("nan")))

    def test_a_guard_without_canaries(self, guard):
        replace(guard, canaries=()).verify_model(FakeBackend(salt="other"))


class Broken(FakeBackend):
    """States that hold one undefined number, for one prompt, at one position."""

    def __init__(self, value=float("nan"), index=0, **how):
        super().__init__(**how)
        self.value, self.index = value, index

    def _state(self, prompt, index):
        state = super()._state(prompt, index)
        if "number 3" in prompt.text and index == self.index:
            state[1:, 5] = self.value
        return state


class TestFailClosed:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("probe", ["linear", "centroid"])
    def test_fit(self, probe, value):
        with pytest.raises(GuardError, match="infinite or undefined"):
            LatentGuard.fit(Broken(value), labelled(30), probe=probe)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_scan(self, guard, paper, value):
        for fitted in (guard, paper):
            verdicts = fitted.scan(Broken(value, batch=2), texts(6, bad=False))
            assert [next(verdicts).id for _ in range(2)] == ["1", "2"]
            with pytest.raises(GuardError, match="not a finite number"):
                next(verdicts)

    def test_calibrate(self, guard):
        with pytest.raises(GuardError, match="not a finite number"):
            guard.calibrate(Broken(), harmless(60, start=3000), max_fpr=0.05)

    def test_a_belief_that_is_undefined(self, backend):
        """The score reads t_inst alone, the refuse axis t_post: no verdict if either is broken."""
        guard = LatentGuard.fit(backend, with_refusals(labelled(30)), reading="t_inst")
        with pytest.raises(GuardError, match="not a finite number"):
            list(guard.scan(Broken(index=2), texts(6, bad=False)))

    def test_unlabelled_prompts(self, backend):
        prompts = [*labelled(20), Prompt("what is this", id="lost"), Prompt("and this")]
        with pytest.raises(GuardError, match=r"2 training prompts have no label .*'lost'"):
            LatentGuard.fit(backend, prompts)

    @pytest.mark.parametrize("side", [True, False])
    @pytest.mark.parametrize("probe", ["linear", "centroid"])
    def test_one_class_only(self, backend, side, probe):
        one = [p for p in labelled(20) if p.harmful is side]
        missing = "harmless" if side else "harmful"
        with pytest.raises(GuardError, match=f"0 {missing}|needs {missing} prompts"):
            LatentGuard.fit(backend, one, probe=probe)

    def test_nothing_to_fit_on(self, backend):
        with pytest.raises(GuardError, match="expected at least one prompt"):
            LatentGuard.fit(backend, [])

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            (dict(reading="t_last"), "no reading 't_last'"),
            (dict(reading="post+3"), "up to 2"),
            (dict(probe="tree"), "no probe 'tree': expected centroid or linear"),
        ],
    )
    def test_what_there_is_not(self, how, words):
        backend = FakeBackend()
        with pytest.raises(GuardError) as error:
            LatentGuard.fit(backend, labelled(20), **how)
        assert words in str(error.value)
        assert backend.captured == []  # said before an hour of work, not after

    def test_half_precision_that_overflows(self):
        backend = FakeBackend(shift=70_000, dtype=torch.float16)
        with pytest.raises(GuardError, match="float16"):
            LatentGuard.fit(backend, labelled(20))
