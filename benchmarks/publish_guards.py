"""Fit, calibrate, benchmark and push guards for a list of chat models.

    python benchmarks/publish_guards.py --org ORG --data-dir data --out build/guards [--push]

Each model has a folder in OUT with its guard, its benchmark and, once it is pushed,
``pushed.json``. What is there is not done again, so a killed run goes on where it stopped; a model
that fails is named at the end and does not stop the others. Without ``--push`` nothing leaves the
machine. Nobody ran it on the models below yet: that takes a GPU and an account on the Hub.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentguard.benchmark.report import benchmark_report, f1_table, save_benchmark
from latentguard.benchmark.run import load_suite, run_benchmark
from latentguard.benchmark.suite import LoadedSet
from latentguard.data.builtin import load_guard_prompts
from latentguard.errors import GuardError, LatentGuardError
from latentguard.files import write_atomic
from latentguard.guard.artifact import JSON_FILE
from latentguard.guard.chunk_calibration import fit_chunking
from latentguard.guard.latent_guard import LatentGuard
from latentguard.models.chat_model import ChatModel
from latentguard.probes.capture_cache import CaptureCache
from latentguard.prompts import Prompt

MODELS = (
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "HuggingFaceTB/SmolLM3-3B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "google/gemma-2-2b-it",
    "google/gemma-3-1b-it",
    "google/gemma-3-4b-it",
    "microsoft/Phi-3.5-mini-instruct",
    "microsoft/Phi-4-mini-instruct",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Ministral-8B-Instruct-2410",
    "allenai/OLMo-2-0425-1B-Instruct",
    "allenai/OLMo-2-1124-7B-Instruct",
    "ibm-granite/granite-3.3-2b-instruct",
    "ibm-granite/granite-3.3-8b-instruct",
    "tiiuae/Falcon3-1B-Instruct",
    "tiiuae/Falcon3-3B-Instruct",
    "tiiuae/Falcon3-7B-Instruct",
    "01-ai/Yi-1.5-6B-Chat",
    "internlm/internlm2_5-7b-chat",
)
"""Popular open chat models of 0.5 to 8B; ``--models`` takes a file with others, one a line."""

PUSHED = "pushed.json"


@dataclass(frozen=True)
class Plan:
    """What is done with each model."""

    out: Path
    """A folder with one for each model."""

    org: str
    """Whose the guards on the Hub are."""

    data_dir: Path
    """Folder with the sets of the benchmark."""

    train: Sequence[Prompt]
    """What guards are fitted on."""

    harmless: Sequence[Prompt]
    """What they are calibrated on."""

    max_fpr: float = 0.05
    """The rate that their thresholds promise."""

    push: bool = False
    """Whether they go to the Hub."""

    private: bool = False
    """Whether new repositories are private."""

    device_map: str | None = None
    """``auto`` spreads a model over GPUs."""


@dataclass(frozen=True)
class Published:
    """What became of one model."""

    model: str
    """Its Hub id, or a folder."""

    url: str | None
    """Where its guard can be seen; None if it was not pushed."""

    error: str | None = None
    """Why it failed."""


def publish(plan: Plan, models: Iterable[str]) -> list[Published]:
    """Publish a guard for each model; one that fails does not stop the others."""
    sets, _ = load_suite(plan.data_dir)
    results = []
    for name in models:
        try:
            result = Published(name, publish_one(plan, name, sets))
        except (LatentGuardError, OSError, torch.OutOfMemoryError) as error:
            result = Published(name, None, str(error) or type(error).__name__)
        print(f"{name}: {result.error or result.url or 'not pushed'}", flush=True)
        results.append(result)
    return results


def publish_one(plan: Plan, name: str, sets: Sequence[LoadedSet]) -> str | None:
    """Do what is left to do for one model; returns where its guard can be seen, if it was pushed.

    Raises:
        LatentGuardError: if the model, the guard or the Hub is not as it should be.
    """
    folder = plan.out / folder_name(name)
    record = folder / PUSHED
    if record.exists():
        return str(json.loads(record.read_text())["url"])
    placing = {"device_map": plan.device_map} if plan.device_map else {}
    model = ChatModel.load(name, **placing)
    guard = _guard(plan, model, folder / "guard")
    notes = _benchmark(guard, model, sets, folder / "benchmark")
    if not plan.push:
        return None
    repo = f"{plan.org}/latentguard-{folder_name(name)}"
    url = guard.push_to_hub(repo, private=plan.private, notes=notes)
    write_atomic(record, json.dumps({"url": url, "guard": guard.digest}) + "\n")
    return url


def folder_name(model: str) -> str:
    """The last part of a model's name, as files have it."""
    return Path(model).name.lower()


def _guard(plan: Plan, model: ChatModel, folder: Path) -> LatentGuard:
    """The calibrated guard of a model: the one in its folder, or a new one."""
    if (folder / JSON_FILE).exists():
        guard = LatentGuard.load(folder, model)
        if guard.bound is None or guard.bound.max_fpr != plan.max_fpr:
            raise GuardError(
                f"{folder} holds a guard of another rate; expected {plan.max_fpr}. Remove the "
                "folder, or choose another --out."
            )
        return guard
    with CaptureCache(folder.with_name("captures")) as states:
        guard = LatentGuard.fit(model, plan.train, cache=states)
    guard = fit_chunking(model, guard, max_fpr=plan.max_fpr)
    guard = guard.calibrate(model, plan.harmless, max_fpr=plan.max_fpr)
    guard.save(folder)
    return guard


def _benchmark(
    guard: LatentGuard, model: ChatModel, sets: Sequence[LoadedSet], folder: Path
) -> list[str]:
    """What the benchmark found, as paragraphs of the model card; its verdicts are kept."""
    result = run_benchmark(guard, model, sets, folder)
    save_benchmark(result, folder)
    table = f1_table(result, [])
    return [f"## {benchmark_report(result).title}", table.markdown()]


def read_models(file: Path | None) -> list[str]:
    """The models of a file, one a line; the list above without one."""
    if file is None:
        return list(MODELS)
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return [line for line in lines if line]


def main() -> None:
    """Publish, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--org", required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("build/guards"))
    parser.add_argument("--max-fpr", type=float, default=0.05)
    parser.add_argument("--device-map")
    parser.add_argument("--push", action="store_true")
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args()
    harmless = [prompt for prompt in load_guard_prompts("validation") if not prompt.harmful]
    plan = Plan(
        out=options.out,
        org=options.org,
        data_dir=options.data_dir,
        train=load_guard_prompts("train"),
        harmless=harmless,
        max_fpr=options.max_fpr,
        push=options.push,
        private=options.private,
        device_map=options.device_map,
    )
    results = publish(plan, read_models(options.models))
    if failures := [one for one in results if one.error]:
        sys.exit(f"{len(failures)} of {len(results)} models failed; run it again to go on.")


if __name__ == "__main__":
    main()
