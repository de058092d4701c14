"""Guard Evaluation Harness against the service, through its moderation adapter; JSON in and out."""

import json
import subprocess
import sys
from pathlib import Path

asked = json.load(sys.stdin)
folder = Path(asked["folder"])
rows = (
    json.dumps(dict(id=str(n), prompt=row["text"], unsafe=row["harmful"]))
    for n, row in enumerate(asked["rows"])
)
(folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
config = dict(
    version=1,
    run_name="latentguard",
    threshold=0.5,
    model=dict(
        adapter="openai_moderation",
        model_name="latentguard",
        args=dict(
            base_url=f"{asked['url']}/v1/moderations",
            include_role_prefix=False,  # else "user: " stands before each text
            binary_aggregation=asked["aggregation"],
            retries=0,
        ),
    ),
    datasets=[dict(name="rows", adapter="local_jsonl", path=str(folder / "rows.jsonl"))],
    output=dict(run_dir=str(folder / "run"), overwrite=True),
)
(folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
geh = Path(sys.executable).with_name("geh")
done = subprocess.run(
    [geh, "run", "--config", folder / "config.yaml"], check=False, capture_output=True, text=True
)
if done.returncode:
    sys.exit(done.stdout + done.stderr)
found = [json.loads(path.read_text()) for path in (folder / "run").rglob("metrics.json")]
json.dump(found, sys.stdout)
