"""The guard in the package, on its own model: what it says, and what it was made from."""

from itertools import islice

import numpy as np
import pytest

from latentguard.data.builtin import load_contrast, load_guard_prompts
from latentguard.errors import ModelError
from latentguard.guard.hub import DEFAULT_GUARD
from latentguard.guard.leakage import prompt_digest
from latentguard.guard.loading import load_guard
from latentguard.stats.detection import auroc

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def guard():
    guard = load_guard("default")
    try:
        guard("Hello.")
    except ModelError as error:
        pytest.skip(str(error))
    return guard


def test_it_was_fitted_on_the_training_rows_of_this_version(guard):
    """If it fails, run ``benchmarks/rebuild_default_guard.py --write``: the rows have changed."""
    expected = {int(prompt_digest(prompt)) for prompt in load_guard_prompts("train")}
    assert {int(digest) for digest in guard.training_digests} == expected


def test_its_canaries_score_as_they_did_when_it_was_built(guard):
    texts = [canary.text for canary in guard.canaries]
    scores = [verdict.score for verdict in guard(texts)]
    gaps = np.abs(np.subtract(scores, [canary.score for canary in guard.canaries]))
    assert gaps.max() < 1e-3 * guard.spread


def test_it_tells_unseen_harmful_from_harmless(guard):
    test = list(islice(load_contrast("test"), 120))
    labels = np.array([bool(prompt.harmful) for prompt in test])
    scores = np.array([verdict.score for verdict in guard(test)])
    assert auroc(labels, scores) > 0.8


def test_it_reads_long_prompts_and_is_calibrated(guard):
    assert guard.bound is not None
    assert guard.bound.upper <= 0.05
    assert guard.chunking is not None


def test_it_is_small():
    assert sum(file.stat().st_size for file in DEFAULT_GUARD.iterdir()) < 12 << 20
