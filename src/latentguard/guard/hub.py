"""Guards on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from latentguard.errors import GuardError
from latentguard.guard.artifact import CARD_FILE, JSON_FILE, TENSOR_FILE

FILES = (JSON_FILE, TENSOR_FILE, CARD_FILE)


def download_guard(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Fetch a guard into the Hub's cache; what is there already is not fetched again.

    Returns:
        Its folder.

    Raises:
        GuardError: if there is no such folder and no such guard on the Hub; says why.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=list(FILES)
        )
        return Path(folder)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
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
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Upload a latent guard",
        )
    except (HFValidationError, HfHubHTTPError, httpx.HTTPError) as error:
        raise GuardError(
            f"The guard was not uploaded to '{repo_id}' ({_reason(error)}). Check the name, log in "
            "with 'hf auth login', or give a token."
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
