"""Reading states with latentguard and with other libraries, side by side in one run.

    python benchmarks/peers.py --model M --prompts P.jsonl --out F.json --do check,speed

Every arm reads t_inst and t_post at all layers of the same prompts, float32, one thread. The arms
of those libraries run that are installed: ``make peers-env`` makes two environments, since some
need transformers 4; both also run ours and the bare forward passes, to which the times are
related. ``check`` compares with reference states (one prompt at a time, no padding) in batches
that are padded on either side; ``speed`` adds one repetition, in which the arms take turns, to
those in F.json, so that a long measurement is made of short runs.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from capture import _batches, batched, paper_loop
from capture import capture as ours
from peer_arms import PEERS, Peer, lines_of, rendered
from torch import Tensor, nn

from latentguard.data.prompt_files import read_prompts
from latentguard.files import write_atomic
from latentguard.models.chat_model import ChatModel
from latentguard.models.loading import cache_argument
from latentguard.prompts import Prompt

Arm = Callable[[Sequence[Prompt]], Tensor | None]
CHECKED = 24
WRONG = 1e-3
"""A state that is further from the reference, relative to its norm, is wrong; rounding is 1e-5."""

LEFT_OUT: set[str] = set()
"""Peers that the command line leaves out: TransformerLens loads a second model."""

PACKAGES = "torch transformers nnsight transformer-lens steering-vectors repeng".split()


def arms(model: ChatModel) -> dict[str, Callable[[], Arm]]:
    """How to make each arm that can run here; ours first."""
    found: dict[str, Callable[[], Arm]] = {
        "latentguard": lambda: partial(ours, model),
        "bare forward": lambda: partial(batched, model, head=False, states=False),
        "bare forward, shared prefix": lambda: bare_with_prefix(model),
        "the paper's loop": lambda: partial(paper_loop, model),
    }
    here = [peer for peer in PEERS if peer.installed and peer.name not in LEFT_OUT]
    peers = {peer.name: partial(peer_arm, model, peer) for peer in here}
    return found | peers


def peer_arm(model: ChatModel, peer: Peer) -> Arm:
    """A peer that reads any number of prompts, sorted by length, in batches of our size."""
    handle = peer.load(model)

    def read(prompts: Sequence[Prompt]) -> Tensor:
        texts, back, end = rendered(model.tokenizer, prompts)
        done: dict[int, Tensor] = {}
        for batch in _batches(model.chat(prompts), model.tokens_per_batch):
            states = peer.read(handle, [texts[i] for i in batch], back, end)
            done |= zip(batch, states, strict=True)
        return torch.stack([done[i] for i in range(len(prompts))])

    return read


@torch.inference_mode()
def bare_with_prefix(model: ChatModel) -> Arm:
    """A forward pass that reads nothing, without LM head, on top of a cached template prefix."""
    from transformers import DynamicCache

    network = model.model.base_model
    pairs = zip(*(layout.ids for layout in model.chat([Prompt("a"), Prompt("Z")])), strict=False)
    prefix = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    filled = DynamicCache(config=model.model.config)
    name = cache_argument(network)
    network(torch.tensor([prefix]), use_cache=True, **{name: filled})

    @torch.inference_mode()
    def run(prompts: Sequence[Prompt]) -> None:
        layouts = model.chat(prompts)
        for batch in _batches(layouts, model.tokens_per_batch):
            rows = [torch.tensor(layouts[i].ids[len(prefix) :]) for i in batch]
            cache = copy.deepcopy(filled)
            cache.batch_repeat_interleave(len(batch))
            network(nn.utils.rnn.pad_sequence(rows, True), use_cache=True, **{name: cache})

    return run


def check(model: ChatModel, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The largest relative error of each arm and padding side, in one batch of mixed lengths."""
    reference = paper_loop(model, prompts)
    sorted_batches, found = model.tokens_per_batch, []
    model.tokens_per_batch = 1 << 20  # one batch, with as much padding as there can be
    for name, how in arms(model).items():
        peer = next((p for p in PEERS if p.name == name), None)
        if "bare" in name or "loop" in name:
            continue
        for side in ("left", "right"):
            model.tokenizer.padding_side = side
            states = how()(prompts)
            first = peer.first if peer else 0
            gaps = relative(states, reference[:, :, first:])
            found.append(
                dict(
                    arm=name,
                    padding=side,
                    prompts=len(prompts),
                    below_last=gaps[..., :-1].max().item(),
                    last=None if peer and peer.normed else gaps[..., -1].max().item(),
                    wrong_prompts=int((gaps[..., :-1].amax(dim=(1, 2)) > WRONG).sum()),
                    first_layer=first,
                    reference=reference.abs().mean().item(),
                )
            )
            print(found[-1], file=sys.stderr)
    model.tokens_per_batch, model.tokenizer.padding_side = sorted_batches, "left"
    return found


def relative(theirs: Tensor, reference: Tensor) -> Tensor:
    """Errors [n, p, l], relative to the norm of the reference state."""
    gap = (theirs.double() - reference.double()).norm(dim=-1)
    return gap / reference.double().norm(dim=-1)


def speed(model: ChatModel, prompts: Sequence[Prompt], turn: int) -> dict[str, dict[str, float]]:
    """Processor seconds and memory of each arm, in an order that depends on the turn."""
    ready = {name: how() for name, how in arms(model).items()}
    for arm in ready.values():
        arm(prompts[:2])
    names, found = list(ready), {}
    for name in [*names[turn % len(names) :], *names[: turn % len(names)]][:: (-1) ** turn]:
        reset_peak()
        before, start = resident(), time.process_time()
        ready[name](prompts)
        seconds, extra = time.process_time() - start, resident(peak=True) - before
        found[name] = {"seconds": round(seconds, 3), "extra_mib": round(extra, 1)}
        print(name, found[name], file=sys.stderr)
    return found


def reset_peak() -> None:
    """Give free memory back, and forget the largest of this process so far (Linux, glibc)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(*, peak: bool = False) -> float:
    """MiB of memory of this process, now or at its peak (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def show(record: dict[str, Any]) -> None:
    """Markdown: speed, time over that of the bare forward passes (paired), memory, lines."""
    turns, lines = record["turns"], record["lines"]
    print(f"{record['versions']}, {record['prompts']} prompts, {len(turns)} repetitions")
    print("\n| arm | prompts/s | time / bare forward | time / bare, shared prefix | MiB | lines |")
    print("|---|---|---|---|---|---|")
    for name in turns[0]:
        seconds = [turn[name]["seconds"] for turn in turns]
        speeds = spread([record["prompts"] / s for s in seconds])
        over = [
            spread([s / turn[bare]["seconds"] for s, turn in zip(seconds, turns, strict=True)])
            for bare in ("bare forward", "bare forward, shared prefix")
        ]
        extra = max(turn[name]["extra_mib"] for turn in turns)
        print(
            f"| {name} | {speeds} | {over[0]} | {over[1]} | {extra:.0f} | {lines.get(name, '-')} |"
        )


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Measure what is asked for, and add it to the JSON file."""
    options = arguments()
    out = Path(options.out)
    record = json.loads(out.read_text()) if out.exists() else {}
    if options.do == "show":
        show(record)
        return
    LEFT_OUT.update(options.without)
    torch.set_num_threads(1)
    prompts = read_prompts(options.prompts)[:: options.every][: options.limit]
    model = ChatModel.load(readable(Path(options.model)), dtype="float32", device="cpu")
    model.tokenizer.padding_side = "left"
    record["versions"] = {p: version(p) for p in PACKAGES if _installed(p)}
    record["lines"] = {p.name: p.lines for p in PEERS} | {"latentguard": lines_of(ours)}
    if "check" in options.do:
        record["check"] = check(model, prompts[:CHECKED])
    if "speed" in options.do:
        turns = record.setdefault("turns", [])
        turns.append(speed(model, prompts, len(turns)))
        record["prompts"] = len(prompts)
    write_atomic(out, json.dumps(record, indent=1))


def readable(folder: Path) -> Path:
    """The folder, or, for transformers 4, one with the same files but its older settings."""
    if int(version("transformers").split(".")[0]) >= 5:
        return folder
    older = Path(tempfile.mkdtemp())
    for file in folder.iterdir():
        (older / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    names = json.loads((folder / "tokenizer_config.json").read_text())
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, settings in {"config.json": config, "tokenizer_config.json": names}.items():
        (older / name).unlink()
        (older / name).write_text(json.dumps(settings))
    return older


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except ImportError:
        return False


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--model")
    parser.add_argument("--prompts")
    parser.add_argument(
        "--do", default="check,speed", help="check, speed or both; show prints a table"
    )
    parser.add_argument("--limit", type=int, default=12, help="number of prompts")
    parser.add_argument("--without", nargs="*", default=[], help="names of peers to leave out")
    parser.add_argument("--every", type=int, default=16, help="take each so manieth prompt")
    return parser.parse_args()


if __name__ == "__main__":
    main()
