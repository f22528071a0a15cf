"""Images or sounds sorted into folders, one a class."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from cenote.data.audio import SoundFiles, sound_files
from cenote.data.items import ImageFiles
from cenote.data.source import SPLIT_NAMES, PartName, Source, part_name


def image_files(folder: Path) -> list[Path]:
    """All files below a folder whose name ends like an image's, sorted; hidden ones left out."""
    endings = Image.registered_extensions()
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and not any(step.startswith(".") for step in path.relative_to(folder).parts)
        and path.is_file()
    )


def folder_source(folder: Path) -> Source:
    """``folder/class/file`` or ``folder/split/class/file``; a class is the first folder below the split.

    Files are images or sounds, whichever the folder holds; others are passed over. It is the second form if a folder
    directly below is named ``train`` and has folders of its own; then all of them must be splits (train, val, dev,
    test, ...). The digest covers names, sizes and times of change, not the content.

    Raises:
        ValueError: neither images nor sounds, both of them, or files outside of class folders.
    """
    images, sounds = image_files(folder), sound_files(folder)
    if images and sounds:
        raise ValueError(
            f"{folder} holds both images ({images[0].name}, ...) and sounds ({sounds[0].name}, ...): "
            "put them into folders of their own"
        )
    paths = images or sounds
    if not paths:
        raise ValueError(
            f"{folder} holds no images and no sounds: expected {folder}/CLASS/FILE or {folder}/train/CLASS/FILE"
        )
    steps = [path.relative_to(folder).parts for path in paths]
    top = {step[0] for step in steps}
    divided = any(SPLIT_NAMES.get(name.lower()) == "train" for name in top) and any(len(step) > 2 for step in steps)
    depth = 2 if divided else 1
    loose = [step for step in steps if len(step) <= depth]
    if loose:
        raise ValueError(
            f"{folder}/{'/'.join(loose[0])} is in no class folder: expected {'SPLIT/' if divided else ''}CLASS/FILE"
        )
    parts: list[PartName] | None = [part_name(step[0], str(folder)) for step in steps] if divided else None
    digest = hashlib.sha256()
    for path, step in zip(paths, steps, strict=True):
        status = path.stat()
        digest.update(f"{'/'.join(step)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return Source(
        name=str(folder),
        modality="image" if images else "audio",
        items=ImageFiles(paths) if images else SoundFiles(paths),
        labels=[step[depth - 1] for step in steps],
        ids=["/".join(step) for step in steps],
        digest=digest.hexdigest(),
        parts=parts,
    )
