"""Steer accepted harmless prompts along both directions and along random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.errors import LatentGuardError
from latentguard.interventions import Tokens
from latentguard.study.axes import Axes, Which, fit_axes
from latentguard.study.cached_model import CachedModel
from latentguard.study.figures.figure_04_steering.direction_cosine import (
    DirectionCosine,
    compare_directions,
)
from latentguard.study.figures.figure_04_steering.held_out_cosine import (
    HeldOutCosine,
    held_out_cosines,
)
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, sample_prompts
from latentguard.study.settings import Settings
from latentguard.study.steering import Steering, steer_each

DIRECTIONS: tuple[tuple[Which, str], ...] = (("harmful", "harmfulness"), ("refuse", "refusal"))
"""Axes, and what they are called."""


@dataclass(frozen=True)
class Records:
    """What harmless prompts are refused when they are steered, and how alike the directions are."""

    ids: tuple[str, ...]
    """The n harmless prompts, all accepted when they are not steered, none in a centroid."""

    layers: tuple[int, ...]
    """Where they are steered, one layer at a time."""

    unsteered: NDArray[np.float64]
    """Whether each is refused, [n]; nan where the reply is empty or cut."""

    refused: Mapping[Steering, NDArray[np.float64]]
    """The same for each way of steering, [draws layers n]."""

    alike: DirectionCosine | None
    """The two directions, layers 1 to L; None if there is no refusal axis."""

    note: str
    """What the directions were fitted on."""

    held_out: tuple[HeldOutCosine, ...] = ()
    """Refused and accepted test prompts along the refusal direction."""

    by_second: Mapping[Steering, NDArray[np.float64]] = field(default_factory=dict)
    """``refused`` by the second judge; nothing if there is none."""


def collect(model: CachedModel, prompt_groups: PromptGroups, settings: Settings) -> Records:
    """Ask accepted harmless prompts again, steered in every way at every layer."""
    axes = fit_axes(model, prompt_groups, enough=settings.enough)
    layers = settings.layers(model.depth)
    accepted = prompt_groups.test_prompts("accepted_harmless")
    prompts = sample_prompts(accepted, settings.steered, seed=settings.seed)
    unsteered, steered = steer_each(
        model,
        prompts,
        _ways(settings, model.depth),
        axes,
        layers,
        what="Figure 4: steering",
        max_new_tokens=settings.reply_tokens,
    )
    refused = {
        way: np.array([[model.refused(of) for of in draw] for draw in outcomes], dtype=float)
        for way, outcomes in steered.items()
    }
    second = {}
    if model.second_judge is not None:
        second = {
            way: np.array(
                [[model.refused_by_second(of) for of in draw] for draw in outcomes], float
            )
            for way, outcomes in steered.items()
        }
    return Records(
        tuple(p.id for p in prompts),
        layers,
        np.array(model.refused(unsteered), dtype=float),
        refused,
        _alike(model, prompt_groups, axes, settings.seed),
        axes.note,
        held_out_cosines(model, prompt_groups, axes),
        second,
    )


def _ways(settings: Settings, depth: int) -> list[Steering]:
    """Both directions on every token, and on the instruction's alone; chance on every token.

    Raises:
        LatentGuardError: if the model has no such layer as a direction should be of.
    """
    layer = settings.steer_from_layer
    if layer > depth:
        raise LatentGuardError(f"'steer_from_layer' is at most {depth}, the last; found {layer}.")
    options: dict[str, Any] = dict(
        from_layer=None if layer < 0 else layer, while_replying=settings.steer_while_replying
    )
    return [
        Steering(name, of, coefficient, tokens, draws, **options)
        for coefficient in settings.coefficients
        for of, concept in DIRECTIONS
        for name, tokens, draws in _curves(concept, settings.random_draws)
    ]


def _curves(concept: str, draws: int) -> tuple[tuple[str, Tokens, int], ...]:
    """Name, steered tokens and random directions of each curve."""
    return (
        (f"{concept} direction", "all", 0),
        (f"{concept} direction, instruction only", "instruction", 0),
        (f"random, norm of {concept} direction", "all", draws),
    )


def _alike(
    model: CachedModel, prompt_groups: PromptGroups, axes: Axes, seed: int
) -> DirectionCosine | None:
    """From layer 1 on: at layer 0 every t_post is the same token, and refusal is 0."""
    if axes.refuse is None:
        return None
    groups = (prompt_groups.fit_prompts(g) for g in BEHAVING)
    sides = (model.states(group).values[:, :, 1:].double().numpy() for group in groups)
    return compare_directions(*sides, seed=seed)
