"""The results folder of a comparison: finished rows and their recipes, taken up again where the inputs are the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from cenote.compress.methods import Ready
from cenote.compress.result import Row, row_from_json, row_json
from cenote.files import write_whole

MARK = "settings.json"


class Folder:
    """Where a run writes.

    Args:
        path: the folder; made if absent.
        settings: everything that determines the run.
        fresh: measure every row anew.

    Raises:
        ValueError: a file, or a folder of something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; out names a folder")
        if path.exists() and any(path.iterdir()) and not (path / MARK).exists():
            raise ValueError(f"{path} is not empty and holds no comparison: choose another folder")
        self.path, self.fresh = path, fresh
        self.inputs = {
            key: value for key, value in settings.items() if key not in ("methods", "budgets", "keep", "loss")
        }
        self.digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]
        (path / "rows").mkdir(parents=True, exist_ok=True)
        write_whole(path / MARK, json.dumps(settings, indent=2) + "\n")

    def row(self, key: str) -> Row | None:
        """A finished row with the same inputs, if there is one and its recipe is there too."""
        try:
            read = json.loads((self.path / "rows" / f"{_file(key)}.json").read_text())
            if self.fresh or read["digest"] != self.digest or read["key"] != key:
                return None
            return row_from_json(read["row"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, row: Row, ready: Ready | None) -> None:
        """Keep a finished row, and its recipe where there is one (quantised models are large and are not kept)."""
        if ready is not None:
            ready.save(self.path / "recipes" / _file(key))
        described = {"key": key, "digest": self.digest, "row": row_json(row)}
        write_whole(self.path / "rows" / f"{_file(key)}.json", json.dumps(described, indent=2) + "\n")

    def keep(self, key: str) -> Path:
        """Make a row's recipe the chosen one, in ``recipe/``."""
        target, source = self.path / "recipe", self.path / "recipes" / _file(key)
        self.drop()
        shutil.copytree(source, target)
        return target

    def drop(self) -> None:
        """No choice: an earlier run's must not stand for this one's."""
        for name in ("recipe", "model"):
            shutil.rmtree(self.path / name, ignore_errors=True)


def _file(key: str) -> str:
    """A name for files that tells keys apart."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in key)[:60]
    return f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
