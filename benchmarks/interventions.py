"""Where refusal reads harm: the four experiments beyond the paper on one model, as numbers.

    python benchmarks/interventions.py MODEL --data-dir data --store DIR --out FILE.json

Writes the tables of the reports (no texts), the settings and the counts. The store lets a killed
run go on; ``--pictures DIR`` draws the figures, too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from latentguard.files import write_atomic
from latentguard.models.chat_model import ChatModel
from latentguard.report.image_files import write_pictures
from latentguard.study.prompt_groups import read_pools, sample_prompts
from latentguard.study.run import BEYOND, prepare, run
from latentguard.study.settings import Settings

SETTINGS = Settings(
    asked=110,
    fit=40,
    test=40,
    interventions=24,
    layer_step=2,
    probed=4,
    reply_tokens=12,
    doses=(1.0, 2.0, 4.0),
)

HARMLESS = 64
"""Harmless prompts that are asked: next to all are accepted. Of harmful ones both are needed."""


def main() -> None:
    """Run the experiments and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--only", action="append", choices=BEYOND)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--asked", type=int, default=SETTINGS.asked)
    parser.add_argument("--prompts", type=int, default=SETTINGS.interventions)
    parser.add_argument("--layer-step", type=int, default=SETTINGS.layer_step)
    args = parser.parse_args()
    settings = replace(
        SETTINGS, asked=args.asked, interventions=args.prompts, layer_step=args.layer_step
    )
    pools = read_pools(args.data_dir)
    harmless = tuple(sample_prompts(pools.harmless, HARMLESS))
    pools = replace(pools, harmless=harmless, over_refusal=(), held_out=())
    model = ChatModel.load(args.model, dtype=args.dtype)
    study = prepare(model, args.store / "store.sqlite", settings, pools)
    report = run(study, only=args.only or BEYOND, say=print)
    sections = [s for s in report.sections if s.title.startswith(("Beyond", "The four groups"))]
    found = dict(
        model=Path(args.model).name,
        dtype=args.dtype,
        threads=torch.get_num_threads(),
        settings=report.meta["settings"],
        pools=report.meta["pools"],
        versions=report.meta["versions"],
        sections=[
            dict(
                title=section.title,
                text=section.text,
                tables=[
                    dict(title=p.title, columns=p.columns, rows=p.rows, note=p.note)
                    for p in section.parts
                    if hasattr(p, "rows")
                ],
            )
            for section in sections
        ],
    )
    write_atomic(args.out, json.dumps(found, indent=1))
    if args.pictures:
        write_pictures(replace(report, sections=tuple(sections)), args.pictures)


if __name__ == "__main__":
    main()
