"""A tiny random model under study, and prompt_groups in which every group is filled."""

from dataclasses import replace

import pytest

from latentguard.data.builtin import load_contrast
from latentguard.study import cached_model as cached_model_module
from latentguard.study.cached_model import CachedModel
from latentguard.study.prompt_groups import PromptGroups, contrast_pools
from latentguard.study.settings import Settings
from latentguard.study.store import Store


@pytest.fixture
def cached_model(model, tmp_path):
    store = Store(tmp_path / "store.sqlite")
    yield CachedModel(model, store)
    store.close()


@pytest.fixture
def settings():
    return Settings(
        asked=12,
        fit=6,
        test=6,
        enough=2,
        steered=4,
        coefficients=(1.0,),
        inverted=3,
        inversion_templates=1,
        random_draws=2,
        reply_tokens=4,
        categories=3,
        per_category=4,
        attacked=3,
        suffixes=0,
        domain=(0, 2),
        finetune_sizes=(4,),
        finetune_test=3,
        finetune_opening=4,
    )


@pytest.fixture
def prompt_groups():
    """Every second prompt is marked as refused, whatever the random model says."""
    prompts = [
        replace(p, refused=row % 4 < 2) for row, p in enumerate(load_contrast("train")[:160])
    ]
    fit, test = {}, {}
    for group in ("refused_harmful", "accepted_harmful", "refused_harmless", "accepted_harmless"):
        members = [p for p in prompts if p.group == group]
        fit[group], test[group] = tuple(members[:6]), tuple(members[6:12])
    fit = {g: fit[g] if g in ("refused_harmful", "accepted_harmless") else () for g in fit}
    return PromptGroups(contrast_pools(), fit, test)


@pytest.fixture
def small_chunks(monkeypatch):
    """States 5 at once, replies 8 prompts at once."""
    monkeypatch.setattr(cached_model_module, "STATES_AT_ONCE", 5)
    monkeypatch.setattr(cached_model_module, "REPLIES_AT_ONCE", 8)


@pytest.fixture
def open_store(tmp_path):
    opened = []

    def make(name="s"):
        opened.append(Store(tmp_path / name))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
