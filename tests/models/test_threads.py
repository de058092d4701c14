"""The number of CPU threads is chosen by a measurement."""

import pytest
import torch

from latentguard.models import threads
from latentguard.models.threads import choose_threads, fastest


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
        ({1: 1.0, 2: 4.6, 4: 9.0}, 1),
        ({1: 1.0, 2: 0.95, 4: 0.92}, 1),
        ({1: 1.0, 2: 0.5, 4: 0.49}, 2),
    ],
)
def test_more_threads_are_taken_only_if_they_save_a_tenth(seconds, best):
    assert fastest([1, 2, 4], seconds.__getitem__) == best


def test_the_fastest_number_is_set(model, monkeypatch):
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_measurement", lambda _: {1: 0.3, 2: 0.1, 4: 0.4}.__getitem__)
    assert choose_threads(model) == torch.get_num_threads() == 2


def test_a_real_measurement_ends_in_a_number_that_is_set(model):
    torch.set_num_threads(2)
    assert choose_threads(model) == torch.get_num_threads()
    assert torch.get_num_threads() in (1, 2)


def test_a_slow_model_keeps_every_thread(model, monkeypatch):
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_measurement", lambda _: lambda count: 60.0 / count)
    assert choose_threads(model) == 4


def test_the_users_own_number_stays(model, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "_measurement", lambda _: pytest.fail("it was measured"))
    assert choose_threads(model) == 4
