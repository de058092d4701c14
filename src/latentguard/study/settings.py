"""Settings of a study: a protocol, a budget, and what a TOML file changes of them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from latentguard.errors import LatentGuardError
from latentguard.models.lora import FinetuneConfig

Budget = Literal["paper", "small"]
Protocol = Literal["controlled", "paper"]


@dataclass(frozen=True)
class Settings:
    """What a study does, and how much of it. The defaults are the paper's, where it says them."""

    protocol: Protocol = "controlled"
    """``controlled``: the paper's experiments with stricter labels and controls. ``paper``: as its
    authors ran them (templates, centroids, labels, reply lengths, tables; ``PAPER_PROTOCOL``)."""

    seed: int = 0
    """Of which prompts are asked and tested, of what is learnt or searched, and of the draws behind
    the cosines of directions (Figures 4, 9 and 17). Random directions, the halves that centroids
    come from and all other bootstraps are the same under every seed."""

    asked: int = 520
    """Most prompts of each pool that are asked and labelled."""

    fit: int = 100
    """Most prompts of a group that a centroid is the mean of (appendix B)."""

    test: int = 100
    """Most prompts of a group that a figure is made from."""

    enough: int = 10
    """A group of fewer prompts is shown, but nothing is concluded from it."""

    layer_step: int = 1
    """Steer at every layer, or at every second, ..."""

    steered: int = 100
    """Harmless prompts that are steered (Figures 4 and 8)."""

    coefficients: tuple[float, ...] = (1.0, 2.0)
    """How often a direction is added (Figures 4 and 8); claims are decided at the first."""

    steer_from_layer: int = -1
    """The layer whose direction is added at every steered layer (Figures 4 and 8); -1: each
    layer's own, as in the paper."""

    steer_while_replying: bool = False
    """Whether the direction is added at each token of the reply, too (Figures 4 and 8). The authors
    steer the prompt alone."""

    inverted: int = 50
    """Prompts of each label in the reply inversion task (Figure 5)."""

    inversion_coefficient: float = 2.0
    """How often a direction is added there (the authors' script; the paper does not say)."""

    inversion_others: tuple[float, ...] = (0.5, 1.0)
    """Other coefficients at which the harmfulness direction is tried, with the first question."""

    inversion_tokens: int = 6
    """Longest reply to an inversion question."""

    inversion_templates: int = 4
    """How many of the inversion questions (Tables 2, 6, 7)."""

    random_draws: int = 10
    """Random directions of equal norm beside each curve. With 10, intervals cover 0.95 or more at
    100 prompts whatever the directions' spread; with 5, 0.93."""

    reply_tokens: int = 24
    """Longest reply that is judged."""

    middle: tuple[int, int] = (9, 20)
    """Layers averaged in Figure 14, both ends included."""

    middle_of: int = 28
    """The number of blocks that ``middle`` is meant for; it is scaled to other depths. 0: the
    layers are taken as they stand, whatever the depth."""

    categories: int = 11
    """Most risk categories (Figures 9 and 17)."""

    per_category: int = 50
    """Most prompts of each."""

    attacked: int = 50
    """Harmful prompts that each attack made here wraps, and most given ones a kind (Figure 6)."""

    suffixes: int = 30
    """Prompts for which a GCG suffix is searched; 0 where nanogcg is not installed. So many, that
    ``enough`` of them are accepted even where two of three fail."""

    suffix_steps: int = 100
    """Steps of each search."""

    domain: tuple[int, ...] = (0, 10, 50)
    """In-domain examples added to the guard's training set (Table 9)."""

    probed: int = 8
    """At how many layers, evenly spread, Figures 9b and 16 steer."""

    interventions: int = 50
    """Prompts of a group in the experiments beyond the paper (``patching``, ``knockout``,
    ``ablation``, ``dose``); 0: these are not run."""

    doses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """How often a direction is added in the dose curves."""

    finetune_sizes: tuple[int, ...] = (50, 100, 200, 300, 400)
    """Training pairs of the fine-tuning attack (Figure 7)."""

    finetune_test: int = 50
    """Held-out harmful prompts before and after it."""

    finetune_opening: int = 24
    """Most tokens of a reply that it trains on; more than 24 are never used."""

    finetune_completion: int = 0
    """Most tokens of the whole completions on which it is run a second time, beside the openings;
    0: it is not. They are made in memory and never kept."""

    finetune_seeds: int = 1
    """How often each training is run, with other first weights and another order."""

    finetune_rank: int = 16
    """Rank of its LoRA adapters; 0 trains every weight. Not stated in the paper."""

    finetune_rate: float = 2e-4
    """Its learning rate; about 2e-5 suits rank 0. Not stated in the paper."""

    finetune_epochs: int = 3
    """How often it sees each pair. Not stated in the paper."""

    finetune_batch: int = 8
    """Pairs in one step of it. Not stated in the paper."""

    finetune_controls: int = 1
    """For how many of its sizes, largest first, harmless pairs are trained on, too."""

    finetune_steered: int = 50
    """Harmless prompts that are steered after it (Figure 18)."""

    @property
    def finetuning(self) -> FinetuneConfig:
        """How the fine-tuning attack trains."""
        return FinetuneConfig(
            rank=self.finetune_rank,
            learning_rate=self.finetune_rate,
            epochs=self.finetune_epochs,
            batch_size=self.finetune_batch,
            opening_tokens=self.finetune_opening,
        )

    def layers(self, depth: int) -> tuple[int, ...]:
        """The layers that are steered: 0 to L - 1, by ``layer_step``."""
        return tuple(range(0, depth, self.layer_step))

    def probed_layers(self, depth: int) -> tuple[int, ...]:
        """Some of the layers that are steered, evenly spread."""
        layers = self.layers(depth)
        count = min(self.probed, len(layers))
        return tuple(layers[int((n + 0.5) * len(layers) / count)] for n in range(count))


TABLES = ("data", "judge", "rubric", "template")
"""Tables of the file that are no settings: which prompts, who judges replies, who says whether they
help, and the template."""

PAPER_PROTOCOL = dict(
    protocol="paper",
    coefficients=(1.0,),
    inversion_tokens=100,
    reply_tokens=128,
    middle_of=0,
    finetune_completion=128,
    finetune_seeds=3,
    interventions=0,
)
"""What the protocol of the authors changes. Lengths of replies are those of their scripts."""

SMALL = dict(
    asked=240,
    fit=60,
    test=60,
    layer_step=4,
    steered=20,
    coefficients=(1.0,),
    inverted=20,
    random_draws=5,
    inversion_others=(1.0,),
    inversion_templates=1,
    reply_tokens=16,
    categories=5,
    per_category=20,
    attacked=12,
    probed=3,
    suffixes=0,
    suffix_steps=20,
    interventions=12,
    doses=(1.0, 4.0),
    finetune_sizes=(50,),
    finetune_test=32,
    finetune_steered=12,
)
"""A study that a laptop finishes."""

SMALL_PAPER = SMALL | dict(
    inversion_tokens=32, reply_tokens=32, finetune_completion=48, interventions=0
)
"""The same under the authors' protocol."""

MAY_BE_ZERO = (
    *("interventions", "seed", "suffixes", "domain", "middle_of"),
    *("finetune_rank", "finetune_controls", "finetune_completion", "steer_while_replying"),
    "steer_from_layer",
)


def preset(protocol: Protocol) -> Settings:
    """All that a protocol asks for, at the paper's n."""
    return replace(Settings(), **PAPER_PROTOCOL) if protocol == "paper" else Settings()  # type: ignore[arg-type]


def read_settings(
    path: str | Path | None = None,
    budget: Budget = "paper",
    protocol: Protocol | None = None,
) -> Settings:
    """The settings of a protocol and a budget, changed by those of a TOML file.

    Args:
        path: The file.
        budget: How much is done.
        protocol: The protocol; if None, that of the file, else ``controlled``.

    Raises:
        LatentGuardError: if the file is not TOML, names an unknown setting, gives one a value
            of another kind, or another protocol than is asked for; says which.
    """
    values = {} if path is None else {n: v for n, v in _toml(path).items() if n not in TABLES}
    changes = {name: _checked(path, name, value) for name, value in values.items()}
    there = changes.get("protocol", protocol or "controlled")
    if protocol not in (None, there):
        raise LatentGuardError(
            f"{path}: 'protocol' is '{there}', but --protocol is '{protocol}'. Leave one out."
        )
    settings = preset(there)
    if budget == "small":
        small = SMALL_PAPER if there == "paper" else SMALL
        settings = replace(settings, **small)  # type: ignore[arg-type]
    return replace(settings, **changes)


def read_table(path: str | Path | None, name: str) -> dict[str, Any]:
    """A table of the TOML file, such as ``[data]``; empty if there is none.

    Raises:
        LatentGuardError: if the file is not TOML, or the name is no table there.
    """
    table = {} if path is None else _toml(path).get(name, {})
    if not isinstance(table, dict):
        raise LatentGuardError(f"{path}: '{name}' should be a table, written [{name}].")
    return table


def _toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LatentGuardError(f"{path} is not TOML: {error}.") from error


def _checked(path: str | Path | None, name: str, value: Any) -> Any:
    defaults = {f.name: f.default for f in fields(Settings)}
    if name not in defaults:
        raise LatentGuardError(
            f"{path}: there is no setting '{name}'; expected one of {', '.join(defaults)}, "
            "or a table [data], [judge], [rubric] or [template]."
        )
    typed = _typed(defaults[name], value)
    if typed is None or not _sound(name, typed):
        raise LatentGuardError(
            f"{path}: '{name}' should be like {defaults[name]!r}; found {value!r}."
        )
    return typed


def _typed(like: Any, value: Any) -> Any:
    """The value as the type of ``like``, integers as floats where those are due; else None."""
    if isinstance(like, tuple):
        items = [_typed(like[0], one) for one in value] if isinstance(value, list) else [None]
        return None if None in items else tuple(items)
    if isinstance(like, float) and type(value) is int:
        return float(value)
    return value if type(value) is type(like) else None


def _sound(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return value in get_args(Protocol)
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers or not all(map(math.isfinite, numbers)):
        return False
    if name == "finetune_rate":
        return bool(value > 0)
    if name == "middle":
        return len(numbers) == 2 and 0 <= numbers[0] <= numbers[1]
    if name == "steer_from_layer":
        return bool(value >= -1)
    least = 0 if name in MAY_BE_ZERO else 1
    signed = ("coefficients", "doses", "inversion_coefficient", "inversion_others")
    return name in signed or min(numbers) >= least
