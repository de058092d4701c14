"""Changes the JSON of a guard, as somebody who knows the format would."""

import json

from latentguard.guard.artifact import JSON_FILE, content_digest


def edit_guard(folder, change, *, seal=True):
    """Call ``change`` on the record; with ``seal`` its digest fits again."""
    record = json.loads((folder / JSON_FILE).read_text())
    change(record)
    if seal and "content_sha256" in record:
        record["content_sha256"] = content_digest(record)
    (folder / JSON_FILE).write_text(json.dumps(record))
