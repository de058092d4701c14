"""Settings files: what they may say, and what is said of those that say anything else."""

import json
from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentguard.errors import LatentGuardError
from latentguard.study.settings import MAY_BE_ZERO, SMALL, Settings, read_settings, read_table

NAMES = [f.name for f in fields(Settings)]
TUPLES = [f.name for f in fields(Settings) if isinstance(f.default, tuple)]
WHOLE = [
    f.name
    for f in fields(Settings)
    if type(f.default[0] if isinstance(f.default, tuple) else f.default) is int
]
SIGNED = (
    *("coefficients", "doses", "inversion_coefficient", "inversion_others"),
    "steer_from_layer",
)
SWITCHES = [f.name for f in fields(Settings) if isinstance(f.default, bool)]


@pytest.fixture
def toml(tmp_path):
    """Write a file; returns its path."""

    def write(text):
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def listed(name, value):
    """A value as this setting is written in TOML."""
    if name not in TUPLES:
        return json.dumps(value)
    return json.dumps([value] * (2 if name == "middle" else 1))


class TestBudgets:
    def test_the_paper(self):
        assert read_settings() == read_settings(budget="paper") == Settings()

    def test_small_is_no_larger_anywhere(self):
        small, paper = asdict(read_settings(budget="small")), asdict(Settings())
        assert {name for name in paper if small[name] != paper[name]} == set(SMALL)
        for name, value in SMALL.items():
            if name == "layer_step":
                assert value > paper[name]
            elif isinstance(value, tuple):
                assert len(value) <= len(paper[name])
                assert set(value) <= set(paper[name])
            else:
                assert value < paper[name]

    @pytest.mark.parametrize("budget", ["paper", "small"])
    def test_a_file_changes_one_setting_of_it(self, toml, budget):
        found = read_settings(toml("per_category = 7"), budget)
        assert found == replace(read_settings(budget=budget), per_category=7)

    @pytest.mark.parametrize("budget", ["paper", "small"])
    def test_every_setting_can_be_written_down(self, toml, budget):
        """What the report records of a run, read back, is the same run."""
        settings = read_settings(budget=budget)
        lines = (f"{name} = {json.dumps(value)}\n" for name, value in asdict(settings).items())
        assert read_settings(toml("".join(lines))) == settings


class TestKinds:
    def test_an_empty_file(self, toml):
        assert read_settings(toml("# nothing\n"), "small") == read_settings(budget="small")

    def test_whole_numbers_for_fractions(self, toml):
        found = read_settings(toml("coefficients = [1, -2.5]\ninversion_coefficient = 2"))
        assert (found.coefficients, found.inversion_coefficient) == ((1.0, -2.5), 2.0)
        assert all(isinstance(c, float) for c in found.coefficients)
        assert isinstance(found.inversion_coefficient, float)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", ["many", True, None, {"a": 1}, [[1]], float("nan")])
    def test_another_kind(self, toml, name, value):
        written = {None: "1979-05-27", True: "true"}.get(value) if value in (None, True) else None
        written = written or {"nan": "nan"}.get(str(value)) or json.dumps(value)
        if isinstance(value, dict):
            written = "{a = 1}"
        texts = [f"[{written}]", f"[1, {written}]"]
        if value is not True or name not in SWITCHES:
            texts.append(written)
        for text in texts:
            with pytest.raises(LatentGuardError, match=f"'{name}' should be like"):
                read_settings(toml(f"{name} = {text}"))

    @pytest.mark.parametrize("name", SWITCHES)
    def test_switches(self, toml, name):
        for text, value in (("true", True), ("false", False)):
            assert getattr(read_settings(toml(f"{name} = {text}")), name) is value

    @pytest.mark.parametrize("name", WHOLE)
    @pytest.mark.parametrize("value", [1.0, 1.5, float("inf")])
    def test_fractions_for_whole_numbers(self, toml, name, value):
        text = "inf" if value == float("inf") else listed(name, value)
        with pytest.raises(LatentGuardError, match=f"'{name}' should be like"):
            read_settings(toml(f"{name} = {text}"))

    @pytest.mark.parametrize("name", TUPLES)
    def test_one_number_for_a_list(self, toml, name):
        with pytest.raises(LatentGuardError, match="should be like"):
            read_settings(toml(f"{name} = 1"))

    @pytest.mark.parametrize("name", TUPLES)
    def test_an_empty_list(self, toml, name):
        with pytest.raises(LatentGuardError, match="should be like"):
            read_settings(toml(f"{name} = []"))

    @pytest.mark.parametrize("name", sorted(set(NAMES) - set(TUPLES)))
    def test_a_list_for_one_number(self, toml, name):
        with pytest.raises(LatentGuardError, match="should be like"):
            read_settings(toml(f"{name} = [1]"))


class TestBounds:
    @pytest.mark.parametrize("name", NAMES)
    def test_below_nothing(self, toml, name):
        value = -0.5 if name not in WHOLE else -1
        if name in SIGNED:
            found = getattr(read_settings(toml(f"{name} = {listed(name, value)}")), name)
            assert found == ((value,) if name in TUPLES else value)
            return
        with pytest.raises(LatentGuardError, match=f"'{name}' should be like .*found"):
            read_settings(toml(f"{name} = {listed(name, value)}"))

    @pytest.mark.parametrize("name", WHOLE)
    def test_nothing(self, toml, name):
        path = toml(f"{name} = {listed(name, 0)}")
        if name in (*MAY_BE_ZERO, "middle"):
            assert set(asdict(read_settings(path))[name] if name in TUPLES else (0,)) == {0}
            return
        with pytest.raises(LatentGuardError, match="should be like"):
            read_settings(path)

    def test_no_layer_below_the_embeddings_to_steer_from(self, toml):
        with pytest.raises(LatentGuardError, match="'steer_from_layer' should be like -1"):
            read_settings(toml("steer_from_layer = -2"))

    def test_one_bad_number_in_a_list(self, toml):
        with pytest.raises(LatentGuardError, match="finetune_sizes"):
            read_settings(toml("finetune_sizes = [50, 0]"))

    @pytest.mark.parametrize("rate", ["0", "0.0", "-1e-4", "inf", "nan"])
    def test_learning_rate(self, toml, rate):
        with pytest.raises(LatentGuardError, match=r"should be like 0\.0002"):
            read_settings(toml(f"finetune_rate = {rate}"))

    @pytest.mark.parametrize("band", ["[9]", "[9, 20, 21]", "[20, 9]", "[-1, 5]"])
    def test_middle_is_from_and_to(self, toml, band):
        with pytest.raises(LatentGuardError, match=r"'middle' should be like \(9, 20\)"):
            read_settings(toml(f"middle = {band}"))


class TestFiles:
    @pytest.mark.parametrize(
        "text", ["steered", "steered = ", "steered = 1\nsteered = 2", "[data", "\udcff"]
    )
    def test_not_toml(self, tmp_path, text):
        path = tmp_path / "s.toml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        for read in (read_settings, lambda path: read_table(path, "data")):
            with pytest.raises(LatentGuardError, match=r"s\.toml is not TOML"):
                read(path)

    @pytest.mark.parametrize("text", ["stered = 1", "[steering]\nlayers = 2", "Seed = 1"])
    def test_an_unknown_name(self, toml, text):
        with pytest.raises(LatentGuardError, match=r"there is no setting .*steered.*\[data\]"):
            read_settings(toml(text))

    def test_no_file(self, tmp_path):
        with pytest.raises(OSError, match="nothing"):
            read_settings(tmp_path / "nothing.toml")

    def test_tables_are_no_settings(self, toml):
        path = toml('seed = 3\n[data]\nharmful = ["a.jsonl"]\n[judge]\nurl = "u"\nmodel = "m"\n')
        assert read_settings(path) == replace(Settings(), seed=3)
        assert read_table(path, "data") == {"harmful": ["a.jsonl"]}
        assert read_table(path, "judge") == {"url": "u", "model": "m"}

    def test_no_such_table(self, toml):
        assert read_table(None, "data") == read_table(toml("seed = 1"), "data") == {}

    @pytest.mark.parametrize("text", ["data = 3", "data = ['a.jsonl']", "[[data]]\na = 1"])
    def test_no_table(self, toml, text):
        with pytest.raises(LatentGuardError, match=r"'data' should be a table, written \[data\]"):
            read_table(toml(text), "data")


class TestLayers:
    @given(st.integers(1, 80), st.integers(1, 90))
    def test_steered(self, depth, step):
        found = Settings(layer_step=step).layers(depth)
        assert found == tuple(n for n in range(depth) if n % step == 0)
        assert found[0] == 0

    @given(st.integers(1, 80), st.integers(1, 5), st.integers(1, 90))
    def test_probed_are_some_of_them_evenly_spread(self, depth, step, probed):
        settings = Settings(layer_step=step, probed=probed)
        every, found = settings.layers(depth), settings.probed_layers(depth)
        assert len(found) == len(set(found)) == min(probed, len(every))
        assert sorted(found) == list(found)
        assert set(found) <= set(every)
        gaps = {(b - a) // step for a, b in pairwise(found)}
        assert not gaps or max(gaps) - min(gaps) <= 1
