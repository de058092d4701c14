"""The ablation of reading levers finds what is planted, and nothing where nothing is."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from latentguard.data.builtin import load_contrast
from latentguard.prompts import Prompt

FOLDER = Path(__file__).parents[1] / "benchmarks"
LAYERS = (1, 2, 3)
WIDTH = 6
LEVERS = ("tokens: attention", "tokens: max", "low rank", "hard rows", "variants: fit and read")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(FOLDER)])
        import reading_levers

        yield reading_levers


@dataclass(frozen=True)
class World:
    """What a label changes in states that are noise otherwise."""

    one_token: float = 0.0
    """In one token of a prompt."""

    everywhere: float = 0.0
    """In each position and token."""

    in_variant: float = 0.0
    """In each position of the other surroundings."""


def planted(script, world, count, seed, *, wrong=0.0):
    """Rows of a world; a share of them is labelled wrongly. Ids name the true label."""
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.5
    labels = truth ^ (rng.random(count) < wrong)
    prompts = tuple(
        Prompt(f"text {seed} {i}", id=f"{seed}-{i}-{int(t)}", harmful=bool(y))
        for i, (t, y) in enumerate(zip(truth, labels, strict=True))
    )
    side = torch.from_numpy(np.where(truth, 1.0, -1.0)).float()
    lengths = rng.integers(6, 14, count)
    draws = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(n, 3, WIDTH, generator=draws) for n in lengths]
    for row, one in enumerate(tokens):
        one[:, :, 0] += world.everywhere * side[row]
        if truth[row]:
            one[rng.integers(len(one)), :, 0] += world.one_token
    means = torch.stack([one.mean(0) for one in tokens])
    noise = torch.randn(count, 3, 3, WIDTH, generator=draws)
    noise[..., 0] += world.everywhere * side[:, None, None]
    states = torch.cat([noise, means[:, None]], 1)
    other = torch.randn(states.shape, generator=draws)
    other[..., 0] += world.in_variant * side[:, None, None]
    packed = script.TokenStates(torch.cat(tokens).half(), tuple(map(int, lengths)))
    variants = {"other": script.ReadRows(prompts, other)}
    return script.ReadRows(prompts, states, packed, variants)


def figures_of(script, folder, world, names, *, teacher=None, wrong=0.0, seed=1):
    rows = planted(script, world, 300, seed, wrong=wrong)
    sets = {name: planted(script, world, 200, 10 * seed + n) for n, name in enumerate(("x", "y"))}
    training = script.Training(rows, LAYERS, teacher and teacher(rows))
    return script.measure(training, sets, names, folder)["arms"]


def test_attention_and_maximum_find_the_one_token_that_tells(script, tmp_path):
    names = ["mean", "attention", "max"]
    arms = figures_of(script, tmp_path, World(one_token=5.0), names)
    _, _, mean = arms["tokens: mean"]["mean"]["auroc"]
    for lever in ("tokens: attention", "tokens: max"):
        assert arms[lever]["mean"]["gain"][1] > 0
        assert arms[lever]["mean"]["auroc"][1] > mean


def test_no_lever_gains_where_nothing_tells(script, tmp_path):
    """One 95 % interval in twenty misses 0 by chance, so none may miss it in two worlds."""
    names = ["attention", "max", "low rank", "hard rows", "surroundings"]
    worlds = [figures_of(script, tmp_path / str(n), World(), names, seed=n) for n in (1, 2)]
    for lever in LEVERS:
        gains = [arms[lever]["mean"]["gain"] for arms in worlds]
        assert any(low <= 0 <= high for _, low, high in gains), lever


def test_no_lever_gains_where_the_default_reads_all_there_is(script, tmp_path):
    names = ["attention", "max", "low rank", "hard rows", "surroundings"]
    arms = figures_of(script, tmp_path, World(everywhere=0.3), names)
    assert arms["default"]["mean"]["auroc"][1] > 0.7
    assert [lever for lever in LEVERS if arms[lever]["mean"]["gain"][1] > 0] == []


def test_another_reading_gains_what_it_tells(script, tmp_path):
    arms = figures_of(script, tmp_path, World(everywhere=0.1, in_variant=0.5), ["surroundings"])
    assert arms["variants: fit and read"]["mean"]["gain"][1] > 0
    assert arms["variants: fit and read"]["reads"] == 2


def truth(rows):
    return {p.id: float(p.id[-1]) for p in rows.prompts}


def truth_of_some(rows):
    return {p.id: float(p.id[-1]) for p in rows.prompts[:100]}


def test_a_teacher_that_knows_more_than_the_labels_helps(script, tmp_path):
    world = World(everywhere=0.1)
    arms = figures_of(script, tmp_path, world, ["teacher"], teacher=truth, wrong=0.4)
    assert arms["teacher: scores"]["mean"]["gain"][1] > 0
    assert arms["teacher: labels of its rows"]["mean"]["gain"][1] <= 0


def test_a_teacher_may_know_some_rows_alone(script, tmp_path):
    arms = figures_of(script, tmp_path, World(everywhere=0.3), ["teacher"], teacher=truth_of_some)
    assert arms["teacher: scores"]["choices"]["rows"] == 100
    arms = figures_of(script, tmp_path, World(everywhere=0.3), ["teacher"], teacher=truth)
    assert arms["teacher: scores"]["choices"]["rows"] == 300  # another file of scores
    arms = figures_of(script, tmp_path, World(everywhere=0.3), ["teacher"])
    assert arms.keys() == {"default"}


def test_scores_of_an_arm_are_kept(script, tmp_path):
    arms = figures_of(script, tmp_path, World(everywhere=0.3), ["baselines"])
    assert 0.4 < arms["n-grams"]["mean"]["auroc"][0] < 0.6  # texts are alike
    assert arms["the paper's rule"]["mean"]["auroc"][1] > 0.5
    (path,) = tmp_path.glob("baselines-*.json")
    record = json.loads(path.read_text())
    record[0]["sets"] = {name: [0.0] * len(values) for name, values in record[0]["sets"].items()}
    path.write_text(json.dumps(record))
    again = figures_of(script, tmp_path, World(everywhere=0.3), ["baselines"])
    assert again["n-grams"]["mean"]["auroc"][0] == 0.5


def test_tokens_and_positions_come_from_one_reading(script, model, tmp_path):
    prompts = load_contrast("test")[:5]
    reader = script.Reader(model, tmp_path)
    rows = reader.read(prompts)
    again = reader.read(prompts)
    assert torch.equal(rows.states, again.states)
    (states,) = model.capture(prompts, positions=reader.positions, layers=reader.layers)
    torch.testing.assert_close(rows.states, states.values, atol=1e-5, rtol=1e-4)
    assert rows.tokens.lengths == tuple(len(one.instruction) for one in model.chat(prompts))
    slots = [reader.layers.index(layer) for layer in reader.token_layers]
    first, lengths = rows.tokens.take(torch.tensor([0]))
    expected = states.at("mean")[0, slots]
    torch.testing.assert_close(
        first.reshape(lengths[0], 3, -1).mean(0), expected, atol=2e-3, rtol=2e-3
    )


def test_a_teacher_scores_the_rows_that_it_did_not_see(script, model, tmp_path):
    path = tmp_path / "scores.jsonl"
    script.write_scores(path, script.Reader(model, tmp_path / "states"), 100)
    scores = script.read_teacher(path)
    assert scores.keys() == {p.id for p in script.load_training_rows(100)}
    assert script.read_teacher(None) == {}


def test_variants_keep_the_request(script):
    prompt = Prompt("Go on?")
    texts = {name: change(prompt).text for name, change in script.VARIANTS.items()}
    assert texts["question behind"].startswith("Go on?")
    assert texts["sealed ending"] == "Go on."
    assert texts["other system prompt"] == texts["empty system prompt"] == "Go on?"
    assert script.VARIANTS["empty system prompt"](prompt).history[0].content == ""


def test_rows_are_drawn_by_class_and_short(script):
    prompts = [Prompt("x" * (1 + 1000 * (i % 3)), harmful=i % 2 == 0) for i in range(60)]
    drawn = script.draw(prompts, 8)
    assert [sum(p.harmful is side for p in drawn) for side in (True, False)] == [8, 8]
    assert max(len(p.text) for p in drawn) <= script.LONGEST


def test_both_readings_are_scored_from_one_capture(script, model, tmp_path):
    import attended

    rows = [p for p in load_contrast("train") if p.pair][:60]
    guards = attended.open_guards(model, rows, tmp_path)
    sets = {"own": load_contrast("test")[:20]}
    scores = attended.score_sets(model, guards, sets, tmp_path)
    for name, guard in guards.items():
        expected = [verdict.score for verdict in guard.scan(model, sets["own"])]
        assert scores["own"][name] == pytest.approx(expected, abs=1e-5)
    assert attended.score_sets(None, guards, sets, tmp_path) == scores
    assert attended.open_guards(model, [], tmp_path)["attended"].digest == guards["attended"].digest
