"""Seconds of one steering sweep, against one generate call for each setting.

A sweep steers the same prompts at many layers, along the directions and with the coefficients that
Figures 4 and 5 need. The usual way is a forward hook and ``model.generate`` once for each setting.
Both decode greedily; how many replies are equal is printed. ``--clock cpu --threads 1`` counts
processor time where the machine is busy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from latentguard.data.builtin import load_contrast
from latentguard.files import write_atomic
from latentguard.interventions import Intervention
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt, Reply
from latentguard.states import States

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Parse, measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--layer-step", type=int, default=2)
    parser.add_argument("--tokens", default="all", choices=["all", "instruction"])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = ChatModel.load(args.model, dtype=args.dtype)
    prompts = [p for p in load_contrast("test") if not p.harmful][: args.prompts]
    settings = directions(model, prompts, args.layer_step, args.tokens)
    found = measure(model, prompts, settings, args)
    print(json.dumps(found, indent=1))
    if args.out:
        write_atomic(args.out, json.dumps(found, indent=1))


def directions(
    model: ChatModel, prompts: Sequence[Prompt], step: int, tokens: str
) -> list[Intervention]:
    """Two random directions at every step-th layer, half as long as the states there."""
    states = States.collect(model.capture(prompts)).at("t_inst").float()
    made = []
    for layer in range(0, model.depth, step):
        size = states[:, layer].norm(dim=-1).mean() / 2
        for draw in range(2):
            noise = torch.randn(model.width, generator=torch.Generator().manual_seed(draw))
            vector = noise / noise.norm() * size
            made.append(Intervention(layer, vector, 1.0, tokens, f"{layer}/{draw}"))  # type: ignore[arg-type]
    return made


def measure(
    model: ChatModel,
    prompts: Sequence[Prompt],
    settings: Sequence[Intervention],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Both ways in turn; seconds of each round, ratio of the sums, equal replies."""
    clock, most = CLOCKS[args.clock], args.max_new_tokens
    model.generate(prompts[:2], max_new_tokens=2)
    seconds: dict[str, list[float]] = {"sweep": [], "one call per setting": []}
    for _ in range(args.rounds):
        start = clock()
        ours = model.sweep(prompts, settings, max_new_tokens=most)
        seconds["sweep"].append(clock() - start)
        start = clock()
        theirs = [generate(model, prompts, one, most) for one in settings]
        seconds["one call per setting"].append(clock() - start)
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    sums = {name: sum(rounds) for name, rounds in seconds.items()}
    each = list(zip(*seconds.values(), strict=True))
    return dict(
        model=args.model,
        dtype=str(model.model.dtype),
        threads=args.threads,
        clock=args.clock,
        prompts=len(prompts),
        settings=len(settings),
        tokens=args.tokens,
        max_new_tokens=most,
        seconds=seconds,
        ratio=sums["one call per setting"] / sums["sweep"],
        ratios=[b / a for a, b in each],
        equal_replies=sum(same(a, b) for a, b in pairs),
        replies=len(pairs),
    )


@torch.inference_mode()
def generate(
    model: ChatModel, prompts: Sequence[Prompt], one: Intervention, most: int
) -> list[list[int]]:
    """The usual way: a hook that adds the vector while the prompt is read, and ``generate``."""
    layouts = model.chat(prompts)
    length = max(len(layout.ids) for layout in layouts)
    ids, mask, where = (torch.zeros(len(prompts), length, dtype=torch.long) for _ in range(3))
    for row, layout in enumerate(layouts):
        pad = length - len(layout.ids)
        ids[row, pad:], mask[row, pad:] = torch.tensor(layout.ids), 1
        steered = range(len(layout.ids)) if one.tokens == "all" else layout.instruction
        where[row, [pad + column for column in steered]] = 1
    ids, mask, where = (x.to(model.device) for x in (ids, mask, where))
    vector = (one.coefficient * one.vector).to(model.device)

    def shift(hidden: Tensor) -> Tensor:
        if hidden.shape[1] != length:
            return hidden
        return (hidden.float() + where[..., None] * vector).to(hidden.dtype)

    handle = hook(model, one.layer, shift)
    try:
        made = model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=most,
            pad_token_id=model.tokenizer.eos_token_id,
        )
    finally:
        handle.remove()
    replies: list[list[int]] = made[:, length:].tolist()
    return replies


def hook(model: ChatModel, layer: int, shift):  # noqa: ANN001, ANN201
    """Before block 0, or after block ``layer``."""
    if layer == 0:
        embed = model.model.get_input_embeddings()
        return embed.register_forward_hook(lambda module, args, output: shift(output))
    return model.blocks[layer - 1].register_forward_hook(lambda module, args, out: shift(out))


def same(reply: Reply, ids: Sequence[int]) -> bool:
    """Whether both decoded the same tokens, up to the end token and padding."""
    return list(reply.ids) == list(ids[: len(reply.ids)])


if __name__ == "__main__":
    main()
