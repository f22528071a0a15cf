"""What holds of PoNet whatever the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cenote.mixing.base import MixerContext
from cenote.mixing.ponet import PoNet
from cenote.ops.segments import segment_max
from cenote.reproductions.base import Finding, at_most, finding
from cenote.reproductions.golden import golden_findings

DIM, HEADS, TOKENS = 24, 4, 20


def exact_findings() -> list[Finding]:
    """Reference files, published keys, padding, the guard, segments and their gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = PoNet(DIM, HEADS).eval()
        tokens = torch.randn(3, TOKENS, DIM)
        with torch.no_grad():
            found = [*_published(), *_padding(mixer, tokens), *_guard(mixer, tokens), *_segments(mixer, tokens)]
        return [*golden_findings("ponet"), *found, *_maxima()]


def published_keys(layers: int) -> set[str]:
    """Names in the published pre-training checkpoint of so many layers."""
    names = {f"ponet.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    pairs = ["ponet.embeddings.LayerNorm", "ponet.pooler.dense", "cls.seq_relationship"]
    pairs += [f"cls.predictions.transform.{name}" for name in ("dense", "LayerNorm")]
    inside = [f"attention.self.dense_{name}" for name in ("q", "k", "o", "segment", "local")]
    inside += ["attention.output.dense", "attention.output.LayerNorm"]
    inside += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    pairs += [f"ponet.encoder.layer.{layer}.{name}" for layer in range(layers) for name in inside]
    names |= {f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")}
    return {*names, "cls.predictions.bias", "cls.predictions.decoder.weight"}


def _published() -> list[Finding]:
    from cenote.integrations.ponet import PoNetConfig, PoNetForPreTraining

    with torch.device("meta"):
        model = PoNetForPreTraining(PoNetConfig())
    own = {name for name in model.state_dict() if name != "cls.predictions.decoder.bias"}  # tied to predictions.bias
    differ = own ^ published_keys(model.config.num_hidden_layers)
    return [
        at_most(
            "The pre-training model of base size has the published names and no others.", len(differ), 0, "names differ"
        )
    ]


def _special() -> Tensor:
    special = torch.zeros(3, TOKENS, dtype=torch.bool)
    special[:, 0], special[:, -1] = True, True
    special[0, 9], special[1, 4:6] = True, True
    return special


def _context() -> MixerContext:
    return MixerContext(special_mask=_special())


def _padding(mixer: PoNet, tokens: Tensor) -> list[Finding]:
    alone, away, left = mixer(tokens, None, _context()), [], []
    for front in (0, 7):
        place = slice(front, front + TOKENS)
        padded = torch.full((3, TOKENS + 7, DIM), 1e4)
        padded[:, place] = tokens
        mask = torch.zeros(3, TOKENS + 7, dtype=torch.bool)
        mask[:, place] = True
        special = torch.ones_like(mask)
        special[:, place] = _special()
        mixed = mixer(padded, mask, MixerContext(special_mask=special))
        away.append(_away(mixed[:, place], alone))
        left.append(float(mixed[~mask].abs().max()))
    return [
        at_most("Padding of any content, behind or in front, changes no real token.", max(away), 1e-5),
        at_most("Padding comes out as 0.", max(left), 0, "largest entry"),
    ]


def _guard(mixer: PoNet, tokens: Tensor) -> list[Finding]:
    context, changed = _context(), tokens.clone()
    changed[0, 3] += 2  # row 0 has a separator at 9
    before, after = mixer.pools(tokens, None, context), mixer.pools(changed, None, context)
    assert before.segment is not None and before.local is not None  # noqa: PT018
    assert after.segment is not None and after.local is not None and before.overall and after.overall  # noqa: PT018
    behind = max(_away(before.segment[0, 9:], after.segment[0, 9:]), _away(before.local[0, 9:], after.local[0, 9:]))
    moved = _away(before.overall.vector, after.overall.vector)
    special = _special()
    return [
        at_most("A changed token leaves both maxima of other sentences as they were.", behind, 0),
        finding("It moves the global vector.", "above 0", moved, lambda v: v > 0, unit="max abs difference"),
        at_most(
            "Class and separator tokens get the global part alone.",
            float(torch.cat([before.segment[special], before.local[special]]).abs().max()),
            0,
            "largest maximum there",
        ),
    ]


def _segments(mixer: PoNet, tokens: Tensor) -> list[Finding]:
    whole = mixer.pools(tokens).segment
    single = mixer.pools(tokens, None, MixerContext(segment_ids=torch.arange(TOKENS).expand(3, -1))).segment
    assert whole is not None and single is not None and mixer.dense_segment is not None  # noqa: PT018
    return [
        at_most("One segment over all makes the segment maximum equal at all tokens.", _away(whole, whole[:, :1]), 0),
        at_most("Segments of one token keep the tokens' own values.", _away(single, mixer.dense_segment(tokens)), 0),
    ]


def _maxima() -> list[Finding]:
    """Three ways to the same maxima, and where their gradient goes."""
    values, ids = torch.randn(3, TOKENS, 5), torch.randint(TOKENS, (3, TOKENS))
    one = values.clone().requires_grad_()
    pooled = segment_max(one, ids)
    member = (ids[:, :, None] == ids[:, None, :])[..., None]
    plain = values[:, None].masked_fill(~member, -torch.inf).amax(dim=2)
    reduced = []
    for row in range(3):
        order = ids[row].argsort(stable=True)
        lengths = torch.bincount(ids[row], minlength=TOKENS)
        reduced.append(torch.segment_reduce(values[row, order], "max", lengths=lengths, initial=-torch.inf)[ids[row]])
    (gradient,) = torch.autograd.grad(pooled.sum(), one)
    readers = F.one_hot(ids, TOKENS).sum(dim=1).gather(1, ids)  # tokens of each token's segment
    wanted = (values == plain) * readers[..., None]
    return [
        at_most(
            "The segment maximum by scatter, by sorting and by brute force agree.",
            max(_away(pooled.detach(), plain), _away(pooled.detach(), torch.stack(reduced))),
            0,
        ),
        at_most("The gradient of a segment maximum goes to the maximal token alone.", _away(gradient, wanted), 0),
    ]


def _away(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
