"""Checkpoints on the Hugging Face hub, by id."""

from __future__ import annotations

import re
from pathlib import Path

# Weights in safetensors and accompanying files, but no code.
_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.md")
_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")


def local_folder(command: str, source: Path, source_name: str = "SOURCE") -> Path:
    """Returns `source`, or the folder with the downloaded repository of that id. `source_name` is
    the name of the source on the command line.

    Raises:
        ValueError: an id that cannot be downloaded.
    """
    name = source.as_posix()
    if source.exists() or not _ID.match(name):
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_PATTERNS)))
    except Exception as error:
        raise ValueError(
            f"{command}: {source_name} must be a folder or the id of a repository that can be "
            f"read, got {name}: {_first_line(error)}"
        ) from error


def config_file(command: str, model: str) -> str:
    """Returns `model`, or the path of the downloaded config.json of the repository of that id.

    Raises:
        ValueError: an id that cannot be downloaded.
    """
    if Path(model).exists() or not _ID.match(model):
        return model
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise ValueError(
            f"{command}: MODEL must be a config.json, a folder with one, a preset, or the id of a "
            f"repository that can be read, got {model}: {_first_line(error)}."
        ) from error


def check_id(command: str, repository: str | None) -> None:
    """Raises ValueError for an invalid repository id, before any work."""
    if repository is not None and not _ID.match(repository):
        raise ValueError(f"{command}: --push-to must be an id like owner/name, got {repository!r}.")


def upload(command: str, folder: Path, repository: str) -> str:
    """Uploads the files of a folder to a repository, which is created if needed; returns its
    address.

    Raises:
        ValueError: it cannot be written; the folder is kept.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        raise ValueError(
            f"{command}: --push-to must be a repository that can be written, got {repository}: "
            f"{_first_line(error)}; the result is in {folder}."
        ) from error
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
