"""Build the guard that comes with the package from the built-in prompts, and compare the two.

    python benchmarks/rebuild_default_guard.py --cache build/captures [--write]

An hour of processor time; a killed run goes on from the cache. ``--write`` puts the new guard into
the package. Two builds differ by the rounding of a float32 pass: scores by about 1e-5 of their
spread.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latentguard.data.builtin import load_guard_prompts, load_samples
from latentguard.guard.adaptation import Reference
from latentguard.guard.chunk_calibration import fit_chunking
from latentguard.guard.hub import DEFAULT_GUARD
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.models.threads import choose_threads
from latentguard.probes.capture_cache import CaptureCache

MAX_FPR = 0.05


def build(model: ChatModel, cache: Path) -> LatentGuard:
    """Fit on all training rows, then long texts; calibrate on the harmless validation rows; read
    the reference against which labels are learned.
    """
    train = load_guard_prompts("train")
    harmless = [prompt for prompt in load_guard_prompts("validation") if not prompt.harmful]
    with CaptureCache(cache) as states, tqdm(total=len(train)) as bar:
        guard = LatentGuard.fit(model, train, reading="attended", progress=bar.update, cache=states)
    guard = fit_chunking(model, guard, max_fpr=MAX_FPR)
    guard = guard.calibrate(model, harmless, max_fpr=MAX_FPR)
    return replace(guard, reference=Reference.read(guard, model))


def compare(old: LatentGuard, new: LatentGuard, model: ChatModel) -> None:
    """Print how far two guards are apart, in spreads of the old one's scores."""
    prompts = load_samples()
    scores = [
        np.array([v.score for v in guard.scan(model, prompts, progress=lambda _: None)])
        for guard in (old, new)
    ]
    gap = np.abs(scores[0] - scores[1]).max() / old.spread
    print(f"scores of {len(prompts)} samples: at most {gap:.1e} spreads apart")
    print(f"threshold: {old.threshold:.6g} and {new.threshold:.6g}")
    print(f"cross-validated: {old.fitted} and {new.fitted}")


def main() -> None:
    """Build, compare, and write if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("build/captures"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    model = ChatModel.load("default", device="cpu")
    choose_threads(model)
    guard = build(model, options.cache)
    if DEFAULT_GUARD.exists():
        compare(LatentGuard.load(DEFAULT_GUARD, model), guard, model)
    if options.write:
        guard.save(DEFAULT_GUARD)
        print(f"written to {DEFAULT_GUARD}")


if __name__ == "__main__":
    main()
