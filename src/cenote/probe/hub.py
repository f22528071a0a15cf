"""Between a folder and the Hugging Face hub."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from pathlib import Path


class Pushable:
    """Something that can be written into a folder, and so into a repository of the hub."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write everything into ``folder``."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Add readout",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes as one commit, into a new repository if need be; its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(address)


def locate(source: str | Path, names: tuple[str, ...], revision: str | None = None) -> tuple[Path, ...]:
    """Paths of the named files of a folder or, downloaded, of a repository.

    Raises:
        ValueError: a folder without one of them; neither a folder nor a repository that can be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no readout: {name} is missing")
        return tuple(folder / name for name in names)
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise ValueError(
            f"no readout at {source}: give a folder written by save_pretrained, or a hub id such as user/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return tuple(Path(hf_hub_download(str(source), name, revision=revision)) for name in names)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source} is not a folder, and no readout could be had from the hub: {reason}") from None
