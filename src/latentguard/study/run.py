"""``latentguard study``: the whole paper on one model, ending in a report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from latentguard.errors import LatentGuardError, MissingExtra, StudyError
from latentguard.models.chat_model import ChatModel
from latentguard.models.gcg import SuffixSearch
from latentguard.models.guard_models import LazyGuardModel
from latentguard.models.lora import Finetuning
from latentguard.models.sources import DEFAULT, DEFAULT_HUB_ID
from latentguard.report.document import Figure, Report, Section, Table
from latentguard.states import digest_prompts
from latentguard.study import labelling
from latentguard.study.axes import refusals_suffice
from latentguard.study.cached_model import CachedModel, Step, Tools
from latentguard.study.claims_report import claims_section
from latentguard.study.endpoint import Endpoint, require_endpoint_table
from latentguard.study.examples import examples_section
from latentguard.study.figures import (
    beyond_ablation,
    beyond_dose,
    beyond_knockout,
    beyond_patching,
    beyond_replies,
    confound,
    figure_02_clusters,
    figure_03_beliefs,
    figure_04_steering,
    figure_05_inversion,
    figure_06_jailbreaks,
    figure_07_finetuning,
    figure_09_categories,
    figure_13_positions,
    table_01_template,
    table_03_guards,
)
from latentguard.study.finding import Finding
from latentguard.study.judge import judge
from latentguard.study.judge_model import EndpointJudge
from latentguard.study.paper_judge import PaperJudge, paper_answer
from latentguard.study.prompt_groups import BEHAVING, PromptGroups, PromptPools
from latentguard.study.protocol import (
    OWN_TEMPLATE,
    beside_verdicts,
    deviations,
    deviations_section,
    paper_pools,
    with_protocol_template,
)
from latentguard.study.rubric import RubricJudge
from latentguard.study.settings import Settings
from latentguard.study.store import Store

T = TypeVar("T")

EXPERIMENTS: Mapping[str, Any] = {
    "template": table_01_template,
    "clusters": figure_02_clusters,
    "positions": figure_13_positions,
    "beliefs": figure_03_beliefs,
    "steering": figure_04_steering,
    "inversion": figure_05_inversion,
    "categories": figure_09_categories,
    "jailbreaks": figure_06_jailbreaks,
    "guards": table_03_guards,
    "finetuning": figure_07_finetuning,
    "confound": confound,
    "replies": beyond_replies,
    "patching": beyond_patching,
    "knockout": beyond_knockout,
    "ablation": beyond_ablation,
    "dose": beyond_dose,
}
"""Each experiment's module, in the order in which they run."""

BEYOND = ("patching", "knockout", "ablation", "dose")
"""Interventions that the paper leaves to others; run unless ``settings.interventions`` is 0."""

STORE = "store.sqlite"
"""Under the report's folder: what the model held and said, texts included. Not for publishing."""


@dataclass(frozen=True)
class Study:
    """What is studied, and how."""

    model: CachedModel
    """The model."""

    pools: PromptPools
    """What it is asked."""

    settings: Settings
    """How much of it."""

    name: str
    """The model's name for people."""

    template: str = OWN_TEMPLATE
    """The template's name."""


def prepare(
    model: ChatModel,
    store: str | Path,
    settings: Settings,
    pools: PromptPools,
    *,
    step: Step | None = None,
    baselines: Sequence[str] | None = None,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
) -> Study:
    """Put a study together.

    Args:
        model: Under study.
        store: Where what it does is kept.
        settings: How much of it.
        pools: What it is asked.
        step: Opens a step on a progress bar.
        baselines: Guard models to compare with, by id.
        tables: ``judge``: ``url`` and ``model`` of a judge behind an OpenAI-compatible endpoint.
            ``rubric``: the same of a model that says whether replies help.
            ``template``: ``text`` with ``{instruction}``. Of the protocol, where one is missing.

    Raises:
        LatentGuardError: if the store cannot be used, or the judge is not well named.
    """
    tables = tables or {}
    model, template = with_protocol_template(model, settings, tables.get("template", {}))
    model_store = Store(store)
    tools = Tools(
        finetune=_at_hand(lambda: Finetuning(model, settings.finetuning)),
        suffix=_at_hand(lambda: SuffixSearch(model)) if settings.suffixes else None,
        guards={name: LazyGuardModel(name) for name in baselines or ()},
    )
    how: dict[str, Any] = {}
    if settings.protocol == "paper":
        pools = paper_pools(pools)
        how = {"judge": PaperJudge(), "second_judge": judge, "answer": paper_answer}
    if tables.get("judge"):
        endpoint = Endpoint(*require_endpoint_table("judge", tables["judge"]))
        how["judge"] = EndpointJudge(endpoint, store=model_store)
    if tables.get("rubric"):
        endpoint = Endpoint(*require_endpoint_table("rubric", tables["rubric"]))
        how["judge"] = RubricJudge(endpoint, how.get("judge", judge), store=model_store)
    cached = CachedModel(model, model_store, step=step, tools=tools, **how)
    return Study(cached, pools, settings, _name(model.source), template)


def _name(source: str) -> str:
    """The model's name for people: the folder's, or the Hub id."""
    if source == DEFAULT:
        return DEFAULT_HUB_ID.rpartition("/")[2]
    return Path(source).name if Path(source).exists() else source


def _at_hand(make: Callable[[], T]) -> T | None:
    """A tool, or None where its extra is not installed; the experiment says what it misses."""
    try:
        return make()
    except MissingExtra:
        return None


def run(
    study: Study,
    *,
    only: Collection[str] = (),
    show_prompts: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Ask, label, run the experiments, decide the claims.

    Args:
        study: What and how.
        only: Experiments to run; all if empty.
        show_prompts: Show the prompts' texts where a figure is pointed at, and tables of examples.
        say: Told the name of each experiment as it begins.

    Raises:
        LatentGuardError: if ``only`` names no experiment, or no prompt can be asked.
        StudyError: if the store or the judge model fails; what is kept stays.
    """
    require_known(only)
    if not study.settings.interventions and (without := set(only) & set(BEYOND)):
        name = sorted(without)[0]
        raise LatentGuardError(f"'{name}' needs prompts: set 'interventions' above 0.")
    say("labelling")
    labelled_sets = labelling.collect(study.model, study.pools, study.settings)
    prompt_groups = labelling.prompt_groups_of(labelled_sets, study.pools, study.settings)
    findings = {"labelling": labelling.analyse(labelled_sets, prompt_groups, study.settings)}
    for name in EXPERIMENTS:
        if name in only or (not only and _runs_by_default(name, study.settings)):
            say(name)
            findings[name] = _experiment(name, study, prompt_groups)
    report = _report(study, findings, prompt_groups)
    if not show_prompts:
        return report
    examples = examples_section(study.model, prompt_groups, study.settings)
    report = replace(report, sections=(*report.sections, examples))
    return _with_texts(report, study.pools)


def _runs_by_default(name: str, settings: Settings) -> bool:
    return bool(settings.interventions) or name not in BEYOND


def require_known(only: Collection[str]) -> None:
    """Raise a LatentGuardError if there is no experiment of such a name."""
    if unknown := set(only) - set(EXPERIMENTS):
        raise LatentGuardError(
            f"There is no experiment '{sorted(unknown)[0]}'; expected {', '.join(EXPERIMENTS)}."
        )


def _experiment(name: str, study: Study, prompt_groups: PromptGroups) -> Finding:
    """One experiment; what it cannot do on this model is a finding too."""
    module = EXPERIMENTS[name]
    try:
        records = module.collect(study.model, prompt_groups, study.settings)
        finding: Finding = module.analyse(records, study.settings)
    except StudyError:
        raise
    except LatentGuardError as error:
        return Finding(Section(name.capitalize(), f"Not run: {error}"), {}, (str(error),))
    return finding


def _report(study: Study, findings: Mapping[str, Finding], prompt_groups: PromptGroups) -> Report:
    settings, template = study.settings, study.template
    refused = refusals_suffice(prompt_groups, settings.enough)
    effects = {name: one.effects for name, one in findings.items()}
    deviating = deviations(settings, prompt_groups, template=template, judge=_other_judge(study))
    sections = [
        beside_verdicts(
            claims_section(effects, refused=refused, about=_about(study, prompt_groups)), deviating
        ),
        deviations_section(settings, deviating, template=template),
        *(_noted(one) for one in findings.values()),
    ]
    title = f"Study of {study.name}, {settings.protocol} protocol"
    return Report(title, tuple(sections), _meta(study))


def _about(study: Study, prompt_groups: PromptGroups) -> str:
    """One sentence: which model, how, and how many prompts its centroids are of."""
    fitted = prompt_groups.fit
    tested = sum(map(len, prompt_groups.test.values()))
    refused, accepted = (len(fitted[g]) for g in BEHAVING)
    return (
        f"{study.name} was studied under the {study.settings.protocol} protocol with {refused} "
        f"refused harmful and {accepted} accepted harmless prompts in its centroids and {tested} "
        "other prompts to test."
    )


def _other_judge(study: Study) -> str | None:
    """What is said of a judge that is not the protocol's."""
    usual = PaperJudge() if study.settings.protocol == "paper" else judge
    used = study.model.judge
    return None if used == usual else str(getattr(used, "about", "another judge"))


def _noted(finding: Finding) -> Section:
    section = finding.section
    if not finding.caveats:
        return section
    rows = tuple((sentence,) for sentence in finding.caveats)
    table = Table(f"{section.title}: not concluded", ("what cannot be concluded, and why",), rows)
    return replace(section, parts=(*section.parts, table))


def _meta(study: Study) -> dict[str, Any]:
    pools = {f.name: getattr(study.pools, f.name) for f in fields(study.pools)}
    return {
        "name": study.name,
        "depth": study.model.depth,
        "model": asdict(study.model.uncached.fingerprint),
        "settings": asdict(study.settings),
        "template": study.template,
        "pools": {
            name: dict(
                n=len(prompts),
                sets=sorted({str(p.source) for p in prompts}),
                sha256=digest_prompts(prompts),
            )
            for name, prompts in pools.items()
        },
        "judge": getattr(study.model.judge, "about", "built-in"),
        "versions": {name: version(name) for name in ("latentguard", "torch", "transformers")},
    }


def _with_texts(report: Report, pools: PromptPools) -> Report:
    """The report with each prompt's text behind its id where a point is pointed at."""
    every = (p for f in fields(pools) for p in getattr(pools, f.name))
    texts = {p.id: f"{p.id}: {p.text[:200]}" for p in every if p.id}
    for figure in report.figures:
        _show_texts(figure, texts)
    return report


def _show_texts(figure: Figure, texts: Mapping[str, str]) -> None:
    for trace in figure.plot.data:
        if trace.hovertext is not None and not isinstance(trace.hovertext, str):
            trace.hovertext = [texts.get(name, name) for name in trace.hovertext]
