"""The protocol of a run, and by what the run deviates from it.

``--protocol paper`` is what the authors did, as far as the paper and its scripts say. What a run
does otherwise (fewer prompts, other sets, another template) stands beside each verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from latentguard.errors import LatentGuardError
from latentguard.models.chat_model import ChatModel
from latentguard.models.paper_templates import NamedTemplate, paper_template
from latentguard.report.document import Cell, Section, Table
from latentguard.study.claims import CLAIMS
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, PromptPools
from latentguard.study.settings import Settings, preset

OWN_TEMPLATE = "the model's own chat template"

PAPER_SETS: Mapping[str, tuple[str, ...]] = {
    "harmful": ("advbench", "jbb"),
    "harmless": ("alpaca_harmless",),
    "over_refusal": ("xstest",),
    "held_out": ("sorry_bench",),
    "categories": ("catqa",),
    "moderation": ("openai_moderation",),
    "toxicchat": ("toxicchat",),
}
"""Which sets the paper takes for each pool."""

SCOPES: Mapping[str, tuple[str, ...]] = {
    "asked": (),
    "interventions": ("patching", "knockout", "ablation", "dose"),
    "doses": ("dose",),
    "steered": ("steering",),
    "steer_": ("steering",),
    "coefficients": ("steering", "finetuning"),
    "inverted": ("inversion", "positions", "categories"),
    "inversion_": ("inversion", "positions", "categories"),
    "categories": ("categories",),
    "per_category": ("categories",),
    "moderation": ("guards",),
    "toxicchat": ("guards",),
    "domain": ("guards",),
    "suffix": ("jailbreaks", "guards"),
    "attacked": ("jailbreaks", "guards", "replies"),
    "middle": ("positions", "categories"),
    "probed": ("positions", "categories", "patching", "ablation"),
    "layer_step": (
        *("steering", "inversion", "positions", "categories", "finetuning"),
        *("patching", "knockout", "ablation", "dose"),
    ),
    "finetune_": ("finetuning",),
}
"""Beginning of a setting's, or a pool's, name -> the experiments that it changes; others: all."""


@dataclass(frozen=True)
class Deviation:
    """One thing that a run does otherwise than its protocol."""

    what: str
    """A setting, a set, the template, ..."""

    preset: str
    """What the protocol asks for."""

    here: str
    """What the run does."""

    experiments: tuple[str, ...] = ()
    """Which it changes; all if empty."""

    def __str__(self) -> str:
        return f"{self.what}: {self.here} ({self.preset})"

    def concerns(self, experiment: str) -> bool:
        """Whether it changes an experiment."""
        return not self.experiments or experiment in self.experiments


def with_protocol_template(
    model: ChatModel, settings: Settings, table: Mapping[str, Any]
) -> tuple[ChatModel, str]:
    """The model under the protocol's template, and the template's name.

    A ``[template]`` of the configuration comes first, then Table 4 if the protocol is the paper's
    and the model one of its families, then the model's own.

    Raises:
        LatentGuardError: if ``[template]`` holds anything but ``text`` and ``bos``.
        TemplateError: if the text does not hold ``{instruction}`` once.
    """
    template = None
    if table:
        template = _given_template(table)
    elif settings.protocol == "paper":
        template = paper_template(model.model_type, model.tokenizer)
    return (
        (model, OWN_TEMPLATE)
        if template is None
        else (
            model.with_template(template.jinja),
            template.name,
        )
    )


def paper_pools(pools: PromptPools) -> PromptPools:
    """The pools with SORRY-Bench, where it is given, as the only held-out harmful set."""
    return replace(pools, held_out=pools.sorry_bench) if pools.sorry_bench else pools


def deviations(
    settings: Settings, prompt_groups: PromptGroups, *, template: str, judge: str | None
) -> tuple[Deviation, ...]:
    """By what a run deviates from its protocol.

    Args:
        settings: Of the run.
        prompt_groups: Its prompts, labelled.
        template: The template's name.
        judge: What is said of a judge that is not the protocol's; None if it is that.
    """
    differences = list(_of_settings(settings))
    if judge is not None:
        differences.append(Deviation("judge", "the protocol's", judge))
    if settings.protocol == "paper":
        if not template.startswith("Table 4"):
            differences.append(Deviation("template", "Table 4", template))
        differences += [*_of_sets(prompt_groups.pools), *_of_centroids(prompt_groups)]
    return tuple(differences)


def deviations_section(
    settings: Settings, deviations: Sequence[Deviation], *, template: str
) -> Section:
    """The protocol, the template, and each deviation with the experiments that it changes."""
    rows = tuple(
        (one.what, one.preset, one.here, ", ".join(one.experiments) or "all") for one in deviations
    )
    text = f"Protocol: {settings.protocol}. Template: {template}. " + (
        f"{len(rows)} deviations from the protocol." if rows else "No deviation from it."
    )
    columns = ("what", "protocol", "this run", "experiments")
    parts = (Table("Deviations from the protocol", columns, rows),) if rows else ()
    return Section("The protocol", text, parts)


def beside_verdicts(section: Section, deviations: Sequence[Deviation]) -> Section:
    """The section of claims with the deviations of each claim's experiment beside its verdict."""
    parts = tuple(
        _with_column(part, deviations)
        if isinstance(part, Table) and part.title == "Claims"
        else part
        for part in section.parts
    )
    return replace(section, parts=parts)


def _with_column(table: Table, deviations: Sequence[Deviation]) -> Table:
    experiments = {claim.name: claim.experiment for claim in CLAIMS}
    rows = []
    for row in table.rows:
        experiment = next(experiments[cell] for cell in row if cell in experiments)
        mine: Cell = "; ".join(str(one) for one in deviations if one.concerns(experiment)) or "none"
        rows.append((*row, mine))
    return replace(table, columns=(*table.columns, "deviations (protocol)"), rows=tuple(rows))


def _given_template(table: Mapping[str, Any]) -> NamedTemplate:
    text, has_bos = table.get("text"), table.get("bos", False)
    if set(table) - {"text", "bos"} or not isinstance(text, str) or not isinstance(has_bos, bool):
        raise LatentGuardError(
            "The table [template] needs 'text', with {instruction} in it, and may have 'bos', true "
            f"or false; found {', '.join(sorted(table))}."
        )
    return NamedTemplate("[template] of the configuration", text, has_bos)


def _of_settings(settings: Settings) -> Iterator[Deviation]:
    expected, here = asdict(preset(settings.protocol)), asdict(settings)
    for name, value in expected.items():
        if here[name] != value:
            yield Deviation(name, str(value), str(here[name]), _scope(name))


def _of_sets(pools: PromptPools) -> Iterator[Deviation]:
    for name, sets in PAPER_SETS.items():
        sources = sorted({str(p.source) for p in getattr(pools, name)})
        if sources != sorted(sets):
            here = ", ".join(sources) or "none"
            yield Deviation(f"prompts: {name}", ", ".join(sets), here, _scope(name))


def _of_centroids(prompt_groups: PromptGroups) -> Iterator[Deviation]:
    for group in BEHAVING:
        count = len(prompt_groups.fit_prompts(group))
        if count < preset("paper").fit:
            what = f"centroid of {group.replace('_', ' ')} prompts"
            yield Deviation(what, "100", str(count))


def _scope(name: str) -> tuple[str, ...]:
    return next((of for start, of in SCOPES.items() if name.startswith(start)), ())
