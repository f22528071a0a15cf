"""Sound clips, decoded when asked for by the soundfile library."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cenote.data.items import Unreadable
from cenote.types import Audio

SOUND_ENDINGS = (
    ".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".w64", ".wav",
)  # fmt: skip
"""How names of files end that soundfile is asked to decode."""


def is_sound_name(name: object) -> bool:
    """Whether a path or file name ends like a sound's."""
    return isinstance(name, str | os.PathLike) and Path(name).suffix.lower() in SOUND_ENDINGS


def sound_files(folder: Path) -> list[Path]:
    """All files below a folder whose name ends like a sound's, sorted; hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if is_sound_name(path)
        and not any(step.startswith(".") for step in path.relative_to(folder).parts)
        and path.is_file()
    )


def read_sound(content: Any, folder: Path | None = None) -> Audio:
    """Decode a clip whole; several channels are averaged.

    Args:
        content: encoded bytes, a path, ``{"bytes": ..., "path": ...}`` as the `datasets` library keeps audio, or
            ``{"array": ..., "sampling_rate": ...}`` with samples between -1 and 1, ``(samples,)`` or
            ``(channels, samples)``.
        folder: what relative paths start from.

    Raises:
        Unreadable: nothing there, nothing that soundfile decodes, no samples, a clip that ends early, NaN or infinite
            samples.
        ImportError: soundfile is missing.
    """
    if isinstance(content, dict) and content.get("array") is not None:
        return _checked(*_array(content))
    with _open(content, folder) as file:
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except Exception as error:  # libsndfile's own errors, and those of a file that goes away
            raise Unreadable(f"not a readable sound ({error})") from error
        # The length that an MP3 states is an estimate.
        if len(samples) < file.frames and file.format != "MP3":
            raise Unreadable(f"the clip ends after {len(samples)} of {file.frames} samples")
        return _checked(samples.mean(axis=1), file.samplerate)


def check_sound(content: Any, folder: Path | None = None) -> None:
    """Raise :class:`Unreadable` if even the head of a clip is wrong or it states that it has no samples."""
    if isinstance(content, dict) and content.get("array") is not None:
        _checked(*_array(content))
        return
    with _open(content, folder):
        pass


class SoundFiles:
    """Clips in files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Audio:
        return read_sound(self.paths[index])

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` if even the head of the file is wrong."""
        check_sound(self.paths[index])


class ColumnSounds:
    """Clips in an Arrow column; see :func:`read_sound` for what its cells may hold."""

    def __init__(self, column: Any, folder: Path | None) -> None:
        self.column = column
        self.folder = folder

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: int) -> Audio:
        return read_sound(self._cell(index), self.folder)

    def check(self, index: int) -> None:
        """Raise :class:`Unreadable` if even the head of the clip is wrong."""
        check_sound(self._cell(index), self.folder)

    def _cell(self, index: int) -> Any:
        cell = self.column[index]
        if cell.is_valid and _has_samples(cell.type) and cell["array"].is_valid:
            # A list of a million Python floats would cost seconds.
            values = cell["array"].values
            array = np.asarray(values.to_pylist() if _nested(values.type) else values.to_numpy(zero_copy_only=False))
            return {"array": array, "sampling_rate": cell["sampling_rate"].as_py()}
        return cell.as_py()


def _has_samples(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and {"array", "sampling_rate"} <= {field.name for field in kind}


def _nested(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _array(content: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Samples of one channel and their rate."""
    try:
        samples = np.asarray(content["array"])
    except ValueError as error:
        raise Unreadable("channels of different lengths") from error
    rate = content.get("sampling_rate")
    if not isinstance(rate, int) or rate <= 0:
        raise Unreadable(f"samples without a sampling_rate (got {rate!r})")
    if samples.size and not np.issubdtype(samples.dtype, np.floating):
        raise Unreadable(f"samples must be floats between -1 and 1, got {samples.dtype}")
    if samples.ndim not in (1, 2):
        raise Unreadable(f"samples must be (samples,) or (channels, samples), got shape {samples.shape}")
    return (samples.mean(axis=0) if samples.ndim == 2 and samples.size else samples), rate


def _checked(samples: np.ndarray, rate: int) -> Audio:
    if not samples.size:
        raise Unreadable("the clip has no samples")
    if not np.isfinite(samples).all():
        raise Unreadable(f"{int((~np.isfinite(samples)).sum())} samples are NaN or infinite")
    return Audio(np.ascontiguousarray(samples, dtype=np.float32), int(rate))


def _open(content: Any, folder: Path | None) -> Any:
    """A `soundfile.SoundFile` that has read the head of the clip."""
    soundfile = _soundfile()
    if isinstance(content, dict):
        content = content.get("bytes") or content.get("path")
    if content is None:
        raise Unreadable("there is no clip")
    if isinstance(content, bytes | bytearray | memoryview):
        source: Any = io.BytesIO(content)
    elif isinstance(content, str | os.PathLike):
        source = Path(content) if folder is None else folder / content
        if not source.is_file():
            raise Unreadable(f"there is no file {str(source)!r}")
        if not source.stat().st_size:
            raise Unreadable("the file is empty")
    else:
        raise Unreadable(f"not a clip but a {type(content).__name__}")
    try:
        file = soundfile.SoundFile(source)
    except Exception as error:
        reason = str(error).rsplit(": ", 1)[-1].rstrip(".")
        raise Unreadable(f"not a readable sound ({reason})") from error
    if not file.frames:
        file.close()
        raise Unreadable("the clip has no samples")
    return file


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("audio data needs soundfile: pip install 'cenote[audio]'") from error
    return soundfile
