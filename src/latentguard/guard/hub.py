"""Where guards come from: a folder, the Hugging Face Hub, or the one in the package."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentguard.errors import GuardError
from latentguard.guard.artifact import (
    CARD_FILE,
    JSON_FILE,
    LIBRARY,
    SIGNATURE_FILE,
    TENSOR_FILE,
    read_record,
)
from latentguard.models.sources import DEFAULT

FILES = (JSON_FILE, TENSOR_FILE, CARD_FILE, SIGNATURE_FILE)

DEFAULT_GUARD = Path(__file__).parent / "default"
"""The guard of the default model; ``benchmarks/rebuild_default_guard.py`` builds it."""

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""``org/guard``."""


def find_guard(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Return the folder of a guard: itself, the package's, or where the Hub's was fetched to.

    Args:
        source: A folder, ``default``, or a Hub id such as ``org/guard``.
        revision: A branch, tag or commit of the Hub's repository.
        token: For the Hub.

    Raises:
        GuardError: if there is no such folder, and no such guard on the Hub.
    """
    if str(source) == DEFAULT:
        return DEFAULT_GUARD
    if Path(source).exists():
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise GuardError(
            f"There is no folder '{source}'. Expected a guard folder, as 'latentguard fit --out "
            "FOLDER' writes it, a Hub id as org/guard, or 'default'."
        )
    return download_guard(str(source), revision=revision, token=token)


def download_guard(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a guard into the Hub's cache; what is there already is not fetched again.

    Returns:
        Its folder.

    Raises:
        GuardError: if there is no such folder and no such guard on the Hub; says why.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=list(FILES),
            endpoint=_endpoint(),
        )
        return Path(folder)
    except _hub_errors() as error:
        raise GuardError(
            f"There is no folder '{repo_id}', and no guard of that name came from the Hugging Face "
            f"Hub ({_reason(error)}). Expected a folder that 'latentguard fit' wrote, or a Hub id "
            "as org/guard."
        ) from None


def upload_guard(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload the files of a guard, and make the repository if there is none.

    Returns:
        Where the upload can be seen.

    Raises:
        GuardError: if the Hub does not take it; says why.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=_endpoint(), token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Upload a latent guard",
        )
    except _hub_errors() as error:
        raise GuardError(
            f"The guard was not uploaded to '{repo_id}' ({_reason(error)}). Check the name, log in "
            "with 'hf auth login', or give a token."
        ) from None
    return str(commit.commit_url)


@dataclass(frozen=True)
class ListedGuard:
    """A guard that exists."""

    name: str
    """As ``find_guard`` takes it."""

    model: str
    """The model that it guards; empty if that is not stated, or cannot be read."""

    place: str
    """``package``, ``disk`` or ``hub``."""


def local_guards() -> Iterator[ListedGuard]:
    """Yield the package's guard, then those in the Hub's cache on this disk."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    yield ListedGuard(DEFAULT, DEFAULT, "package")
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda one: one.repo_id):
        for folder in sorted(revision.snapshot_path for revision in repo.revisions):
            if (folder / JSON_FILE).exists():
                yield ListedGuard(repo.repo_id, _model_of(folder), "disk")
                break


def _model_of(folder: Path) -> str:
    """The model that a guard names; empty if it is damaged, or of another version."""
    try:
        return str(read_record(folder)["fingerprint"]["model"])
    except (GuardError, LookupError, TypeError):
        return ""


def hub_guards(model: str | None = None, *, token: str | None = None) -> list[ListedGuard]:
    """The guards on the Hub, by the tag ``latentguard`` of their cards.

    Args:
        model: Those of this model alone, a Hub id.
        token: For the Hub.

    Raises:
        GuardError: if the Hub is out of reach; says why.
    """
    from huggingface_hub import HfApi, get_session

    tags = [LIBRARY, *([f"base_model:{model}"] if model else [])]
    api = HfApi(endpoint=_endpoint(), token=token)
    try:  # a Hub that is out of reach would be tried for 23 seconds
        get_session().get(f"{api.endpoint}/api/models", params={"limit": 1}, timeout=5)
        models = list(api.list_models(filter=tags))
    except _hub_errors() as error:
        raise GuardError(
            f"The guards on the Hugging Face Hub could not be listed ({_reason(error)})."
        ) from None
    return [ListedGuard(one.id, _base_model(one.tags or []), "hub") for one in models]


def _base_model(tags: Sequence[str]) -> str:
    """The model that a card names, without the kind of relation."""
    names = [tag.removeprefix("base_model:") for tag in tags if tag.startswith("base_model:")]
    return min(names, key=len, default="")


def _endpoint() -> str | None:
    """Where the Hub is, if it is not the public one."""
    return os.environ.get("HF_ENDPOINT")


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: for names, for answers, and where the Hub is out of reach."""
    from huggingface_hub import errors

    network = errors.HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever it is built on
    return (
        errors.HFValidationError,
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        network,
    )


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
