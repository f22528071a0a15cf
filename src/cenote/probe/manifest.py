"""What a feature store says about itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from cenote.probe.files import join, read_json, write_json

FORMAT = 1
MANIFEST = "manifest.json"


def digest(key: dict[str, Any]) -> str:
    """The folder name of a store: 32 hexadecimal digits over everything its content depends on."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Shard:
    """One file of a store.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: its checksum.
        first: number of its first item.
        items: how many items it holds.
        tokens: real tokens of all of them.
        longest: most tokens of one item.
    """

    file: str
    bytes: int
    sha256: str
    first: int
    items: int
    tokens: int
    longest: int

    @staticmethod
    def name(number: int) -> str:
        return f"shard-{number:05d}.safetensors"

    @property
    def end(self) -> int:
        """Number of the item after its last."""
        return self.first + self.items


@dataclass(frozen=True)
class Layout:
    """The shape of every item's features.

    Attributes:
        dim: width of a token.
        prefix: non-patch tokens in front.
        grid: rows and columns of the patch grid, or ``None``.
        pooled_dim: width of the encoder's own pooled output, or ``None``.
    """

    dim: int
    prefix: int
    grid: tuple[int, int] | None
    pooled_dim: int | None


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a store, rewritten after every shard.

    Attributes:
        key: everything the content depends on, in clear.
        items: how many items the finished store has.
        layout: shape of the features.
        shards: the files written so far, in item order.
    """

    key: dict[str, Any]
    items: int
    layout: Layout
    shards: tuple[Shard, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.key["layers"])

    @property
    def dtype(self) -> str:
        return self.key["dtype"]

    @property
    def stored(self) -> int:
        """Items in the shards written so far."""
        return self.shards[-1].end if self.shards else 0

    @property
    def complete(self) -> bool:
        return self.stored == self.items

    def with_shard(self, number: int, shard: Shard) -> Manifest:
        """The same with one shard replaced, or one more at the end."""
        return replace(self, shards=(*self.shards[:number], shard, *self.shards[number + 1 :]))

    def write(self, folder: str) -> None:
        """Write ``manifest.json`` atomically."""
        body = {"format": FORMAT, "digest": digest(self.key), "key": self.key, "items": self.items}
        shards = [asdict(shard) for shard in self.shards]
        write_json(join(folder, MANIFEST), {**body, **asdict(self.layout), "shards": shards})

    @classmethod
    def read(cls, folder: str) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: another format, fields missing, shards that do not follow each other, or a key that does not
                give the digest beside it.
        """
        path = join(folder, MANIFEST)
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path} is not a feature store of format {FORMAT} (found {found!r}): clear it")
        try:
            grid = None if content["grid"] is None else (int(content["grid"][0]), int(content["grid"][1]))
            layout = Layout(content["dim"], content["prefix"], grid, content["pooled_dim"])
            shards = tuple(Shard(**shard) for shard in content["shards"])
            manifest = cls(content["key"], content["items"], layout, shards)
            fits = content["digest"] == digest(manifest.key)
            ends = [0, *(shard.end for shard in shards)]
            follow = all(s.first == ends[n] and s.items > 0 and s.file == Shard.name(n) for n, s in enumerate(shards))
            follow = follow and manifest.stored <= manifest.items
            _ = manifest.layers, manifest.dtype  # a KeyError here rather than at the first read
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} lacks or garbles a field ({error}): clear this store") from None
        if not fits:
            raise ValueError(f"{path} does not fit its key (digest {content['digest']!r}): clear this store")
        if not follow:
            raise ValueError(f"{path} lists shards that do not follow each other: clear this store")
        return manifest
