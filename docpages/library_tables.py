"""Tables of the page that compares with other libraries, and of how times grow with sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import linregress, t

from docpages.markdown_table import MODELS, interval, markdown_table, read_result
from latentguard.report.page_table import format_interval

PEERS = "python benchmarks/peers.py --model MODEL --prompts FILE --out FILE --do check,speed"

Seconds = Mapping[str, Mapping[str, float]]
"""Arm -> ``seconds`` and ``extra_mib`` of one repetition."""


def peers_table(model: str) -> str:
    """Speed, time over the bare forward passes, and memory of every arm, in both environments."""
    rows = []
    for name in (f"peers-{model}", f"peers-4-{model}"):
        record = read_result(name)
        version = record["versions"]["transformers"].partition(".")[0]
        turns = record["turns"]
        for arm in turns[0]:
            rows.append(
                [
                    f"{arm} (transformers {version})",
                    _spread([record["prompts"] / turn[arm]["seconds"] for turn in turns]),
                    _spread(_ratios(turns, arm, "bare forward")),
                    _spread(_ratios(turns, arm, "bare forward, shared prefix")),
                    f"{max(turn[arm]['extra_mib'] for turn in turns):.0f}",
                    str(record["lines"].get(arm, "")),
                ]
            )
    head = [
        "way of reading",
        "prompts / s",
        "time / bare forward",
        "time / the same, shared prefix",
    ]
    return markdown_table([*head, "MiB", "lines of code"], rows, PEERS)


def _ratios(turns: Sequence[Seconds], arm: str, bare: str) -> list[float]:
    return [turn[arm]["seconds"] / turn[bare]["seconds"] for turn in turns]


def _spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def correctness_table() -> str:
    """The largest relative error of each way of reading, by the side that is padded."""
    models = ("smollm2-135m", "qwen2.5-coder-0.5b")
    cells: dict[str, dict[str, str]] = {}
    for model in models:
        for name in (f"peers-{model}", f"peers-4-{model}"):
            for one in read_result(name)["check"]:
                row = cells.setdefault(one["arm"], {})
                row.setdefault(f"{model} {one['padding']}", _error(one))
    columns = [f"{model} {side}" for model in models for side in ("left", "right")]
    rows = [[arm, *(of.get(column, "") for column in columns)] for arm, of in cells.items()]
    head = [f"{MODELS[m]}, padded {side}" for m in models for side in ("left", "right")]
    return markdown_table(["way of reading", *head], rows, PEERS)


def _error(check: Mapping[str, Any]) -> str:
    if check["wrong_prompts"]:
        wrong = f"{check['wrong_prompts']} of {check['prompts']}"
        return f"**{check['below_last']:.1f}: {wrong} prompts wrong**"
    return f"{check['below_last']:.0e}"


DETECTORS = {
    "length": "length",
    "TF-IDF, contrast": "n-grams, contrast set",
    "TF-IDF, paper": "n-grams, AdvBench + Alpaca",
    "alt-profanity-check": "alt-profanity-check",
}
"""Detector in the results -> name on the page."""


def peer_detection_table() -> str:
    """AUROC and the true-positive rate of detectors that see words alone."""
    results = read_result("peers-detection")
    rows = [
        [
            label,
            *(
                format_interval(*results[key][name][metric])
                for key in ("JBB", "XSTest")
                for metric in ("auroc", "tpr at 5 % fpr")
            ),
        ]
        for name, label in DETECTORS.items()
    ]
    sets = ("JailbreakBench", "XSTest")
    head = [f"{one}, {metric}" for one in sets for metric in ("AUROC", "TPR at 5 % FPR")]
    return markdown_table(["detector", *head], rows, "python benchmarks/peers_detection.py")


# ---- growth

GROWING = {
    "layers": "layers read, 8 prompts",
    "batch": "prompts in one pass",
    "prompts": "prompts (model of two narrow blocks)",
    "guards": "guards on one capture, 16 prompts",
    "length": "tokens of a prompt",
}
"""What grows in the results -> name on the page."""

GROWTH = "python benchmarks/growth.py --model default --out FILE"


def growth_table() -> str:
    """Time and memory at the smallest and the largest size, and the exponent of time."""
    measured = read_result("growth-smollm2-135m")
    rows = [_growth_row(label, measured, what) for what, label in GROWING.items()]
    head = ["what grows", "from, to", "seconds", "repetitions", "extra MiB", "exponent of time"]
    return markdown_table(head, rows, GROWTH)


def _growth_row(label: str, measured: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    own = [row for row in measured if row["what"] == what]
    sizes = sorted({row["size"] for row in own})
    ends = [[row for row in own if row["size"] == size] for size in (sizes[0], sizes[-1])]
    return [
        label,
        ", ".join(f"{size:,}" for size in (sizes[0], sizes[-1])),
        ", ".join(f"{median(row['seconds'] for row in end):.3g}" for end in ends),
        ", ".join(str(len(end)) for end in ends),
        ", ".join(f"{max(row['extra_mib'] for row in end):.0f}" for end in ends),
        format_interval(*_exponent(own)),
    ]


def _exponent(rows: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """The exponent of time in size with its 95 % interval: least squares on logarithms."""
    sizes, seconds = (np.log([row[key] for row in rows]) for key in ("size", "seconds"))
    fit = linregress(sizes, seconds)
    half = fit.stderr * t.ppf(0.975, len(rows) - 2)
    return iter((fit.slope, fit.slope - half, fit.slope + half))


def steering_table() -> str:
    """How many times as fast a sweep of steered replies is as one call for each setting."""
    rows = [
        [
            f"{one['model']}, {one['dtype'].removeprefix('torch.')}",
            f"{one['threads']}, {'wall' if one['clock'] == 'wall' else 'processor'} time",
            str(one["settings"]),
            f"{one['ratio']:.1f} ({len(one['ratios'])})",
            f"{one['equal_replies']} of {one['replies']}",
            one.get("note", ""),
        ]
        for one in read_result("steering")
    ]
    head = [
        "model",
        "threads, clock",
        "settings",
        "times as fast (rounds)",
        "equal replies",
        "note",
    ]
    return markdown_table(head, rows, "python benchmarks/steering.py")


# ---- a corpus on Ray


def corpus_table() -> str:
    """Prompts a second and memory, by actors."""
    rows = []
    for run in read_result("corpus")["runs"]:
        actors, driver = run["actors_mib"], run["driver_mib"]
        rows.append(
            [
                str(run["actors"]),
                f"{run['prompts_per_second']:,.0f}",
                f"{run['prompts_per_actor_cpu_second']:,.0f}",
                f"{actors['early']:.0f}, {actors['late']:.0f}",
                f"{driver['first']}, {driver['last']}",
                f"{run['bytes_per_row']:.0f}",
            ]
        )
    head = ["actors", "prompts / s", "prompts / s of an actor's processor time"]
    head += ["MiB of the actors, early and late", "MiB of the driver, first and last"]
    return markdown_table([*head, "bytes a row"], rows, "python benchmarks/corpus.py")


# ---- calibration's cost

SCORE_ARMS = {
    "calibration": "with calibration",
    "calibration, quadrants": "with quadrants as well",
    "bare, again": "the bare guard again",
}
"""Arm in the results -> name on the page."""


def score_table() -> str:
    """Time of a calibrated guard over that of a bare one."""
    arms = {one["arm"]: one for one in read_result("score")["arms"]}
    rows = [[label, interval(arms[name], "ratio")] for name, label in SCORE_ARMS.items()]
    head = ["guard", "time over the bare guard's [range of three rounds]"]
    return markdown_table(head, rows, "python benchmarks/score.py --model default")


LIBRARY_TABLES: dict[str, Callable[[], str]] = {
    **{f"peers-{m}": partial(peers_table, m) for m in ("smollm2-135m", "qwen2.5-coder-0.5b")},
    "peers-correctness": correctness_table,
    "peers-detection": peer_detection_table,
    "growth": growth_table,
    "steering": steering_table,
    "corpus": corpus_table,
    "score-cost": score_table,
}
"""Name on a page -> what makes the table."""
