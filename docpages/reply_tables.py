"""Result tables of the page on replies."""

from __future__ import annotations

from typing import Any

from docpages.markdown_table import interval, markdown_table, read_result, read_results

COMMAND = "python benchmarks/replies.py --model MODEL"

REPLY_RULES = {
    "reply probe (windows): highest moving mean of 16": "**shipped**: highest mean of 16",
    "reply probe (windows): mean of all tokens": "same probe, mean of all tokens",
    "reply probe (windows): softmax-weighted mean": "same probe, softmax-weighted mean",
    "reply probe (windows): highest running mean, prior 16": "same probe, highest running mean",
    "reply probe (windows): highest smoothed, half-life 16": "same probe, highest smoothed",
    "reply probe (windows): highest whole window of 48": "same probe, highest window of 48",
    "reply probe (windows): highest token": "same probe, highest token",
    "reply probe (windows): last token": "same probe, last token",
    "reply probe (mean): mean of all tokens": "probe of whole means, mean of all tokens",
    "reply probe (prefixes): mean of all tokens": "probe of prefix means, mean of all tokens",
    "reply probe (last token): last token": "probe of last tokens, last token",
    "attention-pooled probe": "probe with learnt attention",
    "one probe for both: highest moving mean of 16": "one probe for prompts and replies",
    "prompt probe transferred: highest moving mean of 16": "prompt probe transferred",
    "reply and prompt score together": "the shipped rule and the prompt score together",
    "prompt score alone": "prompt score alone",
    "second pass, fitted on prompt + reply": "second pass over prompt + reply, fitted on that",
    "second pass, the prompt guard": "second pass over prompt + reply, the prompt guard",
    "the paper's rule on replies: mean of all tokens": "the paper's rule",
    "n-grams on reply": "n-grams on the reply",
    "n-grams on prompt + reply": "n-grams on prompt + reply",
    "length": "length of the reply",
}
"""Rule in the results -> name on pages."""


SHORT_RULES = (
    "reply probe (windows): highest moving mean of 16",
    "prompt probe transferred: highest moving mean of 16",
    "prompt score alone",
    "second pass, fitted on prompt + reply",
    "second pass, the prompt guard",
    "the paper's rule on replies: mean of all tokens",
    "n-grams on reply",
    "n-grams on prompt + reply",
    "length",
)
"""The rule that ships and its baselines, shown for each model."""

HOLDS = (0, 8, 16, 32)
"""Tokens that are held back."""

Directions = list[dict[str, Any]]
"""Fitted on one set and judged on the other, both ways."""


def replies_table() -> str:
    """A row a rule of the default model, the two directions beside each other."""
    directions = read_result("replies-smollm2-135m")["directions"]
    rows = [[name, *cells] for name, cells in _rule_rows(directions, tuple(REPLY_RULES))]
    return markdown_table(["rule", *_direction_head(directions)], rows, COMMAND)


def reply_models_table() -> str:
    """A row a model and rule: the one that ships beside its baselines, and random directions."""
    rows = []
    for name, record in read_results("replies"):
        directions = record["directions"]
        own = [[rule, *cells] for rule, cells in _rule_rows(directions, SHORT_RULES)]
        draws = [f"{sorted(one['random_direction'])[2]:.2f}" for one in directions]
        own.append(["random direction, median of five", draws[0], "", draws[1], "", ""])
        rows += [[name if n == 0 else "", *row] for n, row in enumerate(own)]
    return markdown_table(["model", "rule", *_direction_head(directions)], rows, COMMAND)


def reply_stream_table() -> str:
    """A row a model and direction: what a stream at the shipped threshold catches and lets out."""
    rows = []
    for name, record in read_results("replies"):
        for one in record["directions"]:
            own = one["stream"]
            out = own["tokens_out_before_the_cut"]
            rows.append(
                [
                    name,
                    f"{one['train']} ({one['training_rows']}) -> {one['test']}",
                    f"{one['harmful']}, {one['harmless']}",
                    f"{own['recall']:.2f}",
                    f"{own['false_positive_rate']:.3f}",
                    f"{own['f1']:.2f}",
                    *(f"{out[f'held back {hold}'].get('median', 0):.0f}" for hold in HOLDS),
                ]
            )
    head = ["model", "fitted on (rows) -> judged", "harmful, harmless", "recall"]
    head += ["FPR (asked: 0.05)", "F1", *(f"tokens out, {hold} held back" for hold in HOLDS)]
    return markdown_table(head, rows, COMMAND)


def _rule_rows(directions: Directions, rules: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """The name and cells of each rule that both directions have."""
    rows = []
    for rule in rules:
        found = [one["figures"].get(rule) for one in directions]
        if not all(found):
            continue
        cells = []
        for one in found:
            cells += [interval(one, "auroc"), f"{one['tpr_at_0.01']:.2f}, {one['tpr_at_0.05']:.2f}"]
        rows.append((REPLY_RULES[rule], [*cells, f"{found[0]['within_prompts']:.2f}"]))
    return rows


def _direction_head(directions: Directions) -> list[str]:
    head = []
    for one in directions:
        head += [f"{one['train']} -> {one['test']}", "TPR at 1, 5 % FPR"]
    return [*head, "within prompts, saferlhf"]


def reply_overhead_table() -> str:
    """Milliseconds a token."""
    found = read_result("reply-overhead-smollm2-135m")
    more = found["overhead"]
    rows = [
        ["decoding, not read", f"{found['plain_ms']:.1f}", ""],
        [
            "decoding, each token read",
            f"{found['read_ms']:.1f}",
            _percent(more),
        ],
    ]
    for chunk, cost in found["followed_ms"].items():
        rows.append(
            [f"following another model's reply, {chunk} tokens at a time", f"{cost:.1f}", ""]
        )
    return markdown_table(
        ["what", "ms of processor time a token", "more than not read"],
        rows,
        "python benchmarks/reply_overhead.py --model default",
    )


def vllm_reply_overhead_table() -> str:
    """Milliseconds a token inside vLLM, and what the middleware adds."""
    found = read_result("vllm-reply-overhead-smollm2-135m")
    rows = []
    for batch, record in found["found"].items():
        spent = record["ms"]
        rows.append(
            [
                f"{batch} at once",
                str(record["groups"]),
                *(f"{spent[arm]:.1f}" for arm in ("plain", "prompts", "replies")),
                *(_percent(record[name]) for name in ("over_prompts", "over_plain")),
            ]
        )
    parts = [
        ("the code for a token, in the engine's process", found["engine"]["microseconds_a_token"]),
        ("the code for a token, in the server's", found["middleware"]["microseconds_a_token"]),
    ]
    for name, more in parts:
        low, value, high = (more[end] / 1000 for end in ("low", "value", "high"))
        n = str(found["engine"]["streams"])
        rows.append([name, n, "", "", f"{value:.3f} [{low:.3f}, {high:.3f}]", "", ""])
    last = found["last"]
    name = f"the pass of the last token of {last['mean_tokens']:.0f}, once a reply"
    own = last["ms"]
    cell = f"{own['value']:.0f} [{own['low']:.0f}, {own['high']:.0f}]"
    rows.append([name, str(last["prompts"]), "", "", cell, "", ""])
    return markdown_table(
        [
            *("replies", "n", "ms a token, no guard", "prompts judged", "replies judged, too"),
            *("more than prompts judged", "more than no guard"),
        ],
        rows,
        "python benchmarks/vllm_reply_overhead.py --guard DIR",
    )


def _percent(more: dict[str, float]) -> str:
    return f"{more['value']:+.1%} [{more['low']:+.1%}, {more['high']:+.1%}]"


REPLY_TABLES = {
    "replies": replies_table,
    "reply-models": reply_models_table,
    "reply-stream": reply_stream_table,
    "reply-overhead": reply_overhead_table,
    "vllm-reply-overhead": vllm_reply_overhead_table,
}
"""Name on a page -> what makes the table."""
