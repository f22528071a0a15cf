"""PoolFormer S12 against timm's on images of 224 pixels, and the pooling mixer against attention at 64 x 64 tokens.

The weights are the same and the features are checked to be equal before anything is timed. timm's network runs as it
comes and, in a row of its own, with its memory laid out channels last, which is the fairer half of what makes ours
faster. The ratio is timm's time, as it comes, over ours at the largest batch.
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from common import finish, interleaved, ratio
from torch import nn

from cenote.mixing import create_mixer
from cenote.mixing.poolformer import poolformer
from cenote.mixing.poolformer_keys import timm_to_official

GOAL = 1.0


def networks() -> dict[str, nn.Module]:
    """timm's S12 with random weights of a size that matters, the same channels last, and ours."""
    torch.manual_seed(0)
    theirs, last = timm.create_model("poolformer_s12").eval(), timm.create_model("poolformer_s12").eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    last.load_state_dict(theirs.state_dict())
    ours = poolformer("s12").eval()
    ours.load_state_dict(timm_to_official(theirs.state_dict()))
    return {"timm": theirs, "timm, channels last": last.to(memory_format=torch.channels_last), "ours": ours}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--side", type=int, default=64, help="side of the map that the two mixers are timed on")
    parser.add_argument("--repeats", type=int, default=7)
    options, _ = parser.parse_known_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {name: model.to(device) for name, model in networks().items()}
    about = {"device": device, "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    value = 0.0
    for batch in options.batches:
        images = torch.randn(batch, 3, options.pixels, options.pixels, device=device)
        given = dict.fromkeys(models, images)
        given["timm, channels last"] = images.contiguous(memory_format=torch.channels_last)
        want = models["timm"].forward_features(images)
        away = ((models["ours"].forward_features(images) - want).abs().max() / want.abs().max()).item()
        if away > 1e-4:
            raise RuntimeError(f"features differ by {away:.1e} of the largest")
        calls = {name: lambda n=name, x=given[name]: models[n].forward_features(x) for name in models}
        times = interleaved(calls, options.repeats, warmup=2)
        value = ratio(times, "timm", "ours")
        row = {"what": "S12 features", **about, "batch": batch, "difference": away}
        row |= {f"{name} ms": 1e3 * min(seconds) for name, seconds in times.items()}
        rows.append(row | {"ratio": value, "ratio to channels last": ratio(times, "timm, channels last", "ours")})
    mixers = {
        "pool": create_mixer("pool", dim=64).to(device),
        "attention": create_mixer("softmax_attention(head_dim=32)", dim=64).to(device),
    }
    x = torch.randn(1, 64, options.side, options.side, device=device).contiguous(memory_format=torch.channels_last)
    times = interleaved({name: lambda m=mixer: m.mix_map(x) for name, mixer in mixers.items()}, options.repeats)
    row = {"what": f"mixer at {options.side} x {options.side}", **about, "batch": 1}
    row |= {f"{name} ms": 1e3 * min(seconds) for name, seconds in times.items()}
    rows.append(row | {"ratio": ratio(times, "attention", "pool")})
    finish("poolformer", "timm's poolformer_s12", GOAL, rows, value, __doc__)


if __name__ == "__main__":
    main()
