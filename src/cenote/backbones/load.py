"""A backbone from its one-line name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from cenote.backbones.options import built

if TYPE_CHECKING:
    import torch

    from cenote.backbones.base import Backbone

SCHEMES = ("embedded", "hf", "timm", "kwt", "pyg")


def load_backbone(
    spec: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    bidirectional: bool = False,
    **options: Any,
) -> Backbone:
    """Load a frozen network that turns raw items into :class:`~cenote.types.Features`.

    Args:
        spec: ``"embedded"`` (the tiny vision transformer inside the package), ``"embedded:PATH"`` (one trained by
            ``tools/pretrain_embedded.py``), ``"hf:ID_OR_FOLDER"`` (transformers: vision and text encoders,
            decoders, and speech encoders: wav2vec 2.0, HuBERT, WavLM, Whisper), ``"timm:NAME"`` or ``"kwt:FOLDER"``
            (a keyword transformer), or ``"pyg:FOLDER"`` and ``"pyg:gcn(in_dim=7)"`` (graph networks, trained by
            :func:`cenote.tuning.gnn.train_gnn` or not at all). A name without a scheme means ``hf:``.
        revision: branch, tag or commit of a hub repository.
        dtype: of the weights, ``torch.bfloat16`` or ``"bfloat16"``; the checkpoint's own unless given.
        device: where to run; not together with ``device_map``.
        device_map: spread a large model over devices, as in transformers.
        trust_remote_code: run code that the hub repository brings along.
        bidirectional: let every token of a causal language model see every other one.
        options: further keywords of the scheme's own class, ``max_length=256`` for texts or ``max_seconds=10`` for
            clips, say.

    Raises:
        ValueError: unknown scheme or name (nearest names suggested), an option that does not apply to the scheme or
            that the backbone does not take, or a checkpoint of a kind that has no token features.
        ImportError: the library that serves the scheme is missing; the message names the extra to install.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"a backbone is named by a string such as 'embedded' or 'hf:bert-base-uncased', got {spec!r}")
    scheme, name = split_spec(spec.strip())
    if device is not None and device_map is not None:
        raise ValueError("give device or device_map, not both")
    if bidirectional and scheme != "hf":
        raise ValueError(f"bidirectional applies to causal language models ('hf:'), not to {spec!r}")
    for option, given in (("device_map", device_map), ("revision", revision)):
        if given is not None and scheme != "hf":
            raise ValueError(f"{option} applies to 'hf:' backbones, not to {spec!r}")
    if scheme == "embedded":
        from cenote.backbones.embedded import EmbeddedBackbone

        return built(EmbeddedBackbone, spec, name or None, device=device, dtype=torch_dtype(dtype), **options)
    if not name:
        raise ValueError(f"{spec!r} names no model: write '{scheme}:NAME'")
    if scheme == "timm":
        from cenote.backbones.timm import TimmBackbone

        return built(TimmBackbone, spec, name, device=device, dtype=torch_dtype(dtype), **options)
    if scheme == "kwt":
        from cenote.backbones.keyword_transformer import KeywordTransformerBackbone

        return built(KeywordTransformerBackbone, spec, name, device=device, dtype=torch_dtype(dtype), **options)
    if scheme == "pyg":
        from cenote.backbones.pyg import load_pyg

        return load_pyg(name, device=device, dtype=torch_dtype(dtype), **options)
    from cenote.backbones.huggingface import load_huggingface

    return load_huggingface(
        name,
        revision=revision,
        dtype=torch_dtype(dtype),
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        bidirectional=bidirectional,
        **options,
    )


def split_spec(spec: str) -> tuple[str, str]:
    """``"hf:bert"`` to ``("hf", "bert")``; a name without a scheme is a hub id.

    A name that contains a slash or is more than a typing error away from every scheme is taken as it stands, so that
    folders and hub ids need no scheme.
    """
    scheme, colon, name = spec.partition(":")
    if spec == "embedded" or (colon and scheme in SCHEMES):
        return scheme, name
    windows_drive = colon and len(scheme) == 1
    near = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1, cutoff=0.7)
    if colon and not windows_drive:
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backbone scheme {scheme!r} in {spec!r}: use one of {', '.join(SCHEMES)}{hint}")
    if near and "/" not in spec:
        raise ValueError(f"unknown backbone {spec!r}; did you mean {near[0]!r}?")
    return "hf", spec


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; ``None`` and ``"auto"`` leave the choice to the checkpoint."""
    import torch

    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return None if dtype == "auto" else dtype  # type: ignore[return-value]
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {dtype!r}")
    return found
