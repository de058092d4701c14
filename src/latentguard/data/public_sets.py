"""The public data sets of the paper: where each lies, under which licence, and its rows as prompts.

Hub ids, columns and revisions were looked up in public code and in stored pages of the Hub, without
access to the Hub itself; ``HubSource.unchecked`` says what could not be looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""A row as its source has it."""


@dataclass(frozen=True)
class Request:
    """A row as a prompt: what all files of a data folder hold."""

    text: str
    """The request."""

    harmful: bool
    """Its label."""

    category: str | None = None
    """Risk category, or the kind of attack."""


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face Hub."""

    id: str
    """As ``org/name``."""

    read: Callable[[Row, str], Request | None]
    """Makes a prompt of a row and the name of its split; None leaves the row out."""

    splits: tuple[str, ...] = ("train",)
    """Which of its splits."""

    config: str | None = None
    """Which of its configurations; None for the only one."""

    revision: str | None = None
    """The commit; None for the newest."""

    is_gated: bool = False
    """Whether its terms must be accepted on the Hub first."""

    unchecked: str = ""
    """What could not be looked up."""


@dataclass(frozen=True)
class PublicSet:
    """One file of a data folder."""

    name: str
    """Of its file, without ``.jsonl``."""

    about: str
    """What it is."""

    rows: int
    """How many rows it has where it is complete."""

    licence: str
    """Of the texts."""

    experiments: tuple[str, ...]
    """Which experiments of the study use it; ``all`` for those of the four groups, ``benchmark``
    for the verb of that name."""

    upstream: str
    """Where its authors publish it."""

    hub: HubSource | None = None
    """Where it lies on the Hub; None if it does not."""

    limit: int | None = None
    """How many rows are taken, in order; None for all."""

    mirrors: tuple[tuple[str, str | None], ...] = ()
    """Other files of a mirror that hold it, with the category of its rows; None for all rows."""


def _is_true(value: object) -> bool:
    """Whether a flag is set; in CSV it is text."""
    return str(value).lower() in {"1", "1.0", "true"}


def _advbench(row: Row, split: str) -> Request:
    return Request(row["prompt"], harmful=True)


def _alpaca(row: Row, split: str) -> Request | None:
    return None if row["input"] else Request(row["instruction"], harmful=False)


def _jbb(row: Row, split: str) -> Request:
    return Request(row["Goal"], harmful=split == "harmful", category=row["Category"])


def _xstest(row: Row, split: str) -> Request:
    return Request(row["prompt"], harmful=row["label"] == "unsafe", category=row["type"])


def _catqa(row: Row, split: str) -> Request:
    return Request(row["Question"], harmful=True, category=row["Category"])


def _sorry_bench(row: Row, split: str) -> Request | None:
    if row["prompt_style"] != "base":
        return None
    return Request(row["turns"][0], harmful=True, category=f"sorry-{row['category']}")


MODERATION_FLAGS = ("S", "H", "V", "HR", "SH", "H2", "V2")
"""OpenAI's flags: sexual, hate, violence, harassment, self-harm, threats of hate, graphic."""


REDACTED = "REDACTED"
"""What stands in Aegis 2 where a text was taken out."""


def _openai_moderation(row: Row, split: str) -> Request | None:
    if _is_true(row.get("S3")):  # sexual content about minors: left out
        return None
    flags = [flag for flag in MODERATION_FLAGS if _is_true(row.get(flag))]
    return Request(row["prompt"], harmful=bool(flags), category=",".join(flags) or None)


def _toxicchat(row: Row, split: str) -> Request | None:
    if not _is_true(row["human_annotation"]):
        return None
    return Request(row["user_input"], harmful=_is_true(row["toxicity"]))


def _aegis(row: Row, split: str) -> Request | None:
    if row.get("text_type", "user_message") != "user_message":
        return None
    votes = [str(row[key]) for key in (f"labels_{n}" for n in range(5)) if row.get(key)]
    top = max(Counter(votes).values())
    return Request(row["text"], harmful=votes.count("Safe") < top)


def _aegis2(row: Row, split: str) -> Request | None:
    if row["prompt"] == REDACTED or row["prompt_label"] not in ("safe", "unsafe"):
        return None
    category = row.get("violated_categories") or None
    return Request(row["prompt"], harmful=row["prompt_label"] == "unsafe", category=category)


def _simple_safety_tests(row: Row, split: str) -> Request:
    return Request(row["prompt"], harmful=True, category=row.get("harm_area"))


def _harmbench(row: Row, split: str) -> Request | None:
    if row.get("FunctionalCategory") == "contextual":
        return None
    text = row["Behavior"] if "Behavior" in row else row["prompt"]
    return Request(text, harmful=True, category=row.get("SemanticCategory") or row.get("category"))


def _wildguardtest(row: Row, split: str) -> Request | None:
    if row["prompt_harm_label"] not in ("harmful", "unharmful"):
        return None
    harmful = row["prompt_harm_label"] == "harmful"
    return Request(row["prompt"], harmful=harmful, category=row.get("subcategory"))


def _or_bench(row: Row, split: str) -> Request:
    return Request(row["prompt"], harmful=False, category=row.get("category"))


def _persuasion(row: Row, split: str) -> Request:
    return Request(row["ss_prompt"], harmful=True, category="persuasion")


PAPER = "github.com/CHATS-lab/LLMs_Encode_Harmfulness_Refusal_Separately"

PUBLIC_SETS: tuple[PublicSet, ...] = (
    PublicSet(
        "advbench",
        "harmful instructions (Zou et al., 2023)",
        rows=520,
        licence="MIT",
        experiments=("all",),
        upstream="github.com/llm-attacks/llm-attacks",
        hub=HubSource(
            "walledai/AdvBench",
            _advbench,
            unchecked="whether it is gated, and a full revision",
        ),
    ),
    PublicSet(
        "alpaca_harmless",
        "harmless instructions without an input (Taori et al., 2023)",
        rows=2000,
        licence="CC BY-NC 4.0",
        experiments=("all",),
        upstream="github.com/tatsu-lab/stanford_alpaca",
        hub=HubSource("tatsu-lab/alpaca", _alpaca, unchecked="a revision"),
        limit=2000,
    ),
    PublicSet(
        "jbb",
        "JailbreakBench: harmful and harmless behaviours in pairs (Chao et al., 2024)",
        rows=200,
        licence="MIT",
        experiments=("all", "confound"),
        upstream="github.com/JailbreakBench/jailbreakbench",
        hub=HubSource(
            "JailbreakBench/JBB-Behaviors",
            _jbb,
            splits=("harmful", "benign"),
            config="behaviors",
            revision="886acc352a31533ffbcf4ef22c744658688086fc",
        ),
    ),
    PublicSet(
        "xstest",
        "harmless requests that sound harmful, and their harmful twins (Roettger et al., 2023)",
        rows=450,
        licence="CC BY 4.0",
        experiments=("all", "confound", "benchmark"),
        upstream="github.com/paul-rottger/xstest",
        hub=HubSource("Paul/XSTest", _xstest, revision="f600c994b256f12867dfa5b3eb3d545a3e62f8b5"),
    ),
    PublicSet(
        "sorry_bench",
        "harmful requests of 44 categories (Xie et al., 2024): the paper's accepted ones",
        rows=440,
        licence="SORRY-Bench licence agreement",
        experiments=("all",),
        upstream="sorry-bench.github.io",
        hub=HubSource(
            "sorry-bench/sorry-bench-202503",
            _sorry_bench,
            revision="612a4e1f45db8adf884fa62318ddf9fa1c6e75e9",
            is_gated=True,
        ),
    ),
    PublicSet(
        "catqa",
        "CatQA: harmful questions of eleven categories (Bhardwaj et al., 2024)",
        rows=550,
        licence="Apache-2.0",
        experiments=("all", "categories"),
        upstream="github.com/declare-lab/resta",
        hub=HubSource(
            "declare-lab/CategoricalHarmfulQA",
            _catqa,
            splits=("en",),
            unchecked="a full revision",
        ),
    ),
    PublicSet(
        "dsn_suffixes",
        "JailbreakBench goals with the DSN suffix of Llama-2-7B (Zhou et al., 2024)",
        rows=100,
        licence="MIT",
        experiments=("jailbreaks", "guards"),
        upstream="github.com/JailbreakBench/artifacts: attack-artifacts/DSN/white_box",
        mirrors=(("jailbreaks", "suffix"),),
    ),
    PublicSet(
        "in_the_wild_templates",
        "forbidden questions in jailbreak templates found in the wild (Shen et al., 2024)",
        rows=150,
        licence="MIT",
        experiments=("jailbreaks", "guards"),
        upstream="github.com/verazuo/jailbreak_llms: data/forbidden_question_set.csv.zip",
        mirrors=(("jailbreaks", "template"),),
    ),
    PublicSet(
        "persuasion_samples",
        "AdvBench requests rewritten to persuade (Zeng et al., 2024)",
        rows=50,
        licence="Persuasive-Jailbreaker-Data licence agreement",
        experiments=("jailbreaks", "guards"),
        upstream="github.com/CHATS-lab/persuasive_jailbreaker",
        hub=HubSource(
            "CHATS-Lab/Persuasive-Jailbreaker-Data",
            _persuasion,
            is_gated=True,
            unchecked="its columns, splits and revision",
        ),
        mirrors=(("jailbreaks", "persuasion"),),
    ),
    PublicSet(
        "templates_advbench",
        "AdvBench goals in human-written templates (Yu et al., 2023): the authors' own test set",
        rows=400,
        licence="MIT",
        experiments=("jailbreaks", "guards"),
        upstream=f"{PAPER}: data/human-seed-50-adv.json",
    ),
    PublicSet(
        "openai_moderation",
        "texts of both labels with OpenAI's categories (Markov et al., 2022)",
        rows=1595,
        licence="MIT",
        experiments=("guards", "confound", "benchmark"),
        upstream="github.com/openai/moderation-api-release",
        hub=HubSource(
            "mmathys/openai-moderation-api-evaluation",
            _openai_moderation,
            revision="84e5cf3bcd6acb3dfc70b6760451645872218a3e",
        ),
    ),
    PublicSet(
        "toxicchat",
        "what people asked a chat model, labelled by hand (Lin et al., 2023): Table 8",
        rows=2853,
        licence="CC BY-NC 4.0",
        experiments=("guards", "benchmark"),
        upstream="huggingface.co/datasets/lmsys/toxic-chat",
        hub=HubSource(
            "lmsys/toxic-chat",
            _toxicchat,
            splits=("test",),
            config="toxicchat0124",
            unchecked="a revision",
        ),
        mirrors=(("toxicchat_third", None),),
    ),
    PublicSet(
        "aegis",
        "Aegis: requests of its test split, by the votes of annotators (Ghosh et al., 2024)",
        rows=359,
        licence="CC BY 4.0",
        experiments=("benchmark",),
        upstream="huggingface.co/datasets/nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
        hub=HubSource(
            "nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
            _aegis,
            splits=("test",),
            unchecked="a revision, and how ties between annotators count elsewhere",
        ),
    ),
    PublicSet(
        "aegis2",
        "Aegis 2.0: prompts of its test split (Ghosh et al., 2025)",
        rows=1928,
        licence="CC BY 4.0",
        experiments=("benchmark",),
        upstream="huggingface.co/datasets/nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        hub=HubSource(
            "nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
            _aegis2,
            splits=("test",),
            revision="d86bb8bedff51d25ac834ab7838f1cc61acb7a2c",
            unchecked="how many rows are redacted",
        ),
    ),
    PublicSet(
        "simple_safety_tests",
        "SimpleSafetyTests: harmful requests of five areas (Vidgen et al., 2023)",
        rows=100,
        licence="CC BY 4.0",
        experiments=("benchmark",),
        upstream="huggingface.co/datasets/Bertievidgen/SimpleSafetyTests",
        hub=HubSource(
            "Bertievidgen/SimpleSafetyTests",
            _simple_safety_tests,
            splits=("test",),
            revision="98223c5d8c4059c8f4d8fe2fec8720ee8a20d3c5",
        ),
    ),
    PublicSet(
        "harmbench",
        "HarmBench behaviours without a context (Mazeika et al., 2024); published figures: 239 of "
        "the test split, as in its harmbench_behaviors_text_test.csv",
        rows=200,
        licence="MIT",
        experiments=("benchmark",),
        upstream="github.com/centerforaisafety/HarmBench: data/behavior_datasets",
        hub=HubSource(
            "walledai/HarmBench",
            _harmbench,
            config="standard",
            is_gated=True,
            unchecked="a revision",
        ),
    ),
    PublicSet(
        "wildguardtest",
        "WildGuardTest: plain and adversarial prompts, labelled by hand (Han et al., 2024)",
        rows=1699,
        licence="ODC-BY",
        experiments=("benchmark",),
        upstream="huggingface.co/datasets/allenai/wildguardmix",
        hub=HubSource(
            "allenai/wildguardmix",
            _wildguardtest,
            splits=("test",),
            config="wildguardtest",
            revision="d29c47f41c8b51348b5c8e8c81c039b3132b66d1",
            is_gated=True,
        ),
    ),
    PublicSet(
        "or_bench",
        "OR-Bench, the hard part: harmless requests that sound harmful (Cui et al., 2024)",
        rows=1319,
        licence="CC BY 4.0",
        experiments=("benchmark",),
        upstream="huggingface.co/datasets/bench-llm/or-bench",
        hub=HubSource(
            "bench-llm/or-bench",
            _or_bench,
            config="or-bench-hard-1k",
            unchecked="a revision",
        ),
    ),
)
"""Every public set that the study or the benchmark uses, in the order of ``latentguard data list``.
"""
