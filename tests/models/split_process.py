"""One of the processes over which torchrun splits a model (``test_split``): writes what it saw.

It is run as a module: from a file, its folder would come first where Python looks, and the
``tokenizers`` of these tests would stand in for the library.
"""

import faulthandler
import inspect
import json
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers.distributed import DistributedConfig

from latentguard.data.builtin import load_contrast
from latentguard.errors import ModelMismatch
from latentguard.guard.latent_guard import LatentGuard
from latentguard.interventions import Intervention
from latentguard.models.chat_model import ChatModel
from latentguard.states import States

HAS_DISTRIBUTED_PLAN = "tp_plan" in inspect.signature(DistributedConfig).parameters
"""Whether transformers takes the plan inside ``distributed_config``, as it does since 5.17."""

LIMIT = 120
"""Seconds. A process that waits for a lost one would do so for hours."""

PROMPTS = load_contrast("validation")[:24]


def states(model):
    """At every layer, in batches of several lengths."""
    positions = ("t_inst", "post", "t_post", "mean")
    return States.collect(model.capture(PROMPTS, positions=positions))


def replies(model):
    """Plain and steered ones."""
    steered = Intervention(2, torch.ones(model.width), 3.0)
    return [[r.ids for r in some] for some in model.sweep(PROMPTS[:3], [None, steered])]


def guard_of(model):
    return LatentGuard.fit(model, load_contrast("validation")[:80], probe="centroid")


def refusal(guard, model):
    """Why the guard does not load on the model."""
    try:
        LatentGuard.load(guard, model)
    except ModelMismatch as error:
        return str(error)
    return ""


def shrinks(model):
    """Whether it reads smaller batches after memory ran out here, and perhaps here only."""
    try:
        model.shrink(torch.OutOfMemoryError(), tokens=100, rows=4)
    except torch.OutOfMemoryError:
        return False
    return True


def main(folder, edited, guard, out):
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    model = ChatModel.load(folder, tp_plan="auto")
    shards = [p.to_local().numel() / p.numel() for p in model.model.parameters() if split(p)]
    plan = {"tp_plan": "auto"}
    options = {"distributed_config": plan} if HAS_DISTRIBUTED_PLAN else plan
    spelt_anew = ChatModel.load(edited, **options)
    found = dict(
        shards=shards,
        digest=model.fingerprint.digest,
        refusals=[refusal(guard, one) for one in (model, spelt_anew)],
        replies=replies(model),
        shrinks=shrinks(model),
    )
    mine = Path(out) / str(distributed.get_rank())
    guard_of(model).save(mine / "guard")
    states(model).save(mine / "states")
    (mine / "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def split(parameter):
    return hasattr(parameter, "to_local")


if __name__ == "__main__":
    main(*sys.argv[1:])
