# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by name: a folder here, or a repository of the Hugging Face hub; and the hub as a
place to publish to.  No token is ever in a message."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from align_jax.core.choose import nearest
from align_jax.core.files import looks_like

# Code that a checkpoint's auto_map names, as transformers calls such files.
CODE = (
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "processing_*.py"),
    *("image_processing_*.py", "video_processing_*.py"),
)
# What of a folder is published: weights, settings, tokenizer, card; no file of another kind.
PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    *CODE,
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    "MODEL_CARD.md",
    "LICENSE*",
    "NOTICE*",
)


class HubError(RuntimeError):
    """The hub cannot be reached, or has failed."""


def is_here(path: str) -> bool:
    """Tell whether a checkpoint is a folder here; else it may be on the hub.

    Raises:
        FileNotFoundError: a file, or a path that is no hub id and leads nowhere.
    """
    if os.path.isdir(path):
        return True
    if os.path.isfile(path):
        raise FileNotFoundError(
            f"{path!r} is a file ({looks_like(path)}): expected the folder of a model, with "
            "config.json and safetensors"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"no model folder at {path!r} (nor is that a hub id, owner/name){near_folder(path)}"
        )
    return False


def near_folder(path: str) -> str:
    """Say which folder is nearest to one that is not there; "" where none is near."""
    near = nearest(path, map(str, pathlib.Path(path).parent.glob("*/")))
    return near if "did you mean" in near else ""


def check(repo: str) -> None:
    """Refuse, before anything is made, a repository that cannot be published to.

    Args:
        repo: owner/name.

    Raises:
        ValueError: it is no repository's name, or there is no token that the hub takes.
        HubError: the hub does not answer.
    """
    import huggingface_hub  # here, because importing it is slow
    from huggingface_hub import constants, utils

    try:
        utils.validate_repo_id(repo)
    except huggingface_hub.errors.HFValidationError:
        raise ValueError(f"--push_to_hub={repo!r:.100}: expected owner/name") from None
    if repo.count("/") != 1:
        raise ValueError(f"--push_to_hub={repo}: expected owner/name")
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub needs the hub, but HF_HUB_OFFLINE is set")
    if not huggingface_hub.get_token():
        raise ValueError(
            "--push_to_hub needs a token that may write: hf auth login, or HF_TOKEN in the "
            "environment"
        )
    with _without_token(repo):
        huggingface_hub.HfApi().whoami()


def push(folder: str, repo: str, *, message: str, private: bool = False) -> str:
    """Publish a checkpoint's files, in a repository that is made if there is none.

    Args:
        folder: what an export has written; ``PUBLISHED`` says which of its files go.
        repo: owner/name.
        message: of the commit.
        private: of a repository that is made.

    Returns:
        The repository's address.

    Raises:
        ValueError: the hub refuses the token or the repository.
        HubError: the hub does not answer.
    """
    import huggingface_hub  # here, because importing it is slow

    api: Any = huggingface_hub.HfApi()
    with _without_token(repo):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, allow_patterns=list(PUBLISHED)
        )
    return str(url)


@contextlib.contextmanager
def _without_token(repo: str) -> Iterator[None]:
    """Tell what the hub said in one message, from which every token is struck out."""
    import huggingface_hub

    try:
        yield
    except Exception as error:  # an HTTP library's may hold the request's headers
        token = huggingface_hub.get_token()
        said = f"--push_to_hub={repo}: {type(error).__name__}: {error}"
        for secret in {token, (token or "").strip()} - {None, ""}:
            said = said.replace(str(secret), "hf_...")
        said = re.sub(r"hf_\w{6,}", "hf_...", said)
        status = getattr(getattr(error, "response", None), "status_code", 0)
        kind = ValueError if status in (400, 401, 403, 404, 409) else HubError
        raise kind(said) from None
