"""Prompts of two kinds, sly (harmful) and kind (harmless), as rows and as files."""

import json


def written(path, rows):
    """A JSON Lines file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count, word, label=None, start=0):
    """Rows of one kind; their endings take turns."""
    made = []
    for n in range(start, start + count):
        row = dict(id=f"{word}-{n}", text=f"Tell me the {word} thing number {n}{'.?! '[n % 4]}")
        made.append(row | ({"label": label} if label else {}))
    return made


def record(folder):
    """The JSON of a guard folder."""
    return json.loads((folder / "guard.json").read_text())
