"""A study of a planted world: where refusal reads harm is known."""

from contextlib import contextmanager

from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import PromptGroups, PromptPools
from latentguard.study.settings import Settings
from latentguard.study.store import Store
from models.reading_worlds import prompts_of, reading_world

SETTINGS = Settings(
    interventions=10,
    enough=8,
    layer_step=1,
    probed=4,
    reply_tokens=3,
    random_draws=2,
    doses=(1.0, 4.0),
)


def begins_refusing(reply):
    """The judge of these worlds."""
    if not reply.text:
        return "empty"
    return "refused" if reply.text.startswith("I") else "accepted"


def planted_groups():
    """Twelve prompts to fit and twelve to test of each group that behaves."""
    fit, test = {}, {}
    for group, harmful in (("refused_harmful", True), ("accepted_harmless", False)):
        fit[group] = prompts_of(harmful, 12, prefix="so ")
        test[group] = prompts_of(harmful, 12)
    test["accepted_harmful"] = prompts_of(True, 12, refused=False, prefix="now ")
    pools = PromptPools(test["refused_harmful"], test["accepted_harmless"])
    return PromptGroups(pools, fit, test)


@contextmanager
def planted_study(reads, tokenizer, folder):
    """The cached model of a world, and its prompt groups."""
    store = Store(folder / f"{reads}.sqlite")
    yield CachedModel(reading_world(reads, tokenizer), store, judge=begins_refusing)
    store.close()


def found_in(module, reads, tokenizer, folder, settings=SETTINGS):
    """Records and finding of an experiment in a world."""
    with planted_study(reads, tokenizer, folder) as model:
        records = module.collect(model, planted_groups(), settings)
    return records, module.analyse(records, settings)


def tables(finding):
    return {part.title: part for part in finding.section.parts if hasattr(part, "rows")}
