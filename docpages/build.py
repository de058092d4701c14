"""Writes the generated pages of docs/reference and builds the site.

    python -m docpages.build

The site is in site/. A broken link, a missing anchor or an unknown name ends the build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from docpages.reference import write_reference

ROOT = Path(__file__).parents[1]


def build(root: Path) -> int:
    """Build the site of a source tree; the exit code."""
    write_reference(root / "docs" / "reference")
    paths = [str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(build(ROOT))
