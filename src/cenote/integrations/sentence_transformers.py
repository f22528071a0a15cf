"""Readouts in sentence-transformers: ``SentenceTransformer(modules=[Transformer(...), ReadoutModule(...)])``."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cenote.files import write_all
from cenote.pooling import create_pooling
from cenote.pooling.base import Pooling
from cenote.pooling.registry import pooling_class
from cenote.types import TokenChoice

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Module, Transformer
    from sentence_transformers.util import import_from_string
except ImportError as error:
    raise ImportError(f"this module needs sentence-transformers 6: pip install 'cenote[text]' ({error})") from None

WEIGHTS, MODULES, SETTINGS = "model.safetensors", "modules.json", "config_sentence_transformers.json"


@runtime_checkable
class TrainedReadout(Protocol):
    """What :meth:`ReadoutModule.from_readout` takes: a trained pooling and what it reads."""

    config: Any
    pooling: Pooling | None


class ReadoutModule(Module):
    """Any pooling of this library behind a ``Transformer`` module.

    Takes ``token_embeddings``, ``attention_mask`` (padding on either side) and, where the pooling reads more than the
    last layer, ``all_layer_embeddings``; gives ``sentence_embedding``. Inside a ``SentenceTransformer`` it sizes itself
    by the network in front and switches its hidden states on. Hidden state 0 is what enters the first block; pooling of
    all layers reads blocks 1 to the last (from 0 where the pooling's ``reads_embeddings`` says so). The last hidden
    state is the network's output, after its final norm where it has one.

    Args:
        spec: pooling for :func:`cenote.pooling.create_pooling`, such as
            ``"weighted_layers > efficient_probing(num_queries=4)"``.
        dim: width of the tokens; ``None`` takes it from the network.
        layers: numbers of the hidden states to read; ``None`` takes them from pooling and network.
        options: further constructor options of the pooling.
        include_prompt: ``False`` leaves the tokens of ``encode(prompt=...)`` out of the pooling.
        tokens: ``"both"`` pools all tokens, ``"class"`` the first real one, ``"patches"`` all but the class token.
        prefix: number of tokens that ``"patches"`` leaves out in front.
        norm_eps: standardise the vector by kept statistics, with so much added to the variance; ``None`` does not.
        normalize: scale the vector to unit length.

    Raises:
        ValueError: a pooling that needs a grid of patches, unknown names or options; when run, hidden states that are
            not there, or a row with nothing left to pool.
    """

    config_keys = ["spec", "dim", "layers", "options", "include_prompt", "tokens", "prefix", "norm_eps", "normalize"]  # noqa: RUF012

    def __init__(
        self,
        spec: str,
        dim: int | None = None,
        layers: Sequence[int] | None = None,
        options: dict[str, Any] | None = None,
        include_prompt: bool = True,
        tokens: TokenChoice = "both",
        prefix: int = 1,
        norm_eps: float | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if tokens not in ("both", "class", "patches"):
            raise ValueError(f"tokens must be 'class', 'patches' or 'both', got {tokens!r}")
        self.spec, self.dim, self.options = spec, dim, dict(options or {})
        self.layers = None if layers is None else list(layers)
        self.include_prompt, self.tokens, self.prefix = include_prompt, tokens, prefix
        self.norm_eps, self.normalize = norm_eps, normalize
        self.pooling: Pooling | None = None
        self.norm: nn.BatchNorm1d | None = None
        token_reduction = pooling_class(spec.split(">")[-1].partition("(")[0].strip())
        self._reads_all = ">" in spec or token_reduction.layers == "all"
        self._reads_embeddings = token_reduction.reads_embeddings
        if token_reduction.needs_grid:
            raise ValueError(f"{spec!r} reads a grid of patches, which texts do not have")
        if dim is not None and (self.layers is not None or not self._reads_all):
            self._size()

    def _size(self) -> None:
        assert self.dim is not None
        # Lists are what JSON makes of tuples.
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        self.pooling = create_pooling(self.spec, dim=self.dim, num_layers=len(self.layers or [1]), **options)
        if self.norm_eps is not None:
            self.norm = nn.BatchNorm1d(self.pooling.out_dim, eps=self.norm_eps, affine=False)

    @classmethod
    def from_readout(cls, readout: TrainedReadout, *, include_prompt: bool = True, prefix: int = 1) -> ReadoutModule:
        """The pooling of a trained readout, with the layers and tokens it was trained on.

        From a :class:`cenote.probe.Readout` comes what :meth:`~cenote.probe.Readout.vector` gives, without the head
        and the norm in front of it; from an ``EmbeddingReadout`` its unit vector.

        Raises:
            ValueError: a readout without a pooling of its own (``"encoder_pooler"``).
        """
        config = readout.config
        if readout.pooling is None:
            raise ValueError("this readout is the encoder's own pooled output: use the encoder without a readout")
        norm = getattr(readout, "norm", None) if getattr(config, "standardise", False) else None
        module = cls(
            config.pooling, config.dim, config.layers, config.options, include_prompt, config.tokens, prefix,
            norm_eps=None if norm is None else norm.eps, normalize=hasattr(config, "standardise"),
        )  # fmt: skip
        assert module.pooling is not None
        module.pooling.load_state_dict(readout.pooling.state_dict())
        if norm is not None and module.norm is not None:
            module.norm.load_state_dict(norm.state_dict())
        return module

    def on_model_ready(self, model: Any) -> None:
        """Called by ``SentenceTransformer`` when all modules are there: size the pooling, ask for hidden states."""
        config = getattr(model[0], "config", None)
        depth = getattr(config, "num_hidden_layers", None)
        if self.dim is None:
            self.dim = model[0].get_embedding_dimension()
        if self.layers is None and self._reads_all:
            if depth is None:
                raise ValueError(f"{self.spec!r} reads all layers of an unknown number: name them with layers=[...]")
            self.layers = list(range(0 if self._reads_embeddings else 1, depth + 1))
        if self.pooling is None:
            first = next(model.parameters(), torch.zeros(()))
            self._size()
            self.to(first.device, first.dtype)
        if self.layers is None or config is None or depth is None:
            return
        wrong = [n for n in self.layers if not 0 <= n <= depth]
        if wrong:
            raise ValueError(f"hidden states are numbered 0 to {depth}, got {wrong}")
        if self._reads_all or self.layers[-1] != depth:
            config.output_hidden_states = True
        else:
            self.layers = None  # the last one comes anyway

    def forward(self, features: Any, **options: Any) -> Any:
        if self.pooling is None:
            raise ValueError("this readout was never sized: put it into a SentenceTransformer, or give dim and layers")
        x = features["token_embeddings"] if self.layers is None else self._hidden(features)
        if "cu_seq_lens_q" in features:
            x, mask = unflatten(x, features["cu_seq_lens_q"])
        else:
            given = features.get("attention_mask")
            mask = x.new_ones((x.shape[0], x.shape[-2]), dtype=torch.bool) if given is None else given.bool()
        dtype = next((p.dtype for p in self.pooling.parameters()), x.dtype)
        chosen = self._chosen(mask, features.get("prompt_length"))
        vector = self.pooling(x.to(dtype), chosen)
        if self.norm is not None:  # the statistics stay what they are, also in training
            vector = F.batch_norm(vector, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        features["sentence_embedding"] = F.normalize(vector, dim=-1) if self.normalize else vector
        return features

    def _hidden(self, features: Any) -> Tensor:
        """The hidden states that are read, ``(batch, layers, tokens, dim)``, or the tokens of the only one."""
        assert self.layers is not None
        stack = features.get("all_layer_embeddings")
        if stack is None:
            raise ValueError(
                f"{self.spec!r} reads hidden states {self.layers}, which the network does not give: load it with "
                "Transformer(..., config_kwargs={'output_hidden_states': True})"
            )
        if max(self.layers) >= len(stack):
            raise ValueError(
                f"{self.spec!r} reads hidden states {self.layers}, the network gives 0 to {len(stack) - 1}"
            )
        return torch.stack([stack[n] for n in self.layers], dim=1) if self._reads_all else stack[self.layers[-1]]

    def _chosen(self, mask: Bool[Tensor, "batch tokens"], prompt: Any) -> Bool[Tensor, "batch tokens"]:
        """The mask without what is not to be pooled, counted from the first real token of each row."""
        place = mask.long().cumsum(dim=1)
        if self.tokens != "both":
            mask = mask & ((place == 1) if self.tokens == "class" else (place > self.prefix))
        if prompt is not None and not self.include_prompt:
            # A number, or the same number once or for every row, as the trainer hands it over.
            mask = mask & (place > (int(prompt.flatten()[0]) if isinstance(prompt, Tensor) else int(prompt)))
        return mask

    def get_embedding_dimension(self) -> int | None:
        """Width of the sentence vector."""
        return None if self.pooling is None else self.pooling.out_dim

    def save(self, output_path: str, *args: Any, **options: Any) -> None:
        """Weights as safetensors, settings as ``config.json``."""
        if self.pooling is None:
            raise ValueError("this readout was never sized, so there is nothing to save")
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        write_all(
            output_path,
            {
                WEIGHTS: save_tensors(state, metadata={"format": "pt"}),
                self.config_file_name: json.dumps(self.get_config_dict(), indent=2) + "\n",
            },
        )

    @classmethod
    def load(  # type: ignore[override]
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> ReadoutModule:
        """From a folder or repository that sentence-transformers saved; ``ValueError`` for files that do not fit."""
        where: dict[str, Any] = {
            "subfolder": subfolder, "token": token, "cache_folder": cache_folder, "revision": revision,
            "local_files_only": local_files_only,
        }  # fmt: skip
        module = cls(**cls.load_config(model_name_or_path, **where))
        path = cls.load_file_path(model_name_or_path, WEIGHTS, **where)
        if path is None or module.pooling is None:
            raise ValueError(f"{model_name_or_path} holds no trained readout in {subfolder or 'its root'}")
        try:
            module.load_state_dict(load_tensors(Path(path).read_bytes()))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold the weights that its config.json describes: {error}") from None
        return module


def readout_model(
    network: str | Transformer, readout: str | TrainedReadout, *, include_prompt: bool = True, **options: Any
) -> SentenceTransformer:
    """A ``SentenceTransformer`` of a network and a readout; prompts of the readout become its prompts.

    Args:
        network: a hub id or folder, or a ``Transformer`` module.
        readout: a pooling spec, or a trained readout.
        include_prompt: ``False`` leaves prompts out of the pooling.
        **options: of :class:`ReadoutModule` for a spec, of :meth:`ReadoutModule.from_readout` for a trained one.
    """
    module = (
        ReadoutModule(readout, include_prompt=include_prompt, **options)
        if isinstance(readout, str)
        else ReadoutModule.from_readout(readout, include_prompt=include_prompt, **options)
    )
    front = Transformer(network) if isinstance(network, str) else network
    config = None if isinstance(readout, str) else readout.config
    prompts = {role: getattr(config, f"{role}_prompt", "") for role in ("query", "document")}
    return SentenceTransformer(modules=[front, module], prompts={k: v for k, v in prompts.items() if v})


def load_readout_model(
    source: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    local_files_only: bool = False,
) -> SentenceTransformer:
    """Load what ``save_pretrained`` or ``push_to_hub`` of a model with readouts wrote.

    ``SentenceTransformer(source, trust_remote_code=True)`` does so too, but that flag also lets the repository bring
    code of its own. Here only modules of sentence-transformers and of this library are made.

    Raises:
        ValueError: not a saved model, or one with modules from elsewhere.
    """  # fmt: skip
    where: dict[str, Any] = {
        "revision": revision, "token": token, "cache_folder": cache_folder, "local_files_only": local_files_only,
    }  # fmt: skip
    paths = [Module.load_file_path(str(source), name, **where) for name in (MODULES, SETTINGS)]
    if None in paths:
        raise ValueError(f"{source} is no saved sentence-transformers model: {MODULES} or {SETTINGS} is missing")
    entries, settings = (json.loads(Path(str(path)).read_text()) for path in paths)
    modules: Any = OrderedDict()
    for entry in entries:
        kind = entry["type"]
        if not kind.startswith(("sentence_transformers.", "cenote.integrations.")):
            raise ValueError(f"{source} has a module {kind}, which neither sentence-transformers nor this library made")
        made: Any = import_from_string(kind)
        modules[entry["name"]] = made.load(str(source), subfolder=entry["path"], **where)
    kept = {
        name: settings[name] for name in ("prompts", "default_prompt_name", "similarity_fn_name") if name in settings
    }
    return SentenceTransformer(modules=modules, device=device, **kept)


def unflatten(x: Tensor, boundaries: Int[Tensor, "rows_and_one"]) -> tuple[Tensor, Bool[Tensor, "rows tokens"]]:
    """Rows that lie end to end in one, as networks with variable-length attention return them, padded on the right.

    Args:
        x: ``(1, total, dim)`` or ``(1, layers, total, dim)``.
        boundaries: where rows begin, and the total, ``(rows + 1,)``.
    """
    lengths = boundaries.diff()
    rows = pad_sequence(list(x[0].movedim(-2, 0).split(lengths.tolist())), batch_first=True)
    mask = torch.arange(rows.shape[1], device=x.device) < lengths[:, None].to(x.device)
    return rows.movedim(1, -2), mask
