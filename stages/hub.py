"""The Hugging Face hub: sending an exported folder to a repository, which is off by default.

The token is the environment's or the login's; it is never written, and taken out of messages.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import ConfigError, SpinError
from stages.model_card import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import HfApi

OF_THE_HUB = (".gitattributes",)


def check_ready(repo: str) -> None:
    """Check that something can be sent at all, before anything is made.

    Raises:
        ConfigError: `repo` is no id of a repository, or there is no token.
    """
    why = _unfit(repo)
    if why is not None:
        raise ConfigError(
            f"--push-to-hub {repo!r} is no repository of the hub{why}; give OWNER/NAME"
        )
    if _token() is None:
        raise ConfigError(
            f"--push-to-hub {repo} needs a token, and there is none; set HF_TOKEN, or log in: "
            "hf auth login"
        )


def push(folder: Path, repo: str, *, public: bool = False, api: "HfApi | None" = None) -> str:
    """Send an exported folder to a repository, which is made if it is new; return its address.

    Args:
        public: make a new repository public; else it is private, and an existing one must be.
        api: the hub's client; None makes one that takes address and token from the environment.

    Raises:
        ConfigError: the repository is public, or holds files that the folder does not have.
        SpinError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its transport

    client = api or HfApi()
    try:
        address = client.create_repo(repo, private=not public, exist_ok=True)
        _check_repository(client, repo, folder, public)
        client.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name} by spin"
        )
    except (HTTPError, OSError) as error:  # offline mode's error is an OSError
        raise SpinError(
            f"{repo}: the hub cannot be reached or refuses ({_reason(error)}); {folder} is whole: "
            f"send it with: hf upload {repo} {folder} --private"
        ) from None
    return str(address)


def _unfit(repo: str) -> str | None:
    """Return in words why the hub takes no such name, or None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not HUB_ID.fullmatch(repo):
        return ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return f" ({str(error).rpartition(':')[0].strip().rstrip('.') or error})"
    return None


def _check_repository(client: Any, repo: str, folder: Path, public: bool) -> None:
    """Check that nothing becomes public unasked, and that no strange weights stay beside ours."""
    if not public and client.repo_info(repo).private is False:
        raise ConfigError(
            f"{repo} is public; add --public if the model shall be, or name another repository"
        )
    ours = {path.name for path in folder.iterdir()}
    strangers = sorted(set(client.list_repo_files(repo)) - ours - set(OF_THE_HUB))
    if strangers:
        raise ConfigError(
            f"{repo} holds {strangers[0]}, which the export does not; weights would be mixed: "
            "name another repository, or empty that one"
        )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    token = _token()
    return text.replace(token, "***") if token else text
