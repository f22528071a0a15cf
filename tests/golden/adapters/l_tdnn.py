"""L-TDNN: both networks, layer gates, the statistics pool with and without a mask, and the margin loss."""

import torch
from torch import Tensor

from cenote.pooling.l_tdnn import LTDNN
from cenote.tuning.margin import AAMSoftmax, speaker_vectors
from golden.cases import Case


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    if case.config["net"] not in ("ecapa", "d3net"):
        raise ValueError(f"unknown network {case.config['net']!r}")
    pool = LTDNN.from_reference(case.state, **case.config).eval()
    hidden = case.inputs["hidden_states"].permute(0, 2, 3, 1)
    mask = case.inputs["frame_mask"].bool()
    net = pool.convolve(hidden)
    layers = pool.pool_layers(net)
    embedding, masked = pool(hidden), pool(hidden, mask)
    loss = AAMSoftmax.from_reference(case.state, **case.config)(masked, case.inputs["labels"])
    return {
        "net": net.permute(0, 3, 1, 2),
        "layer_gate": pool.layer_pool.gate(pool.layer_pool.project(net, None)),
        "l_pool": layers.transpose(1, 2),
        "embedding": embedding,
        "embedding_masked": masked,
        "speaker_vectors": speaker_vectors(embedding, case.config["num_loss_heads"]),
        "aam_prob": loss.probabilities,
        "aam_loss": loss.loss.reshape(1),
    }
