"""Guards whose differences from the tiny one are known, and services with one as a shadow."""

import functools
import json
from dataclasses import dataclass, replace

from latentguard.guard.latent_guard import LatentGuard
from latentguard.serve.server import GuardSource
from serve.running import get, opener, running, tiny_guard, tiny_model
from serve.test_operations import free_port


def weighted(factor, reading="span"):
    """The tiny guard with its scores and its threshold multiplied; -1 turns each verdict round."""
    guard = tiny_guard(reading)
    probe = replace(guard.probe, weight=factor * guard.probe.weight, bias=factor * guard.probe.bias)
    threshold = factor * guard.threshold
    other = replace(guard, probe=probe, threshold=threshold, categories=None, spread=guard.spread)
    return other.with_canaries(tiny_model())


@functools.cache
def contrary():
    """Blocks exactly what the tiny guard allows."""
    return weighted(-1.0)


@functools.cache
def agreeing():
    """Other weights and another threshold, but the same verdicts."""
    return weighted(2.0)


@functools.cache
def elsewhere():
    """Reads other positions."""
    return tiny_guard("t_inst").with_canaries(tiny_model())


@dataclass(frozen=True, eq=False)
class Broken(LatentGuard):
    """Fails on every prompt, in a way that nobody foresaw."""

    def measure(self, states):
        raise Exception(f"broken: {states.prompts[0].text}")


def broken():
    """The tiny guard, which fails once it has been loaded."""
    guard = tiny_guard()
    return Broken(**{name: getattr(guard, name) for name in guard.__dataclass_fields__})


def unchecked(shadow):
    """A source whose shadow guard is not tried on the model."""
    return GuardSource(shadow=shadow, bind=lambda guard, model: guard)


class CountingModel:
    """Hands everything to a model, and counts the prompts that are captured."""

    def __init__(self, model):
        self.inner, self.read, self.passes = model, 0, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def capture(self, prompts, **how):
        prompts = list(prompts)
        self.read += len(prompts)
        self.passes += 1
        yield from self.inner.capture(prompts, **how)


ADMIN = {"authorization": "Bearer admin"}


def with_shadow(shadow, open_guard=opener, **how):
    """A service with a shadow guard and a health port for admins."""
    how = dict(health_port=free_port(), admin_key="admin", guards=GuardSource(shadow=shadow)) | how
    source = how["guards"]
    if source.read is None:
        how["guards"] = replace(source, read=lambda: None)
    return running(open_guard, guard="guards/mine", shadow="guards/new", **how)


def compared(url):
    """What the service says of both guards."""
    port = url.server.service.config.health_port
    return get(f"http://127.0.0.1:{port}/shadow", headers=ADMIN).json()


def audited(url):
    """The lines of its audit log."""
    return [json.loads(line) for line in url.audit.read_text().splitlines()]
