"""Prompts per second and memory of ``ChatModel.capture``, against the usual ways to read states.

Every arm reads t_inst and t_post at all layers of the same prompts, after a check that the states
agree. The arms take turns, so that a busy machine slows all of them alike; if it is very busy,
``--threads 1 --clock cpu`` counts processor time. ``--memory 1000,20000`` prints the peak memory of
a fresh process for each number of prompts instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from latentguard.data.prompt_files import read_prompts
from latentguard.models.chat import Layout
from latentguard.models.chat_model import ChatModel
from latentguard.prompts import Prompt

CHECKED = 64
"""Prompts whose states are compared first; they warm every arm up, too."""

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Arm:
    """One way to read states, and what was measured of it."""

    name: str
    run: Callable[[ChatModel, Sequence[Prompt]], Tensor | None]
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None


def capture(model: ChatModel, prompts: Sequence[Prompt]) -> Tensor:
    """Ours: states [n, p, L + 1, d]."""
    return torch.cat([states.values for states in model.capture(prompts)])


@torch.no_grad()
def paper_loop(model: ChatModel, prompts: Sequence[Prompt]) -> Tensor:
    """The paper's loop: one prompt at a time, whole hook outputs to the CPU, LM head included."""
    whole: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole.append((args[0] if args else kwargs["hidden_states"]).cpu())

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        whole.append((output[0] if isinstance(output, tuple) else output).cpu())

    hooks: list[Any] = [model.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [block.register_forward_hook(after) for block in model.blocks]
    picked = []
    for prompt in prompts:
        layout = model.chat([prompt])[0]
        whole.clear()
        model.model(torch.tensor([layout.ids], device=model.device))
        picked.append(torch.stack([h[0, [layout.t_inst, layout.t_post]] for h in whole], dim=1))
    for hook in hooks:
        hook.remove()
    return torch.stack(picked)


@torch.no_grad()
def batched(
    model: ChatModel, prompts: Sequence[Prompt], *, head: bool, states: bool
) -> Tensor | None:
    """Right-padded batches of ours' token budget, sorted by length as ours are.

    With ``states`` it asks for ``output_hidden_states``, whose last entry is after the final norm,
    unlike ours; without, only that entry is read, and only if ``head`` does not hide it.
    """
    network = model.model if head else model.model.base_model
    layouts = model.chat(prompts)
    done: dict[int, Tensor] = {}
    for batch in _batches(layouts, model.tokens_per_batch):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(layouts[i].ids) for i in batch], True)
        lengths = torch.tensor([len(layouts[i].ids) for i in batch])
        output = network(
            ids.to(model.device),
            attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device),
            output_hidden_states=states,
            use_cache=False,
        )
        whole = output.hidden_states if states else () if head else (output.last_hidden_state,)
        rows = torch.arange(len(batch))[:, None]
        at = torch.tensor([[layouts[i].t_inst, layouts[i].t_post] for i in batch])
        if whole:
            read = torch.stack([hidden[rows, at] for hidden in whole], dim=2)
            done |= zip(batch, read.cpu(), strict=True)
    return torch.stack([done[i] for i in range(len(prompts))]) if done else None


def _batches(layouts: Sequence[Layout], budget: int) -> Iterator[list[int]]:
    todo = sorted(range(len(layouts)), key=lambda i: len(layouts[i].ids), reverse=True)
    while todo:
        size = max(1, budget // len(layouts[todo[0]].ids))
        yield todo[:size]
        todo = todo[size:]


def arms() -> list[Arm]:
    """Ours first: the ratios are to it."""
    return [
        Arm("ChatModel.capture", capture),
        Arm("(a) the paper's loop", paper_loop),
        Arm("(b) hidden states, LM head", partial(batched, head=True, states=True)),
        Arm("(b) hidden states, base", partial(batched, head=False, states=True)),
        Arm("(c) bare forward, base", partial(batched, head=False, states=False)),
        Arm("(c) bare forward, LM head", partial(batched, head=True, states=False)),
    ]


def check(console: Console, model: ChatModel, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Compare the states of all arms, at the layers that mean the same."""
    ours, paper, full, base, last, _ = (arm.run(model, prompts) for arm in arms())
    return [
        _gap(console, "(a), layers 0 to L", paper, ours),
        _gap(console, "(b), layers 0 to L-1", full[:, :, :-1], ours[:, :, :-1]),
        _gap(console, "(b) base, layers 0 to L-1", base[:, :, :-1], ours[:, :, :-1]),
        _gap(console, "(c), final norm of L, against (b)", last, full[:, :, -1:]),
    ]


def _gap(console: Console, pair: str, theirs: Tensor, ours: Tensor) -> dict[str, Any]:
    """The largest error of a value, and of a state [d] relative to its norm."""
    gap, size = theirs.double() - ours.double(), theirs.double().norm(dim=-1)
    absolute, relative = gap.abs().max().item(), (gap.norm(dim=-1) / size).max().item()
    console.print(f"same states {pair}: max abs {absolute:.1e}, max relative {relative:.1e}")
    return {"pair": pair, "max_abs": absolute, "max_rel": relative}


def measure(model: ChatModel, prompts: Sequence[Prompt], repeats: int, clock: Clock) -> list[Arm]:
    """Time all arms in turns, back and forth, so that no arm always follows the same one."""
    measured = arms()
    for repeat in range(repeats):
        for arm in measured if repeat % 2 == 0 else measured[::-1]:
            _time(arm, model, prompts, clock)
            print(f"{repeat + 1}/{repeats} {arm.name}: {arm.seconds[-1]:.1f} s", file=sys.stderr)
    return measured


def _time(arm: Arm, model: ChatModel, prompts: Sequence[Prompt], clock: Clock) -> None:
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    arm.run(model, prompts)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        arm.peak_mib = max(arm.peak_mib or 0, torch.cuda.max_memory_allocated() / 2**20)
    arm.seconds.append(clock() - start)


def table(measured: Sequence[Arm], prompts: int, title: str) -> Table:
    """One row an arm; the ratio (median, min-max) is that of the two times in one repeat."""
    out = Table("arm", "prompts/s", "ours is x times as fast", "peak MiB", title=title)
    for arm in measured:
        ratios = [theirs / ours for theirs, ours in zip(arm.seconds, measured[0].seconds)]  # noqa: B905
        speed = prompts / statistics.median(arm.seconds)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        peak = f"{arm.peak_mib:,.0f}" if arm.peak_mib else "-"
        out.add_row(arm.name, f"{speed:.2f}", spread, peak)
    return out


def memory(console: Console, counts: str) -> list[dict[str, float]]:
    """Peak resident memory of a fresh process for each number of prompts."""
    found = []
    for count in counts.split(","):
        call = [sys.executable, __file__, *sys.argv[1:], "--only", count]
        run = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
        console.print(found[-1], f"{found[-1]['peak_mib'] / found[0]['peak_mib']:.3f} x the first")
    return found


def only(model: ChatModel, prompts: Sequence[Prompt], count: int) -> dict[str, float]:
    """Capture ``count`` prompts, dropping each window as it comes."""
    usage = partial(resource.getrusage, resource.RUSAGE_SELF)
    loaded, start = usage().ru_maxrss // 1024, time.perf_counter()
    seen = sum(len(states) for states in model.capture(islice(cycle(prompts), count)))
    seconds, peak = round(time.perf_counter() - start, 1), usage().ru_maxrss // 1024
    return {"prompts": seen, "loaded_mib": loaded, "peak_mib": peak, "seconds": seconds}


def compare(model: ChatModel, prompts: Sequence[Prompt], repeats: int, clock: str) -> dict:
    """Check and time all arms, and print the table."""
    console = Console()
    checked = check(console, model, prompts[:CHECKED])
    measured = measure(model, prompts, repeats, CLOCKS[clock])
    how = f"{model.device.type}, {model.model.dtype}, {torch.get_num_threads()} threads"
    console.print(table(measured, len(prompts), f"{len(prompts)} prompts, {how}, {clock} clock"))
    rows = [{k: v for k, v in vars(arm).items() if k != "run"} for arm in measured]
    return {"arms": rows, "check": checked, "tokens_per_batch": model.tokens_per_batch}


def main() -> None:
    """Read the options, measure, print, and write the JSON file."""
    options = _options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.memory and options.only is None:
        result: dict[str, Any] = {"memory": memory(Console(), options.memory)}
    else:
        prompts = read_prompts(options.prompts)[: options.limit]
        model = ChatModel.load(options.model, dtype=options.dtype, device=options.device)
        if options.only is not None:
            print(json.dumps(only(model, prompts, options.only)))
            return
        result = compare(model, prompts, options.repeats, options.clock)
    if options.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        Path(options.json).write_text(json.dumps(vars(options) | versions | result, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--prompts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json")
    parser.add_argument("--memory", help="numbers of prompts, such as 1000,20000")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
