"""What holds of RSQ whatever the data."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cenote.ops.gptq import WeightedHessian, normalize_importance
from cenote.ops.hadamard import random_orthogonal
from cenote.ops.token_importance import activation_difference, activation_norm, token_distance
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings
from cenote.tuning import Importance, load_quantized, quantize_gptq, quantize_rsq, rotate_model
from cenote.tuning.rsq_layers import run_layer
from cenote.tuning.rsq_rotation import random_rotation

HEADS = ((12, 4, 4), (24, 6, 2), (4, 4, 12), (2, 1, 24))
"""Query heads, key-value heads and head size of a model of width 48; official code breaks on the first."""


@torch.no_grad()
def exact_findings() -> list[Finding]:
    """The reference files and the exact items of the specification."""
    return [*golden_findings("rsq"), *_equal_weights(), *_rotation(), *_scores(), *_hessian(), *_files()]


def small_model(kind: str = "llama", heads: int = 4, kv_heads: int = 2, head_dim: int = 12) -> Any:
    """A random decoder whose norms and biases are not trivial."""
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            initializer_range=0.1,
            tie_word_embeddings=True,
        )
    ).eval()
    for name, value in made.named_parameters():
        if "norm" in name or "bias" in name:
            value.data += 0.3 * torch.randn_like(value)
    return made.requires_grad_(False)


def _ids(sequences: int = 4, tokens: int = 32) -> torch.Tensor:
    return torch.randint(64, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def _differing(one: Any, other: Any) -> int:
    return sum(int((a != b).sum()) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def _equal_weights() -> list[Finding]:
    ids, weights = _ids(), torch.rand(4, 32, generator=torch.Generator().manual_seed(1))
    plain, equal, one, other = (small_model() for _ in range(4))
    quantize_gptq(plain, ids)
    quantize_rsq(equal, ids, importance=Importance(r_min=1.0), rotation="none")
    quantize_rsq(one, ids, importance=weights, rotation="none")
    quantize_rsq(other, ids, importance=4 * weights, rotation="none")
    return [
        at_most(
            "With all weights equal RSQ is plain GPTQ, bit for bit.", _differing(plain, equal), 0, "weights differ"
        ),
        at_most("A common factor on the importance changes nothing.", _differing(one, other), 0, "weights differ"),
    ]


def _rotation() -> list[Finding]:
    ids, worst = _ids(), 0.0
    for kind in ("llama", "qwen2"):
        for sizes in HEADS:
            for rotation in ("residual", "full"):
                model = small_model(kind, *sizes)
                before = model(ids).logits
                rotate_model(model, random_rotation(48, "orthogonal", 0), rotation)
                worst = max(worst, float((model(ids).logits - before).abs().max()))
    q = random_rotation(48, "hadamard", 0)
    away = float((q @ q.T - torch.eye(48, dtype=torch.float64)).abs().max())
    claim = (
        "Rotation, with or without online Hadamards, leaves logits alone for every number of heads, Llama and Qwen2."
    )
    return [at_most(claim, worst, 1e-4), at_most("Q Q^T is the identity.", away, 1e-12)]


def _scores() -> list[Finding]:
    model, ids = small_model(), _ids()
    received = run_layer(model, 0, {"input_ids": ids, "attention_mask": None}, attention=True, output=False).received
    assert received is not None
    g = torch.Generator().manual_seed(0)
    x, y, q = torch.randn(2, 40, 48, generator=g), torch.randn(2, 40, 48, generator=g), random_orthogonal(48, g).float()
    pairs = (
        (activation_norm(x), activation_norm(x @ q)),
        (activation_difference(x, y), activation_difference(x @ q, y @ q)),
        (token_distance(x), token_distance(x @ q)),
    )
    worst = max(float(((one - other) / one).abs().max()) for one, other in pairs)
    off = float((received.sum(1) - 4 * ids.shape[1]).abs().max())
    return [
        at_most("Raw attncon scores of a sequence sum to heads times tokens.", off, 1e-3),
        at_most("actnorm, actdiff and tokensim do not see a rotation.", worst, 1e-4, "relative difference"),
    ]


def _hessian() -> list[Finding]:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 50, 20, generator=g), torch.rand(3, 50, generator=g)
    weights, hessian = normalize_importance(w), WeightedHessian(20)
    for row in range(3):
        hessian.add(x[row], weights[row])
    brute = (
        2 / 3 * torch.einsum("nt,nti,ntj->ij", w.double() / w.double().mean(1, keepdim=True), x.double(), x.double())
    )
    away = float((hessian.value - brute).abs().max() / brute.abs().max())
    return [at_most("The weighted Hessian equals the sum over tokens.", away, 1e-5, "relative difference")]


def _files() -> list[Finding]:
    ids, model = _ids(), small_model("qwen2")
    result = quantize_rsq(copy.deepcopy(model), ids, bits=3)
    wanted, worst = result.model(ids).logits, 0.0
    with tempfile.TemporaryDirectory() as folder:
        layouts = ["plain", "packed"]
        try:
            import optimum.quanto  # noqa: F401

            layouts.append("quanto")
        except ImportError:
            pass
        for layout in layouts:
            loaded = load_quantized(result.save(Path(folder) / layout, layout))
            worst = max(worst, float((loaded(ids).logits - wanted).abs().max()))
    bits = 8 * sum(each.packed.nbytes for each in result.linears)
    rate = bits / sum(each.rows * each.columns for each in result.linears)
    return [
        at_most(f"Saved and read back ({', '.join(layouts)}), a model is the same bit for bit.", worst, 0),
        finding(
            "Codes of 3 bits take 3 bits of a file.",
            "3, plus the filling of rows to eight codes",
            rate,
            lambda v: 3 <= v <= 3.1,
            unit="bits a weight",
            note=f"With scales {8 * result.packed_bytes / bits * rate:.2f} on these narrow layers.",
        ),
    ]
