"""The five designs of "Pooling And Attention", as published and with padding masked, and the hard-negative loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.pooling.last_token import LastToken
from cenote.pooling.multi_layer import LatentPooling, MultiLayerPooling
from cenote.tuning.contrastive import hard_negative_nll
from golden.cases import Case


def _state(case: Case, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in case.state.items() if key.startswith(prefix)}


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if not case.target.startswith("model_loaders"):
        raise ValueError(f"unknown target {case.target!r}")
    config = dict(case.config)
    scale, pad = config.pop("loss_scale"), config.pop("pad_token_id")
    del config["padding_side"]
    layers = config.pop("num_layers")
    hidden = case.inputs["hidden_states"]
    last, mask = hidden[-1], case.inputs["attention_mask"].bool()
    stack = hidden[1:].transpose(0, 1)

    def head(**options: object) -> LatentPooling:
        return LatentPooling.from_reference(_state(case, "last."), **config, **options).eval()

    def multi(layer_vector: str) -> MultiLayerPooling:
        state = _state(case, "multi.")
        return MultiLayerPooling.from_reference(state, num_layers=layers, layer_vector=layer_vector, **config).eval()

    # The official designs 2 and 3 read the last position, and 5 tells padding by token id.
    design2, ids_mask = head(tokens="last")(last), case.inputs["input_ids"] != pad
    q, positive = case.inputs["q"], case.inputs["positive"]
    return {
        "model1": F.normalize(LastToken(last.shape[-1])(last, mask), dim=-1),
        "model2": design2,
        "last_tokens_only": design2,
        "model3": multi("last")(stack),
        "model4": head()(last, mask),
        "model4_unpadded": head(attend_padding=False)(last, mask),
        "model5": multi("mean")(stack, ids_mask),
        "loss": hard_negative_nll(q, positive, case.inputs["negative"], scale=scale).reshape(1),
        "loss_no_hard_negatives": hard_negative_nll(q, positive, scale=scale).reshape(1),
    }
