"""The model card of a saved readout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cenote.probe.embedding_readout import EmbeddingConfig
    from cenote.probe.readout import ReadoutConfig

TABLE_ROWS = 20
COLUMNS = {
    "readout": "readout",
    "layers": "layers",
    "tokens": "tokens",
    "score": "score",
    "ci": "95 % interval",
    "params": "parameters",
    "macs": "MACs",
    "latency_ms": "latency (ms)",
    "tie_group": "tie group",
}


def model_card(config: ReadoutConfig) -> str:
    """Markdown with front matter: what the readout is, the comparison it came from, how to load it."""
    gives = {
        "classification": f"one of {config.outputs} classes",
        "multilabel": f"any of {config.outputs} labels",
        "regression": f"{config.outputs} value(s)",
    }[config.task]
    lines = [
        *_head(config, f"gives {gives}"),
        *_usage(
            config,
            "from cenote.probe.predict import predict",
            "from cenote.probe.readout import Readout",
            'readout = Readout.from_pretrained("path/to/this/folder")  # or the id of its hub repository',
            "print(predict(readout, backbone, items))",
        ),
        "",
        "or, from a shell, `cenote predict path/to/this/folder INPUT...`.",
        *_backbone(config),
    ]
    if config.classes:
        shown = ", ".join(_cell(name) for name in config.classes[:100])
        more = f" and {len(config.classes) - 100} more" if len(config.classes) > 100 else ""
        lines += ["", "## Classes", "", shown + more]
    if config.table:
        lines += ["", "## The comparison it comes from", "", *_table(config.table)]
    return "\n".join(lines) + "\n"


def embedding_card(config: EmbeddingConfig) -> str:
    """The same of a readout whose unit vectors are compared by their inner products."""
    judged = f"; it was judged by {config.task}: {config.metric} {config.score:.4f}" if config.metric else ""
    lines = [
        *_head(config, f"gives a unit vector, to be compared by inner products{judged}"),
        *_usage(
            config,
            "from cenote.probe import EmbeddingReadout",
            'readout = EmbeddingReadout.from_pretrained("path/to/this/folder")  # or the id of its hub repository',
            "vectors = readout.encode(backbone, items)",
        ),
        "",
        "or, from a shell, `cenote predict path/to/this/folder INPUT... --vectors vectors.npy`.",
        *_backbone(config),
    ]
    return "\n".join(lines) + "\n"


def _head(config: ReadoutConfig | EmbeddingConfig, gives: str) -> list[str]:
    reads = {"class": "the class token", "patches": "the patch tokens", "both": "all tokens"}[config.tokens]
    data = f" on {_cell(config.data)}" if config.data else ""
    return [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in _front_matter(config).items()),
        "---",
        "",
        f"# {_cell(config.pooling)} on {_cell(config.backbone)}",
        "",
        f"A readout of the frozen backbone `{config.backbone}`, trained{data}. It reads {reads} of hidden state(s) "
        f"{', '.join(map(str, config.layers))} and {gives}.",
    ]


def _usage(config: ReadoutConfig | EmbeddingConfig, *code: str) -> list[str]:
    keywords = {**({"revision": config.revision} if config.revision else {}), **config.backbone_options}
    arguments = ", ".join([repr(config.backbone), *(f"{key}={value!r}" for key, value in keywords.items())])
    imports, rest = ([line for line in code if line.startswith("from") is flag] for flag in (True, False))
    load = f"backbone = load_backbone({arguments})"
    lines = ["from cenote.backbones import load_backbone", *imports, "", load, *rest]
    return ["", "## How to use it", "", "```python", *lines, "```"]


def _backbone(config: ReadoutConfig | EmbeddingConfig) -> list[str]:
    fingerprint = config.backbone_fingerprint or "unknown"
    return ["", f"The backbone must be the very one it was trained on (fingerprint `{fingerprint}`)."]


def _front_matter(config: ReadoutConfig | EmbeddingConfig) -> dict[str, Any]:
    kind, _, name = config.backbone.partition(":")
    entries: dict[str, Any] = {"library_name": "cenote", "tags": ["frozen-backbone", "readout", config.pooling]}
    if kind == "hf" and name.count("/") <= 1 and not name.startswith((".", "/")):
        entries["base_model"] = name
    return entries


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first rows as a Markdown table."""
    metric = next((str(row["metric"]) for row in rows if row.get("metric")), "score")
    names = [metric if key == "score" else name for key, name in COLUMNS.items()]
    lines = [_line(names), _line(["---"] * len(names))]
    for row in rows[:TABLE_ROWS]:
        interval = f"{_number(row.get('ci_low'))} to {_number(row.get('ci_high'))}"
        lines.append(_line([interval if key == "ci" else _number(row.get(key)) for key in COLUMNS]))
    if len(rows) > TABLE_ROWS:
        lines += ["", f"and {len(rows) - TABLE_ROWS} more."]
    return [*lines, "", "Readouts of one tie group do not differ significantly from the best of it."]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) else _cell(str(value))


def _cell(text: str) -> str:
    """Text that cannot break a table row or start a new block."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
