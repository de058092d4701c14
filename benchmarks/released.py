"""The activations that the paper's authors released for Qwen2-7B, drawn with the study's own code.

    python benchmarks/released.py FOLDER --out DIR

FOLDER holds released.safetensors: centroids [l d], harmfulness directions in all and by category
[l d], and five refused harmless prompts [l n p d]; l = 29. They are not ours to ship.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentguard.probes.axis import Axis
from latentguard.report.charts import Curve, heat_map, lines_by_layer
from latentguard.report.document import Cell, Figure, Report, Section, Table
from latentguard.study.axes import belief
from latentguard.study.figures.figure_02_clusters import figure
from latentguard.study.figures.figure_09_categories.category_cosines import (
    Array,
    of_directions,
    to_others,
)

PAPER = dict(  # Figure 9a, Qwen2: harmfulness, refusal; Child_Abuse was not released
    Illegal_Activity=(0.73, 0.95),
    Child_Abuse=(0.62, 0.94),
    Hate_Harass_Violence=(0.60, 0.89),
    Malware_Viruses=(0.67, 0.90),
    Physical_Harm=(0.65, 0.94),
    Economic_Harm=(0.67, 0.95),
    Fraud_Deception=(0.70, 0.95),
    Adult_Content=(0.65, 0.93),
    Political_Campaigning=(0.66, 0.95),
    Privacy_Violation_Activity=(0.65, 0.93),
    Tailored_Financial_Advice=(0.60, 0.93),
)
NOTEBOOK = (  # the authors' notebook, mean over all 29 layers
    (-0.0561, 0.0092),
    (-0.0278, 0.0096),
    (-0.0449, 0.0159),
    (-0.0431, 0.0088),
    (-0.0399, 0.0146),
)
LAYER = 13
NOTE = "Released centroids; the paper says 100 prompts each"


def main() -> None:
    """Read, draw, print."""
    options = arguments()
    path = options.folder / "released.safetensors"
    released = {name: tensor.float() for name, tensor in load_file(path).items()}
    sections = (beliefs(released), both_directions(released), categories(released))
    meta = dict(file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    report = Report("Released Qwen2-7B activations", sections, meta)
    print(report.save(options.out) / "report.html")
    for table in report.tables:
        print(f"\n{table.title}\n{table.csv()}{table.note}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of released.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    return parser.parse_args()


def axes(released: dict[str, Tensor]) -> tuple[Axis, Axis]:
    """Harmfulness at t_inst and refusal at t_post, from the released centroids."""
    layers = tuple(range(len(released["qwen-hf-cls-all-layer"])))
    names = (("harmful", "t_inst", "hf", "hl"), ("refuse", "t_post", "refuse", "accept"))
    harmful, refuse = (
        Axis(name, at, layers, *(released[f"qwen-{x}-cls-all-layer"] for x in poles), (100, 100))
        for name, at, *poles in names
    )
    return harmful, refuse


def beliefs(released: dict[str, Tensor]) -> Section:
    """Figures 2 and 3 for the five refused harmless prompts."""
    both = axes(released)
    states = released["qwen-hl-refuse5-all-layer-2pos"].permute(1, 2, 0, 3)
    every = [axis.belief(states[:, p]).tolist() for p, axis in enumerate(both)]
    inner = [belief(axis, states[:, p]).tolist() for p, axis in enumerate(both)]
    rows = tuple(
        (n, *cells, *NOTEBOOK[n]) for n, cells in enumerate(zip(*every, *inner, strict=True))
    )
    names = ("\u0394 harmful", "\u0394 refuse")
    columns = ("prompt", *names, *(f"{n}, layers 1 to L" for n in names))
    note = (
        "Mean over all 29 entries of the layer axis, as in the notebook, and over the layers 1 to "
        f"L of equations 3 and 4. {(np.array(every[0]) < 0).sum()} of 5 are believed harmless, "
        f"{(np.array(every[1]) > 0).sum()} of 5 are believed to be refused. {NOTE}."
    )
    table = Table("Beliefs", (*columns, *(f"{n}, notebook" for n in names)), rows, note)
    curves = [
        figure(
            {"refused_harmless": axis.layer_beliefs(states[:, p]).double().numpy()},
            axis.position,
            NOTE,
        )
        for p, axis in enumerate(both)
    ]
    return Section("Five refused harmless prompts", "", (table, *curves))


def both_directions(released: dict[str, Tensor]) -> Section:
    """How alike the harmfulness and the refusal direction are, by layer."""
    harmful, refuse = axes(released)
    found = torch.cosine_similarity(harmful.direction, refuse.direction, dim=-1)
    same = torch.cosine_similarity(harmful.direction, released["qwen-dir-hf"], dim=-1)
    plot = lines(
        {"harmfulness and refusal": found},
        "Harmfulness and refusal direction",
        "Differences of the released centroids; no prompts, so no intervals. The paper: about 0.1.",
    )
    rows = tuple(
        (layer, float(a), float(b)) for layer, (a, b) in enumerate(zip(found, same, strict=True))
    )
    columns = ("layer", "with refusal", "with the released direction")
    note = (
        f"Cosines of the difference of the harmfulness centroids. Greatest with refusal: "
        f"{float(found.max()):.3f}, at layer {LAYER}: {float(found[LAYER]):.3f}."
    )
    return Section("Both directions", "", (plot, Table("Both directions", columns, rows, note)))


def categories(released: dict[str, Tensor]) -> Section:
    """Figure 9a, as far as its directions were released."""
    start = "qwen-hf-dir-"
    names = [n for n in PAPER if start + n in released]
    directions = torch.stack([released[start + n] for n in names])
    cosines = of_directions(directions)
    mean = to_others(cosines)
    plot = lines(
        {n: torch.from_numpy(mean[:, c]) for c, n in enumerate(names)},
        "Category directions by layer",
        "Mean cosine of each released harmfulness direction to the others; no prompts, so no "
        "intervals.",
    )
    grid = heat_map(
        cosines[LAYER].tolist(),
        names,
        names,
        title=f"Category directions at layer {LAYER}",
        caption="Cosines of the released harmfulness directions.",
    )
    average = torch.cosine_similarity(directions.mean(0), released["qwen-dir-hf"], dim=-1)
    parts = (plot, grid, category_table(names, cosines, mean), by_layer(names, mean, average))
    return Section("Risk categories", "", parts)


def category_table(names: list[str], cosines: Array, mean: Array) -> Table:
    """Each category beside the paper's number."""
    off = cosines[LAYER][~np.eye(len(names), dtype=bool)]
    rows = tuple(
        (
            n,
            float(mean[LAYER, c]),
            float(mean[9:21, c].mean()),
            float(mean[1:, c].mean()),
            *PAPER[n],
        )
        for c, n in enumerate(names)
    )
    note = (
        f"Mean cosine to the other {len(names) - 1} released categories; the paper's is to ten, "
        "Child_Abuse among them, at a layer that it does not name. Single cosines at layer "
        f"{LAYER}: {off.min():.2f} to {off.max():.2f}. Refusal directions were not released."
    )
    shown = (f"layer {LAYER}", "layers 9 to 20", "layers 1 to 28")
    columns = ("category", *shown, "paper, harmfulness", "paper, refusal")
    return Table("Category cosines", columns, rows, note)


def by_layer(names: list[str], mean: Array, average: Tensor) -> Table:
    """How far each layer is from the paper's numbers."""
    paper = np.array([PAPER[n][0] for n in names])
    apart = np.abs(mean - paper).mean(1)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (layer, float(mean[layer].mean()), float(apart[layer]), float(average[layer]))
        for layer in range(len(mean))
    )
    note = (
        f"Nearest to Figure 9a: layer {int(apart[1:].argmin()) + 1}. The last column is the cosine "
        "of the categories' average with the released direction of all."
    )
    columns = ("layer", "mean cosine", "mean distance from Figure 9a", "average and all")
    return Table("Category cosines by layer", columns, rows, note)


def lines(curves: dict[str, Tensor], title: str, caption: str) -> Figure:
    """Curves without bands."""
    drawn: dict[str, Curve] = {name: (v.tolist(),) * 3 for name, v in curves.items()}
    count = len(next(iter(curves.values())))
    return lines_by_layer(drawn, range(count), title=title, y="cosine", caption=caption)


if __name__ == "__main__":
    main()
