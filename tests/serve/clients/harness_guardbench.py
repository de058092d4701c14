"""GuardBench with the service behind its callback; reads JSON, prints JSON."""

import json
import os
import sys
from pathlib import Path

asked = json.load(sys.stdin)
folder = Path(asked["folder"])
os.environ["GUARDBENCH_DEV_PATH"] = str(folder / "guardbench")

import contextlib  # noqa: E402

import httpx  # noqa: E402

with contextlib.redirect_stdout(sys.stderr):  # its log goes where standard output is now
    import guardbench
    from guardbench.evaluate import evaluate


def moderate(conversations):
    """Scores of conversations: over 0.5 exactly if the service flags them."""
    texts = [turns[-1]["content"] for turns in conversations]
    answer = httpx.post(f"{asked['url']}/v1/moderations", json=dict(input=texts), timeout=60)
    answer.raise_for_status()
    results = answer.json()["results"]
    return [max(result["category_scores"].values()) for result in results]


place = folder / "guardbench" / "datasets" / "xstest"
place.mkdir(parents=True)
rows = [
    dict(id=str(n), label=row["harmful"], conversation=[dict(role="user", content=row["text"])])
    for n, row in enumerate(asked["rows"])
]
(place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
guardbench.benchmark(
    moderate=moderate,
    model_name="latentguard",
    batch_size=8,
    datasets=["xstest"],
    out_dir=str(folder / "results"),
)
scores = json.loads((folder / "results" / "xstest" / "latentguard.json").read_text())
labels = {row["id"]: row["label"] for row in rows}
json.dump(evaluate(labels, scores), sys.stdout, default=float)
