"""What holds of shared attention maps whatever the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cenote.attention import EchoAtt
from cenote.attention.echo_att_similarity import layer_similarity
from cenote.attention.host import cache_argument
from cenote.inspection.attention_similarity import removed_by_sharing
from cenote.integrations.echo_att_model import share_attention
from cenote.ops.layer_sharing import removed_parameters
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.tuning.echo_att_losses import distillation_losses


def exact_findings() -> list[Finding]:
    """The reference file, the identities, the counts, the cache, the losses, the gradients."""
    model, (ids, mask) = _random_model(), _padded()
    return [
        *golden_findings("echo-att"),
        *_identities(model, ids, mask),
        *_counts(model),
        *_cache(model, ids, mask),
        *_losses(model, ids, mask),
        _similarity(model, ids, mask),
    ]


def _random_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def _twins() -> Any:
    """A model whose layers 1 and 2 see the same input and make the same map of it."""
    model = _random_model()
    layers = model.model.layers
    with torch.no_grad():
        layers[1].self_attn.o_proj.weight.zero_()
        layers[1].mlp.down_proj.weight.zero_()
        for name in ("q_proj", "k_proj"):
            getattr(layers[2].self_attn, name).weight.copy_(getattr(layers[1].self_attn, name).weight)
    return model


def _padded() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    return ids, mask


@torch.no_grad()
def _logits(model: Any, ids: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    return model(ids, attention_mask=mask, **inputs).logits


def _identities(model: Any, ids: Tensor, mask: Tensor) -> list[Finding]:
    dense, real = _logits(model, ids, mask), mask.bool()
    shared = [_logits(share_attention(model, (2, 3), shared_form=f), ids, mask) for f in ("probabilities", "query_key")]
    with EchoAtt(shared_layers=(2, 3))(model):
        live = _logits(model, ids, mask)
    twins = _twins()
    same = _away(_logits(share_attention(twins, (2,)), ids, mask), _logits(twins, ids, mask), real)
    return [
        at_most(
            "No shared layer is the dense model.", _away(_logits(share_attention(model, ()), ids, mask), dense, real), 0
        ),
        at_most("Equal inputs, queries and keys make sharing change nothing.", same, 1e-6),
        at_most("Passing queries and keys on equals passing maps on.", _away(shared[0], shared[1], real), 1e-6),
        at_most("The student computes what sharing on the unchanged model does.", _away(live, shared[0], real), 1e-6),
    ]


def _counts(model: Any) -> list[Finding]:
    published = [removed_parameters(n, 2048, 32, 4, 64) / 1e6 for n in (5, 9, 17)]
    away = max(abs(a - b) for a, b in zip(published, (23.6, 42.5, 80.2), strict=True))
    fewer = model.num_parameters() - share_attention(model, (2, 3)).num_parameters()
    return [
        at_most("The formula gives the published counts of TinyLlama.", away, 0.05, "million parameters"),
        at_most(
            "The student lacks as many parameters as the formula says.", abs(fewer - removed_by_sharing(model, 2)), 0
        ),
    ]


def _cache(model: Any, ids: Tensor, mask: Tensor) -> list[Finding]:
    student = share_attention(model, (2, 3))
    cache, parts = DynamicCache(config=student.config), []
    for first, last in ((0, 10), (10, 16), *((n, n + 1) for n in range(16, 20))):
        parts.append(_logits(student, ids[:, first:last], mask[:, :last], **cache_argument(cache)))
    away = _away(torch.cat(parts, 1), _logits(student, ids, mask), mask.bool())
    held: list[Any] = [cache.layers[layer] for layer in (2, 3)]
    keys = float(sum(layer.keys.numel() for layer in held))
    return [
        at_most("Cached decoding equals full recomputation.", away, 1e-9),
        at_most("Shared layers hold no keys.", keys, 0, "entries"),
    ]


def _losses(model: Any, ids: Tensor, mask: Tensor) -> list[Finding]:
    batch = {"input_ids": ids, "attention_mask": mask}
    twins = _twins()
    same = distillation_losses(share_attention(twins, (2,)), twins, batch)
    student = share_attention(model, (2, 3)).requires_grad_()
    source = student.model.layers[1].self_attn
    with torch.no_grad():
        source.o_proj.weight.zero_()  # what is left reaches the loss through followers only
    distillation_losses(student, model, batch).total.backward()
    gradient = source.q_proj.weight.grad.abs().max().item()
    away = max(same.intermediate.item(), same.soft.item())
    return [
        at_most("L_I and L_S vanish where student and teacher are equal.", away, 1e-12, "loss"),
        finding(
            "Gradients reach the source's queries through its followers alone.",
            "above 0",
            gradient,
            lambda v: v > 0,
            unit="largest entry",
        ),
    ]


def _similarity(model: Any, ids: Tensor, mask: Tensor) -> Finding:
    alike = layer_similarity(model, [{"input_ids": ids, "attention_mask": mask}])
    away = max((alike - alike.T).abs().max().item(), (alike.diagonal() - 1).abs().max().item())
    return at_most("The similarity is symmetric with a unit diagonal.", away, 1e-6)


def _away(a: Tensor, b: Tensor, real: Tensor) -> float:
    return float((a - b)[real].abs().max())
