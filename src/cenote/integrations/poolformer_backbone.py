"""Staged MetaFormers as backbones of transformers' detection and segmentation models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from cenote.integrations.poolformer import load_poolformer, read_poolformer
from cenote.mixing.poolformer import StagedMetaFormer


class StagedMetaFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    """Settings of a :class:`StagedMetaFormerBackbone`.

    Args:
        settings: of :class:`cenote.mixing.poolformer.StagedMetaFormer`, JSON-able; ``layers`` and ``dims`` at least.
        out_features: stages to give, of ``stage1``, ``stage2``, ...; the last unless told.
        out_indices: the same by number, from 0.
    """

    model_type = "cenote_staged_metaformer"

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = {"layers": [2, 2, 6, 2], "dims": [64, 128, 320, 512]} if settings is None else settings
        self.stage_names = [f"stage{number + 1}" for number in range(len(self.settings["layers"]))]
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)


class StagedMetaFormerBackbone(BackboneMixin, PreTrainedModel):
    """The normed maps of the stages asked for, as ``AutoBackbone`` models give them.

    ``backbone(pixel_values).feature_maps`` is a tuple of ``(batch, dim, height, width)``, of strides 4, 8, 16, 32 for
    PoolFormer; ``channels`` their widths. The class is registered with ``AutoBackbone``, so that its config is a
    ``backbone_config`` for UperNet, Mask2Former, DETR and others.
    """

    config_class = StagedMetaFormerConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: StagedMetaFormerConfig) -> None:
        super().__init__(config)
        self.num_features = list(config.settings["dims"])
        self.network = StagedMetaFormer(**{**config.settings, "fork_feat": True})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The network has started itself."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``BackboneOutput`` with ``feature_maps``."""
        maps = self.network(pixel_values)
        chosen = tuple(each for name, each in zip(self.stage_names, maps, strict=True) if name in self.out_features)
        return BackboneOutput(feature_maps=chosen)

    @classmethod
    def from_checkpoint(cls, source: str | Path, out_features: list[str] | None = None, **changes: Any) -> Any:
        """From what :func:`cenote.integrations.poolformer.load_poolformer` reads; a classifier's head is left out."""
        settings = {**read_poolformer(source)[0], **changes}
        backbone = cls(StagedMetaFormerConfig(settings, out_features=out_features))
        backbone.network.load_state_dict(load_poolformer(source, **{**changes, "fork_feat": True}).state_dict())
        return backbone.eval()


AutoConfig.register(StagedMetaFormerConfig.model_type, StagedMetaFormerConfig, exist_ok=True)
AutoBackbone.register(StagedMetaFormerConfig, StagedMetaFormerBackbone, exist_ok=True)
