"""The belief arithmetic on the activations that the paper's authors released for Qwen2-7B.

Their files are not ours to ship: they are looked for in LATENTGUARD_TEST_DATA (default
../shared/data, beside the checkout), and the tests are skipped where they are not.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentguard.data.released import import_released
from latentguard.probes.axis import Axis
from latentguard.probes.probe import centroid
from latentguard.study.figures.figure_09_categories.category_cosines import of_directions, to_others

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LATENTGUARD_TEST_DATA", ROOT.parent / "shared" / "data"))
FILE = DATA / "qwen2-7b" / "released.safetensors"

# Of five harmless prompts that Qwen2-7B refused, over all 29 entries of the layer axis.
DELTA_HARMFUL = [-0.0561, -0.0278, -0.0449, -0.0431, -0.0399]
DELTA_REFUSE = [0.0092, 0.0096, 0.0159, 0.0088, 0.0146]

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the released activations are not here")


@pytest.fixture(scope="module")
def released():
    return {name: tensor.float() for name, tensor in load_file(FILE).items()}


def axis(released, name, position, positive, negative):
    poles = [released[f"qwen-{pole}-cls-all-layer"] for pole in (positive, negative)]
    return Axis(name, position, tuple(range(29)), *poles, counts=(100, 100))


def states(released, position):
    return released["qwen-hl-refuse5-all-layer-2pos"][:, :, position].transpose(0, 1)


@pytest.mark.parametrize("numpy_pickle", [True, False], ids=["array", "tensor"])
def test_files_in_the_authors_form_are_imported_to_the_last_bit(tmp_path, numpy_pickle):
    """They saved numpy arrays, each in a file of its own, with ``torch.save``."""
    wanted = load_file(FILE)
    files = []
    for name, tensor in wanted.items():
        files.append(tmp_path / f"{name}.pt")
        torch.save(tensor.numpy() if numpy_pickle else tensor, files[-1])
    out = tmp_path / "imported.safetensors"
    shapes = import_released(files, out)
    found = load_file(out)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.float16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16))


@pytest.mark.parametrize(
    ("name", "poles", "position", "published"),
    [
        ("harmful", ("hf", "hl"), 0, DELTA_HARMFUL),
        ("refuse", ("refuse", "accept"), 1, DELTA_REFUSE),
    ],
)
def test_beliefs_of_the_released_prompts(released, name, poles, position, published):
    found = axis(released, name, "t_inst" if position == 0 else "t_post", *poles)
    h = states(released, position)
    expected = torch.tensor(published)
    torch.testing.assert_close(found.belief(h), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(centroid(found)(h), expected, atol=1e-4, rtol=0)


def test_harmfulness_and_refusal_directions_are_nearly_orthogonal(released):
    harmful = axis(released, "harmful", "t_inst", "hf", "hl").direction
    refuse = axis(released, "refuse", "t_post", "refuse", "accept").direction
    cosines = torch.cosine_similarity(harmful, refuse, dim=-1)
    assert cosines[13] == pytest.approx(0.02, abs=0.01)
    assert cosines.max() <= 0.145


def test_category_directions_reproduce_figure_9a(released):
    start = "qwen-hf-dir-"
    names = [name.removeprefix(start) for name in released if name.startswith(start)]
    cosines = of_directions(torch.stack([released[start + name] for name in names]))
    off = cosines[13][cosines[13] < 1 - 1e-6]
    assert len(off) == 90 and off.min() >= 0.47 and off.max() <= 0.825
    mean = dict(zip(names, to_others(cosines)[15], strict=True))  # the nearest layer
    assert mean["Illegal_Activity"] == pytest.approx(0.73, abs=0.015)
    assert mean["Hate_Harass_Violence"] == pytest.approx(0.60, abs=0.015)
