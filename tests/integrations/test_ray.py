"""Whole corpora on a Ray cluster of two nodes on this machine; one of them is killed at work."""

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("ray")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own spelling; 15 would starve)

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from latentguard.data.builtin import load_contrast
from latentguard.data.prompt_files import Columns, read_prompts
from latentguard.guard.latent_guard import LatentGuard
from latentguard.integrations.ray import Workers, fit_axes, score_corpus
from latentguard.integrations.ray.actors import Scorer
from latentguard.integrations.ray.corpora import cut, survey
from latentguard.models.chat_model import ChatModel
from latentguard.probes.fitting import fit_axes as fit_in_one
from latentguard.prompts import Prompt
from latentguard.states import States
from models.architectures import chat_model
from models.families import FAMILIES

SMALL = dict(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
ROWS = [{"id": f"row-{n}", "text": f"Tell me of thing {n}, please."} for n in range(400)]
TWO = Workers(actors=2, block_rows=16)


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(initialize_head=True, head_node_args=SMALL)
    found.victim = found.add_node(**SMALL)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    chat_model("llama", tokenizer).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def backend(source):
    return ChatModel.load(source)


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, load_contrast("validation")[:80], probe="centroid")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows in two formats, and two that no model can read."""
    folder = tmp_path_factory.mktemp("corpus")
    bad = [{"id": "empty", "text": ""}, {"id": "long", "text": "word " * 2000}]
    with (folder / "a.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*ROWS[:100], *bad])
    pq.write_table(pa.Table.from_pylist(ROWS[100:]), folder / "b.parquet", row_group_size=70)
    return str(folder)


def require_same(out, verdicts):
    """Every row once, in order, with the verdict that one process gives."""
    table = pq.read_table(out)
    found = {row["id"]: row for row in table.to_pylist()}
    assert table["row"].to_pylist() == list(range(len(ROWS) + 2))
    assert [row_id for row_id in found if row_id.startswith("row-")] == [r["id"] for r in ROWS]
    for verdict in verdicts:
        row = found[verdict.id]
        assert row["score"] == pytest.approx(verdict.score, abs=1e-5)
        assert (row["flagged"], row["error"]) == (verdict.flagged, None)
    assert "is empty" in found["empty"]["error"]
    assert "this model reads at most 512" in found["long"]["error"]
    assert found["long"]["flagged"] is None


@pytest.fixture(scope="module")
def verdicts(guard, backend):
    return list(guard.scan(backend, [Prompt(row["text"], id=row["id"]) for row in ROWS]))


def test_axes_are_those_of_one_process(cluster, source, backend, tmp_path):
    prompts = load_contrast("validation")[:80]
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for n, prompt in enumerate(prompts):
            label = "harmful" if prompt.harmful else "harmless"
            row = dict(text=prompt.text, label=label, refused="yes" if n % 3 else "no")
            file.write(json.dumps(row) + "\n")
    labelled = read_prompts(path)
    states = States.collect(backend.capture(labelled))
    found = fit_axes(source, str(path), workers=Workers(2, block_rows=12))
    for axis, wanted in zip(found, fit_in_one(states, states.layers), strict=True):
        assert (axis.name, axis.position, axis.counts) == (
            wanted.name,
            wanted.position,
            wanted.counts,
        )
        assert axis.layers == wanted.layers
        for pole in ("positive", "negative"):
            assert torch.allclose(getattr(axis, pole), getattr(wanted, pole), atol=1e-6)


def test_another_model_is_refused(guard, corpus, tmp_path, tokenizer):
    """What an actor says of it, in this process; the driver raises what it says."""
    other = chat_model("llama", tokenizer, seed=1)
    other.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    actor = Scorer(guard=guard, source=str(tmp_path), columns=Columns(label=""), out=tmp_path)
    said = actor({"index": 3})
    assert said["index"] == 3
    assert "weights" in said["failure"]


class Undefined:
    """A model that has no number for some prompts."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def capture(self, prompts, **how):
        for states in self._inner.capture(prompts, **how):
            for values, prompt in zip(states.values, states.prompts, strict=True):
                if "NAN" in prompt.text:
                    values.fill_(torch.nan)
            yield states


def test_a_row_that_cannot_be_judged_stops_no_run(tmp_path):
    """A history that the chat template rejects, a text too long, a score that is no number."""
    model = Undefined(chat_model("gemma", FAMILIES["gemma"].tokenizer))
    guard = LatentGuard.fit(model, load_contrast("validation")[:80], probe="centroid")
    system = [{"role": "system", "content": "Be brief."}]
    rows = [dict(text="Hello"), dict(text="Well?", history=system), dict(text="NAN")]
    rows += [dict(text="word " * 2000), dict(text="The last")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = cut([survey(str(path), 100)], 100, "mark")
    actor = Scorer.__new__(Scorer)  # as one that has loaded this model
    actor.guard, actor.backend, actor.columns = guard, model, Columns(label="")
    actor.out, actor._failure = tmp_path, ""
    assert actor(asdict(block)) == {"index": 0, "failure": "", "rows": 5}
    found = pq.read_table(tmp_path / block.name).to_pylist()
    assert [row["flagged"] is None for row in found] == [False, True, True, True, False]
    for row, said in zip(found[1:4], ("template", "not a finite number", "512"), strict=True):
        assert said in row["error"]


def test_a_node_is_killed_at_work(cluster, guard, corpus, verdicts, tmp_path):
    """The last test: the cluster has one node less after it."""
    out, killed, told, over = tmp_path / "out", [], [], threading.Event()

    def watch():
        if at_work(cluster.victim, over):
            cluster.remove_node(cluster.victim, allow_graceful=False)
            killed.append(len(list(out.glob("part-*"))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    total = score_corpus(guard, corpus, out, workers=TWO, progress=told.append)
    over.set()
    watcher.join()
    assert killed
    assert killed[0] < total.parts
    for _ in range(300):  # the death is told a little later
        if (alive := sum(node["Alive"] for node in ray.nodes())) == 1:
            break
        time.sleep(0.1)
    assert alive == 1
    assert (total.rows, total.unscored, total.parts, sum(told)) == (402, 2, 26, 402)
    require_same(out, verdicts)


def at_work(node, over):
    """Wait for an actor of the node that is in the middle of a block; False if all is over first.

    In a thread of its own: an actor that waits for its next block is in the middle of none.
    """
    raylet, looks = psutil.Process(node.all_processes["raylet"][0].process.pid), 0
    while not over.is_set():
        if looks % 50 == 0:  # slow: it looks through all processes, and a block is short
            workers = raylet.children(recursive=True)
        looks += 1
        for worker in workers:
            with suppress(psutil.Error):  # it may have ended by now
                if ".submit" in " ".join(worker.cmdline()):
                    return True
        time.sleep(0.001)
    return False
