"""Every method against the dense model, on the same inputs, in one run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cenote.compress.cost import STEPS, WARM_UP, Cost, measure_cost
from cenote.compress.folder import Folder
from cenote.compress.inputs import EMBEDDED, Inputs, fingerprint, load_model, load_text, make_inputs
from cenote.compress.methods import Method, Ready, ReadyDense, check_model, parse_methods
from cenote.compress.quality import (
    MIN_RETRIEVAL,
    decoded_logits,
    grid_mean,
    retrieval,
    share_kept,
    text_quality,
)
from cenote.compress.result import DENSE, QUALITY, QUALITY_TEXT, WEIGHTS, CompressResult, Row, ranked
from cenote.probe.display import Display, Quiet

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
BUDGETS = (0.125, 0.25)
CONTEXT = 1024


def compress(
    model: Any = EMBEDDED,
    methods: str | Sequence[str] = "all",
    *,
    text: str | Path | None = None,
    data: str | None = None,
    budget: float | Sequence[float] = BUDGETS,
    context: int | None = None,
    steps: int = 64,
    documents: int = 4,
    depths: Sequence[float] = DEPTHS,
    request_tokens: int = 128,
    loss: float = 0.05,
    keep: str | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    seed: int = 0,
    batch_size: int = 20,
    device: str = "cpu",
    dtype: str | None = None,
    tokenizer: Any = None,
    display: Display | None = None,
) -> CompressResult:
    """Measure methods that make a language model do less, each against the model as it is.

    A method gets its budget in its own settings (:mod:`cenote.compress.budgets`): the share of the keys it may attend
    to at each length, or of 16 bits. Quality: perplexity, agreement and divergence on a text that is decoded token by
    token behind a prompt, and facts planted in documents of three lengths at several depths. Cost: time of a prompt and
    of the tokens behind it, memory, cache, the share of keys attended to.

    Args:
        model: ``"embedded"``, a transformers name or folder, or a model (then with ``tokenizer``).
        methods: ``"all"``, or names with options: ``["quest", "window(sinks=8)", "rsq"]``. Under ``"all"`` those that
            do not fit are listed with the reason.
        text: a UTF-8 file; by default prose that comes with scikit-learn. Its first two fifths calibrate.
        data: a data set of texts instead, as :func:`cenote.data.load_data` takes it; its test part is read.
        budget: share kept, one or several, each in (0, 1).
        context: tokens of the longest input; 1024, or what the model has room for.
        steps: tokens of each text that are decoded one by one.
        documents: with planted facts, for each length and depth.
        depths: of the facts, 0 = at the beginning.
        request_tokens: new tokens of the request by whose time methods are compared.
        loss: share of the dense quality that the kept recipe may lose.
        keep: row to keep, such as ``"quest 0.25"``, instead of the fastest recipe on the front within ``loss``.
        out: folder for the results; rows that it holds of the same inputs are not measured again.
        fresh: measure them again all the same.
        seed: of documents and random parts of methods.
        batch_size: documents that run together.

    Returns:
        Rows, notes, and in ``out`` the kept recipe under ``recipe/``, as ``Recipe.from_pretrained`` takes it (a kept
        weight method's model under ``model/``, as ``load_quantized`` does).

    Raises:
        ValueError: bad settings, unknown names, a model without a decoder, a text too short, a named method that does
            not fit, or a folder of something else.
    """
    display = display or Quiet()
    chosen = parse_methods(methods)
    named = not (methods == "all" or list(methods) == ["all"])
    budgets = _budgets(budget)
    for name, value, low in (("steps", steps, 1), ("documents", documents, 1), ("batch_size", batch_size, 1),
                             ("request_tokens", request_tokens, 1)):  # fmt: skip
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if not 0 <= loss < 1 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"need 0 <= loss < 1 and depths within [0, 1], got {loss} and {list(depths)}")
    jobs = [(m, b) for m in chosen for b in (budgets if m.scaled else [None])]
    keys = [_key(m, b) for m, b in jobs]
    if keep is not None and keep not in keys:
        raise ValueError(f"keep names one of the compared rows, {', '.join(keys)}; got {keep!r}")
    words, source = load_text(text, data)
    live, tokenizer = load_model(model, tokenizer, device, dtype)
    check_model(live)
    context = _context(context, live, steps)
    inputs = make_inputs(tokenizer, words, context, depths, documents, seed, live.device)
    settings: dict[str, Any] = {
        "model": str(model) if isinstance(model, str | Path) else type(model).__name__, "text": source,
        "fingerprint": fingerprint(live, tokenizer, words), "context": context, "steps": steps, "documents": documents,
        "depths": list(depths), "lengths": list(inputs.documents), "request_tokens": request_tokens, "seed": seed,
        "device": device, "dtype": str(next(live.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "timed_tokens": STEPS, "warm_up_tokens": WARM_UP,
        "methods": [m.spec for m in chosen], "budgets": budgets, "loss": loss, "keep": keep,
    }  # fmt: skip
    folder = None if out is None else Folder(Path(out), settings, fresh)

    display.stage("comparing", len(jobs) + 1)
    meter = _Meter(live, inputs, depths, batch_size, steps, request_tokens)
    rows = [_finished(folder, DENSE) or _measured(folder, DENSE, meter, None, None)]
    meter.dense_row = rows[0]
    display.advance()
    refused: list[tuple[str, str]] = []
    ready: Ready | None = None
    for (method, share), key in zip(jobs, keys, strict=True):
        row = _finished(folder, key)
        if row is None and method.spec not in dict(refused):
            try:
                ready = method.ready(live, inputs.calibration, share, context, seed, ready)
                row = _measured(folder, key, meter, share, ready, method)
            except Exception as error:
                if named:
                    raise
                why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                refused.append((method.spec, " ".join(why.split())))
                display.say(f"{method.spec} does not fit: {refused[-1][1]}")
        if row is not None:
            rows.append(row)
        display.advance(best=_best(rows))
    table = ranked(rows)
    notes = [*inputs.notes, *_notes(table[0])]
    kept, why = _choose(table, loss) if keep is None else (keep, "")
    notes += [why] if why else []
    result = CompressResult(table, settings, kept, tuple(refused), tuple(notes), folder.path if folder else None)
    if folder is not None:
        _keep(folder, kept, dict(zip(keys, jobs, strict=True)), live, inputs, context, seed)
        result.save(folder.path)
    return result


class _Meter:
    """Measures a ready method; the dense model's logits are made once."""

    def __init__(
        self, model: Any, inputs: Inputs, depths: Sequence[float], batch_size: int, steps: int, request_tokens: int
    ) -> None:
        self.inputs, self.depths, self.batch_size, self.steps = inputs, depths, batch_size, steps
        self.request_tokens, self.device = request_tokens, model.device
        self.dense: Ready = ReadyDense(model)
        self.dense_row: Row | None = None
        self._logits: Tensor | None = None

    def row(self, name: str, budget: float | None, ready: Ready | None) -> Row:
        own, dense, text = ready or self.dense, self.dense_row, self.inputs.text
        if self._logits is None:
            self._logits = decoded_logits(self.dense, text, self.steps)
        logits = self._logits if ready is None else decoded_logits(own, text, self.steps)
        quality = text_quality(logits, self._logits, text)
        grid = retrieval(own, self.inputs.documents, self.depths, self.device, self.batch_size)
        found = grid_mean(grid)
        cost: Cost = measure_cost(own, self.dense, text[:1])
        dense_found = found if dense is None else dense.retrieval
        kept = share_kept(quality.perplexity, dense.perplexity if dense else quality.perplexity, found, dense_found)
        counts = dense_found is not None and dense_found >= MIN_RETRIEVAL
        fields = dataclasses.asdict(cost)
        working = fields.pop("working_bytes")
        return Row(
            method=name, spec=own.spec, budget=budget, quality=kept, quality_name=QUALITY if counts else QUALITY_TEXT,
            **dataclasses.asdict(quality), retrieval=found, retrieval_grid=grid, **fields,
            request_ms=self._request(cost),
            peak_bytes=self.dense.weight_bytes() + working, weight_bytes=own.weight_bytes(),
            calibration_seconds=own.seconds, note=own.note,
        )  # fmt: skip

    def _request(self, cost: Cost) -> float:
        dense = self.dense_row
        if dense is None:
            return cost.prefill_ms + self.request_tokens * cost.decode_ms_per_token
        prompt = dense.prefill_ms * cost.prefill_ms / cost.dense_prefill_ms
        token = dense.decode_ms_per_token * cost.decode_ms_per_token / cost.dense_decode_ms
        return prompt + self.request_tokens * token


def _measured(
    folder: Folder | None, key: str, meter: _Meter, budget: float | None, ready: Ready | None,
    method: Method | None = None,
) -> Row:  # fmt: skip
    row = meter.row(DENSE if method is None else method.spec, budget, ready)
    if folder is not None:
        recipe = None if method is None or method.name in WEIGHTS else ready
        folder.write(key, row, recipe)
    return row


def _finished(folder: Folder | None, key: str) -> Row | None:
    return None if folder is None else folder.row(key)


def _key(method: Method, budget: float | None) -> str:
    """The name of the row that this gives."""
    return method.spec if budget is None else f"{method.spec} {budget:g}"


def _choose(table: tuple[Row, ...], loss: float) -> tuple[str | None, str]:
    """The recipe with the shortest request within the loss, and what a reader must know of the choice.

    Weight methods run on dequantised weights here, so that time says nothing of them: they are kept by name only.
    """
    recipes = [row for row in table if row.method != DENSE and not row.changes_weights]
    known = [row for row in recipes if math.isfinite(row.quality)]
    if not known:
        return None, "no recipe was measured, so none is kept"
    good = [row for row in known if row.quality >= 1 - loss]
    if good:
        return min(good, key=lambda row: row.request_ms).name, ""
    best = max(known, key=lambda row: row.quality)
    return (
        best.name,
        f"no recipe stays within {100 * loss:g} % of the dense quality; {best.name} comes nearest and is kept",
    )


def _keep(
    folder: Folder, kept: str | None, jobs: dict[str, tuple[Method, float | None]], model: Any, inputs: Inputs,
    context: int, seed: int,
) -> None:  # fmt: skip
    if kept is None:
        folder.drop()
        return
    method, budget = jobs[kept]
    if method.name not in WEIGHTS:
        folder.keep(kept)
        return
    folder.drop()
    method.ready(model, inputs.calibration, budget, context, seed).save(folder.path / "model")


def _notes(dense: Row) -> list[str]:
    if dense.retrieval is None or dense.retrieval >= MIN_RETRIEVAL:
        return []
    return [
        f"the dense model itself finds {100 * dense.retrieval:.0f} % of the planted facts, too few to judge "
        "by: quality is perplexity alone"
    ]


def _best(rows: list[Row]) -> str:
    others = [row for row in rows if row.method != DENSE and math.isfinite(row.quality)]
    if not others:
        return ""
    best = max(others, key=lambda row: row.quality)
    return f"{best.name}: {100 * best.quality:.0f} % of dense"


def _budgets(budget: float | Sequence[float]) -> list[float]:
    shares = sorted({float(b) for b in ([budget] if isinstance(budget, int | float) else budget)})
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"a budget is a share above 0 and below 1, got {budget}")
    return shares


def _context(context: int | None, model: Any, steps: int) -> int:
    room = int(getattr(model.config.get_text_config(), "max_position_embeddings", CONTEXT))
    context = min(CONTEXT, room) if context is None else context
    least = max(steps, STEPS + WARM_UP) + 8
    if not least <= context <= room:
        raise ValueError(
            f"context must lie between {least} (timed and decoded tokens) and {room} (the model), got {context}"
        )
    return context
