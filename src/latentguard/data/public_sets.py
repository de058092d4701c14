"""The public data sets of the paper: where each lies, under which licence, and its rows as prompts.

Hub ids, columns and revisions were looked up in public code and in stored pages of the Hub, without
access to the Hub itself; ``HubSource.unchecked`` says what could not be looked up.
"""

from __future__ import annotations

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
    """Which experiments of the study use it; ``all`` for those of the four groups."""

    upstream: str
    """Where its authors publish it."""

    hub: HubSource | None = None
    """Where it lies on the Hub; None if it does not."""

    limit: int | None = None
    """How many rows are taken, in order; None for all."""

    mirrors: tuple[tuple[str, str | None], ...] = ()
    """Other files of a mirror that hold it, with the category of its rows; None for all rows."""


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


def _openai_moderation(row: Row, split: str) -> Request | None:
    if row["S3"] == 1:  # sexual content about minors: left out
        return None
    flags = [flag for flag in MODERATION_FLAGS if row[flag] == 1]
    return Request(row["prompt"], harmful=bool(flags), category=",".join(flags) or None)


def _toxicchat(row: Row, split: str) -> Request | None:
    if not row["human_annotation"]:
        return None
    return Request(row["user_input"], harmful=row["toxicity"] == 1)


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
        experiments=("all", "confound"),
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
        experiments=("guards", "confound"),
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
        experiments=("guards",),
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
)
"""Every public set that the study uses, in the order of ``latentguard data list``."""
