"""VAR on given attention maps: a prompt, and one decoding step with the prompt's sinks."""

import torch
from torch import Tensor

from cenote.ops.attention_sinks import redistribute_attention, sink_scores
from golden.cases import Case

SETTINGS = {"sink_dims", "tau", "rho", "summ", "p", "image_start", "image_len", "rms_eps", "portion_eps"}
REMARKS = {"p_meaning": "retained", "head_rule": "<= rho", "prefill_queries": ">= image_start+image_len"}
"""Settings in words, and what they must say: the official code knows no others."""


def run(case: Case) -> dict[str, Tensor]:
    if case.case != "redistribute":
        raise ValueError(f"unknown case {case.case!r}")
    unknown = set(case.config) - SETTINGS - set(REMARKS)
    unknown |= {name for name, words in REMARKS.items() if words not in str(case.config.get(name, words)).lower()}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    config = case.config
    hidden, prompt = case.inputs["hidden"], case.inputs["attention_prefill"]
    tokens = hidden.shape[1]
    sinks = sink_scores(hidden, config["sink_dims"], config["rms_eps"]) > config["tau"]
    place = torch.arange(tokens)
    end = config["image_start"] + config["image_len"]
    image = ((place >= config["image_start"]) & (place < end)).expand_as(sinks)
    options = {
        "moved": 1 - config["p"], "rho": config["rho"], "min_mass": config["summ"], "head_rule": "sink_share",
        "needs_visual_sink": True, "eps": config["portion_eps"],
    }  # fmt: skip
    before = redistribute_attention(prompt, sinks, image, (place >= end).expand_as(sinks), **options)
    step = case.inputs["attention_decode"]
    later = step.shape[-1] - tokens
    wide = [torch.nn.functional.pad(part, (0, later)) for part in (sinks, image)]
    rows = torch.ones(len(step), step.shape[2], dtype=torch.bool)
    after = redistribute_attention(step, *wide, rows, **options)
    return {
        "sink_index": sinks.nonzero() if len(sinks) > 1 else sinks[0].nonzero().flatten(),
        "attention_prefill": before.weights,
        "selected_prefill": before.selected.to(torch.uint8),
        "attention_decode": after.weights,
        "selected_decode": after.selected.to(torch.uint8),
    }
