"""What a prompt and the tokens behind it cost: time, memory, cache, density."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from cenote.attention.host import cache_argument
from cenote.compress.density import watched
from cenote.compress.methods import Ready

STEPS = 24
"""Tokens that are timed behind the prompt."""
REPEATS = 3
"""Times that a prompt is timed."""
WARM_UP = 3
"""Tokens, and one prompt, before that."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds and bytes; see :class:`cenote.compress.result.Row`."""

    prefill_ms: float
    prefill_ms_spread: float
    decode_ms_per_token: float
    decode_ms_spread: float
    dense_prefill_ms: float
    dense_decode_ms: float
    working_bytes: int
    cache_bytes: int
    density: float | None
    prefill_density: float | None


@torch.no_grad()
def measure_cost(ready: Ready, dense: Ready, ids: Int[Tensor, "1 tokens"], steps: int = STEPS) -> Cost:
    """Cost of the method and, in turns with it, of the dense model.

    The prompt is all tokens but the last ``WARM_UP + steps``, which then come one by one. One prompt and ``WARM_UP``
    tokens run first and do not count.

    Raises:
        ValueError: fewer tokens than that.
    """
    prompt = ids.shape[1] - steps - WARM_UP
    if prompt < 1:
        raise ValueError(f"timing needs more than {steps + WARM_UP} tokens, got {ids.shape[1]}")
    times: dict[str, tuple[list[float], list[float]]] = {"own": ([], []), "dense": ([], [])}
    for run in range(REPEATS + 1):
        for who, each in (("own", ready), ("dense", dense)):
            with each.at(prompt) as model:
                # Steps are timed behind the last prompt only: their median needs no more.
                prefill, decode = _timed(model, ids, prompt, steps + WARM_UP if run == REPEATS else 0)
            times[who][0].extend([prefill] if run else [])
            times[who][1].extend(decode[WARM_UP:])
    with ready.at(prompt) as model:
        working = _peak(model, lambda: _run(model, ids[:, : prompt + 4], prompt))
        cache, shares = DynamicCache(config=model.config), []
        for part in (slice(0, prompt), slice(prompt, prompt + 4)):
            with watched(model) as count:
                for new in [part] if part.start == 0 else [slice(i, i + 1) for i in range(part.start, part.stop)]:
                    _pass(model, ids[:, new], new, cache)
            shares.append(count.share)
    own, other = times["own"], times["dense"]
    return Cost(
        *_summary(own[0]), *_summary(own[1]), _summary(other[0])[0], _summary(other[1])[0], working, cache_bytes(cache),
        density=shares[1], prefill_density=shares[0],
    )  # fmt: skip


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys, values and states of a method that a cache holds, room kept ahead not counted."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        held = [getattr(layer, "keys", None), getattr(layer, "values", None), *(vars(state).values() if state else ())]
        total += sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))
    return total


def _pass(model: Any, ids: Tensor, new: slice, cache: Cache) -> None:
    places = torch.arange(new.start, new.stop, device=ids.device)[None]
    model(input_ids=ids, position_ids=places, use_cache=True, logits_to_keep=1, **cache_argument(cache))


def _run(model: Any, ids: Tensor, prompt: int) -> None:
    cache = DynamicCache(config=model.config)
    _pass(model, ids[:, :prompt], slice(0, prompt), cache)
    for step in range(prompt, ids.shape[1]):
        _pass(model, ids[:, step : step + 1], slice(step, step + 1), cache)


def _timed(model: Any, ids: Tensor, prompt: int, steps: int) -> tuple[float, list[float]]:
    cache, marks = DynamicCache(config=model.config), []
    for number in range(steps + 1):
        new = slice(0, prompt) if number == 0 else slice(prompt + number - 1, prompt + number)
        begin = _now(ids)
        _pass(model, ids[:, new], new, cache)
        marks.append(1000 * (_now(ids) - begin))
    return marks[0], marks[1:]


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def _summary(values: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float(middle), float(high - low)


def _peak(model: Any, run: Callable[[], None]) -> int:
    """The most bytes that are allocated at once during the run, beside what was there before.

    On a GPU the allocator counts; elsewhere the allocations that torch's profiler sees, which are those of tensors and
    the working space of its operations, are summed up in the order of time.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _silent():
        seen.start()
    try:
        run()
    finally:
        with _silent():
            seen.stop()
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(max(held.max(initial=0), 0))


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's C++ side reports its own start on standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
