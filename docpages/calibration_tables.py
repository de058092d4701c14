"""Tables of the page on calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from docpages.markdown_table import DEFAULT_GUARD, interval, markdown_table, read_result
from latentguard.report.page_table import format_interval

RESULT = "calibration-qwen2.5-coder-0.5b"
COMMAND = (
    "python benchmarks/calibration.py GUARD --model MODEL --traffic FILE --labelled FILE "
    "--other FILE --work DIR --json FILE"
)

CASCADE = "cascade-smollm2-135m"
CASCADE_COMMAND = "python benchmarks/cascade.py SECOND --data-dir D --work DIR --json FILE"
CASCADES = {
    "cascade-smollm2-135m": (DEFAULT_GUARD, "Qwen2.5-Coder-0.5B"),
    "cascade-qwen2.5-coder-0.5b": ("Qwen2.5-Coder-0.5B", DEFAULT_GUARD),
    "cascade-qwen2.5-coder-1.5b": ("SmolLM2-135M (`pooled`)", "Qwen2.5-Coder-1.5B"),
}
"""Result file -> the first guard, and the second."""

CASCADE_COSTS = ("cascade-smollm2-135m", "cascade-qwen2.5-coder-1.5b")
"""Result files of those where the smaller guard is the first."""

CASCADE_SETS = {
    "all": "all",
    "xstest": "XSTest",
    "openai_moderation": "OpenAI moderation",
    "jbb": "JailbreakBench",
    "toxicchat_third": "ToxicChat, a third",
}

Figure = Mapping[str, Any]


def promise_table() -> str:
    """How often a promised rate was kept, and what drift says of other traffic."""
    found = read_result(RESULT)
    promise = found["promise"]
    rows = [
        [
            f"flagged, mean over {promise['splits']} splits",
            f"{promise['mean']:.2%}",
            _each(promise),
        ],
        ["flagged, 95 % of splits", f"{promise['low']:.1%} to {promise['high']:.1%}", ""],
        ["splits over 1 %", f"{promise['over_the_promise']} of {promise['splits']}", ""],
        ["false alarms of `drift`", f"{promise['drift_alarms']} of {promise['splits']}", ""],
        [
            "JailbreakBench, harmless prompts that sound harmful, flagged",
            *_share(found["flagged"]["near"]),
        ],
        ["JailbreakBench, harmful prompts flagged", *_share(found["flagged"]["harmful"])],
    ]
    return markdown_table(["question", "measured", "n"], rows, COMMAND)


def _each(promise: Figure) -> str:
    return f"{promise['n']} each"


def _share(figure: Figure) -> tuple[str, str]:
    return interval(figure), f"{sum(figure['n'])}"


def probabilities_table() -> str:
    """Calibration error of probabilities, on prompts like the calibration's and on others."""
    found = read_result(RESULT)["probabilities"]
    sets = {"other half": "the other half of the same prompts", "other": "XSTest"}
    rows = []
    for key, label in sets.items():
        before, after = (
            found[f"{key}, {side}"]["expected_calibration_error"] for side in ("before", "after")
        )
        harmful, harmless = before["n"]
        rows.append([label, f"{harmful} + {harmless}", interval(before), interval(after)])
    head = ["test set", "n, harmful + harmless", "calibration error before", "after"]
    return markdown_table(head, rows, COMMAND)


def quadrants_table() -> str:
    """Shares of prompts by quadrant."""
    found = read_result(RESULT)
    shares = {(group, name): figure for group, name, figure in found["quadrants"]["shares"]}
    figures = {
        "refused, counted as refusing (cross-fitted)": found["quadrants"]["refused"],
        "accepted, counted as refusing (cross-fitted)": found["quadrants"]["accepted"],
        "JailbreakBench, harmful: jailbreak suspects": shares["harmful", "harmful, accepting"],
        "JailbreakBench, harmful: harmful and refusing": shares["harmful", "harmful, refusing"],
        f"JailbreakBench, harmless: called over-refusals (the model refused "
        f"{found['near']['refused']})": found["near"]["over_refusal"],
        "Alpaca: called over-refusals": shares["harmless", "harmless, refusing"],
    }
    rows = [[label, *_share(figure)] for label, figure in figures.items()]
    return markdown_table(["prompts", "share", "n"], rows, COMMAND)


def chat_rates_table() -> str:
    """Harmless chats that are flagged, a row a length, a column what the rate is of."""
    rows = dict[int, list[str]]()
    for one in read_result("chat-rates-smollm2-135m")["rows"]:
        share = format_interval(one["share"], one["low"], one["high"])
        rows.setdefault(one["messages"], [str(one["n"])]).append(share)
    head = ["messages of the user", "chats", "flagged, `--rate-of chat`", "`--rate-of text`"]
    cells = [[str(length), *of] for length, of in rows.items()]
    command = "python benchmarks/chat_rates.py --guard src/latentguard/guard/default --out FILE"
    return markdown_table(head, cells, command)


def cascade_planted_table() -> str:
    """Joint rates of a guard and a second opinion where they are known."""
    found = read_result(CASCADE)["planted"]
    rows = [
        [
            name,
            f"{world['asked']:.1%}",
            f"{world['fpr_first']:.1%}, {world['recall_first']:.0%}",
            f"{world['fpr']:.1%}, {world['recall']:.0%}",
            f"{world['share_over_rate']:.1%}",
        ]
        for name, world in found["worlds"].items()
    ]
    head = [
        "second opinion",
        "harmless prompts asked about",
        "guard alone: falsely flagged, caught",
        "both: falsely flagged, caught",
        f"calibrations over {found['max_fpr']:.0%}, of {found['calibrations']}",
    ]
    return markdown_table(head, rows, CASCADE_COMMAND)


def cascade_cost_table() -> str:
    """AUROC of each guard by itself, and what a prompt costs in it and in both."""
    rows = []
    for record in CASCADE_COSTS:
        found = read_result(record)["labelled"]
        first, second = CASCADES[record]
        names = {"first": first, "second": second, "cascade": f"{first}, then {second}"}
        for key, name in names.items():
            area = f"{found['auroc'][key]:.2f}" if key in found["auroc"] else ""
            rows.append([name, area, f"{found['milliseconds'][key]:.0f}"])
    head = ["guard", f"AUROC, {_n(found)}", "processor time a prompt, ms"]
    return markdown_table(head, rows, CASCADE_COMMAND)


def _n(found: Figure) -> str:
    return f"{found['all']['harmless']} harmless + {found['all']['harmful']} harmful"


def cascade_sets_table() -> str:
    """F1, recall and false-positive rate of both guards and the cascade on labelled sets."""
    rows = []
    for record, (first, second) in CASCADES.items():
        found = read_result(record)["labelled"]
        for key, label in CASCADE_SETS.items():
            figures = found["all"] if key == "all" else found["sets"][key]
            asked = figures["asked"]
            rows.append(
                [
                    f"{first}, then {second}" if key == "all" else "",
                    f"{label} ({figures['harmless']} + {figures['harmful']})",
                    f"{asked['harmless']:.0%}, {asked['harmful']:.0%}",
                    *(_rates(figures[name]) for name in ("first alone", "second alone", "cascade")),
                ]
            )
    head = [
        "guards",
        "set (harmless + harmful)",
        "asked about: harmless, harmful",
        "first alone: F1, caught, falsely flagged",
        "second alone",
        "both",
    ]
    return markdown_table(head, rows, CASCADE_COMMAND)


def _rates(figures: Figure) -> str:
    return f"{figures['f1']:.2f}, {figures['recall']:.0%}, {figures['fpr']:.1%}"


EXIT_SETS = {
    "validation": "built-in guard prompts, validation",
    "alpaca_harmless": "Alpaca",
    "toxicchat_third": "ToxicChat, a third",
    "openai_moderation": "OpenAI moderation",
    "xstest": "XSTest",
}


def early_exit_table() -> str:
    """What leaves, what is lost and how much faster it is, by the share that may be lost."""
    found = read_result("early-exit-smollm2-135m")
    rows = [
        [
            f"{float(share):.0%}",
            f"{EXIT_SETS[key]} ({sum(one['left']['n'])})",
            f"{one['left']['value']:.0%}",
            _lost(one["lost"]),
            _ratio(found["speed"].get(share, {}).get(key)),
        ]
        for share, sets in found["shares"].items()
        for key, one in sets.items()
    ]
    head = [
        "may be lost",
        "prompts (n)",
        f"left after layer {found['layer']}",
        "flagged prompts lost",
        "prompts per second, over the whole pass",
    ]
    command = "python benchmarks/early_exit.py default --data-dir D --json FILE"
    return markdown_table(head, rows, command)


def _lost(figure: Figure | None) -> str:
    return f"{figure['n'][0]} of {sum(figure['n'])}" if figure else "none is flagged"


def _ratio(speed: Figure | None) -> str:
    return "{:.2f} ({:.2f}, {:.2f})".format(*speed["ratio"]) if speed else ""


CALIBRATION_TABLES: dict[str, Callable[[], str]] = {
    "chat-rates": chat_rates_table,
    "calibration-promise": promise_table,
    "calibration-probabilities": probabilities_table,
    "calibration-quadrants": quadrants_table,
    "cascade-planted": cascade_planted_table,
    "cascade-sets": cascade_sets_table,
    "cascade-cost": cascade_cost_table,
    "early-exit": early_exit_table,
}
"""Name on a page -> what makes the table."""
