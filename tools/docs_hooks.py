"""What of the documentation site is made from the code: options of the verbs, a page a family, evidence, navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from cenote import cli
from cenote.attention.registry import list_recipes, recipe_class
from cenote.catalog import FAMILIES, SYSTEMS, System
from cenote.mixing.registry import list_mixers, mixer_class
from cenote.pooling.registry import list_layer_reductions, list_poolings, pooling_class

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"

FAMILY_WORDS = {
    "pooling": "Tokens, of one layer or of all, to one vector.",
    "mixing": "Tokens to tokens: what stands in the place of attention.",
    "vision": "Feature maps: dense answers and finer grids.",
    "attention": "Recipes that make a live transformer attend to less.",
    "visual_tokens": "Recipes that make a vision-language model carry fewer image tokens.",
    "tuning": "Procedures that change weights.",
    "inspection": "Procedures that read a model.",
    "worlds": "Small generated worlds in which a claim can be watched.",
}
REFERENCE = {
    "types": ("types",),
    "backbones": ("backbones.load", "backbones.base", "backbones.huggingface_audio", "backbones.keyword_transformer",
                  "backbones.pyg", "backbones.bidirectional"),
    "data": ("data.load", "data.base", "data.graphs", "data.judged", "data.judged_load"),
    "probe": ("probe.run", "probe.result", "probe.readout", "probe.embedding_readout", "probe.store", "probe.extract",
              "probe.predict", "probe.scale"),
    "attention": ("attention.base", "attention.registry", "attention.plan", "attention.cache", "attention.host",
                  "attention.seer_gate", "attention.sink_dimensions", "integrations.attention_interface"),
    "compress": ("compress.run", "compress.result", "compress.teacher_forced"),
    "tuning": ("tuning.contrastive", "tuning.embedding", "tuning.margin", "tuning.gnn", "tuning.gnn_folds",
               "tuning.accelerated", "tuning.diversity"),
    "inspection": ("inspection.open_set_registry", "inspection.open_set_base", "inspection.open_set",
                   "inspection.open_set_logits", "inspection.open_set_neighbours", "inspection.open_set_vim",
                   "inspection.open_set_ghost", "inspection.open_set_postmax", "inspection.open_set_pareto",
                   "inspection.open_set_head", "inspection.robustness", "inspection.circuits"),
    "mixing": ("mixing.base", "mixing.registry", "mixing.metaformer", "integrations.replace_mixer",
               "mixing.poolformer", "mixing.poolformer_keys", "mixing.halonet", "mixing.tap", "mixing.rvt",
               "mixing.fan", "mixing.regressor"),
    "worlds": ("worlds.base", "worlds.recall", "worlds.copying", "worlds.listops", "worlds.characters",
               "worlds.planted_facts",
               "worlds.models", "worlds.training", "worlds.linear_regression", "worlds.linear_regression_theory",
               "worlds.regression_attention", "worlds.regression_reduction", "worlds.induction",
               "worlds.induction_training", "worlds.induction_theory"),
    "integrations": ("integrations.sentence_transformers", "integrations.nv_embed_model", "integrations.nv_embed_text",
                     "integrations.nv_embed", "integrations.pyg", "integrations.sklearn", "integrations.timm",
                     "integrations.hub", "integrations.ray", "integrations.ponet", "integrations.poolformer",
                     "integrations.deconstructed_qwen2", "integrations.tap", "integrations.attention_capture",
                     "integrations.sklearn_random_features"),
    "operations": ("ops.masked", "ops.statistics", "ops.query_attention", "ops.power", "ops.pyramid",
                   "ops.verification", "ops.retrieval", "ops.open_set", "ops.linear_recurrence", "ops.delta_rule",
                   "ops.ridge_recurrence", "ops.local_regression", "ops.attention_diversity", "ops.corruptions",
                   "ops.attention_indicators", "ops.random_features", "ops.ridge", "ops.circuits",
                   "ops.blocks", "ops.selection", "ops.block_sparse", "ops.gather_attention",
                   "ops.attention_statistics", "ops.attention_sinks"),
    "reproductions": ("reproductions.base", "reproductions.run", "reproductions.all"),
}  # fmt: skip
"""Modules of the reference, page by page."""


def on_config(config: Any) -> Any:
    """Navigation: what lies in docs/ and what is generated."""
    config["nav"] = [
        {"Start": "index.md"},
        {"Verbs": [{f"cenote {verb}": f"verbs/{verb}.md"} for verb in cli.VERBS]},
        {"Guides": [{_title(path): f"guides/{path.name}"} for path in sorted((DOCS / "guides").glob("*.md"))]
         + [{_title(DOCS / name): name} for name in ("scale.md", "results-schema.md") if (DOCS / name).exists()]
         + [{"Add a method": "contributing.md"}]},
        {"Methods": [{family.replace("_", " "): f"families/{family}.md"} for family in FAMILIES]},
        {"Evidence": [{"Verdicts": "evidence/index.md"}, *({s: f"evidence/{s}.md"} for s in evidence())]},
        {"Tables": [{"Speed": "tables/speed.md"}, *({name: f"tables/{name}.md"} for name in tables())]},
        {"Reference": [{room: f"reference/{room}.md"} for room in REFERENCE]},
    ]  # fmt: skip
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """``<!-- options: VERB -->`` to a table of the verb's options."""
    return re.sub(r"<!-- options: ([a-z ]+) -->", lambda match: options_table(match[1]), markdown)


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    made = {f"families/{family}.md": family_page(family) for family in FAMILIES}
    made |= {f"reference/{room}.md": reference_page(room, modules) for room, modules in REFERENCE.items()}
    made["evidence/index.md"] = evidence_index()
    made |= {f"tables/{name}.md": page.read_text() for name, page in tables().items()}
    made["tables/speed.md"] = (RESULTS / "README.md").read_text()
    made["contributing.md"] = contributing()
    return made


def evidence() -> list[str]:
    """Slugs that have an evidence page."""
    return sorted(path.stem for path in (DOCS / "evidence").glob("*.md"))


def tables() -> dict[str, Path]:
    """Pages of readout tables on real data by name."""
    folder = RESULTS / "real_data"
    named = {path.stem: path for path in folder.glob("*.md")} | {p.parent.name: p for p in folder.glob("*/README.md")}
    return dict(sorted(named.items()))


def _title(page: Path) -> str:
    return page.read_text().splitlines()[0].removeprefix("# ").strip()


def family_page(family: str) -> str:
    """Systems of the catalogue with their docstrings, then what is planned."""
    systems = [system for system in SYSTEMS if system.family == family]
    ready, planned = ([s for s in systems if s.planned is flag] for flag in (False, True))
    lines = [f"# {family.replace('_', ' ').capitalize()}", "", FAMILY_WORDS[family], ""]
    shown: set[str] = set()
    for system in ready:
        lines += _system(system)
        shown.add(system.entry_point)
    if family == "pooling":
        lines += _poolings(shown)
    if family == "mixing":
        lines += _mixers(shown)
    if family == "attention":
        lines += _recipes(shown)
    if planned:
        lines += ["## Planned", "", "| system | paper | purpose |", "| --- | --- | --- |"]
        lines += [f"| {s.slug} | [{s.title}]({s.url}), {s.year} | {s.purpose} |" for s in planned]
    return "\n".join(lines) + "\n"


def _system(system: System) -> list[str]:
    proof = f" Measured claims: [evidence](../evidence/{system.slug}.md)." if system.slug in evidence() else ""
    return [
        f"## {system.slug}",
        "",
        f"[{system.title}]({system.url}), {system.year}. {system.purpose} Hosts: {'; '.join(system.hosts)}.{proof}",
        "",
        f"::: {system.entry_point.replace(':', '.')}",
        "",
    ]


def _poolings(shown: set[str]) -> list[str]:
    """The readouts that are no system of their own, and the layer reductions."""
    lines = ["## Readouts beside them", "", "Each by its name in `create_pooling`, alone or behind a layer reduction:"]
    lines += [f"`{'`, `'.join(list_layer_reductions())}`.", ""]
    for name in list_poolings():
        cls = pooling_class(name)
        if f"{cls.__module__}:{cls.__name__}" not in shown:
            lines += [f"::: {cls.__module__}.{cls.__name__}", ""]
    return [*lines, "::: cenote.pooling.layers", ""]


def _mixers(shown: set[str]) -> list[str]:
    """The interface, the skeleton, and the mixers that are no system of their own."""
    lines = ["## Mixers by name", "", f"For `create_mixer` and patterns: `{'`, `'.join(list_mixers())}`.", ""]
    for name in list_mixers():
        cls = mixer_class(name)
        entry = f"{cls.__module__}:{cls.__name__}"
        if entry not in shown:
            lines += [f"::: {entry.replace(':', '.')}", ""]
            shown.add(entry)
    return lines


def _recipes(shown: set[str]) -> list[str]:
    """The recipes that are no system of their own."""
    lines = ["## Recipes by name", "", f"For `create_recipe`: `{'`, `'.join(list_recipes())}`.", ""]
    for name in list_recipes():
        cls = recipe_class(name)
        entry = f"{cls.__module__}:{cls.__name__}"
        if entry not in shown:
            lines += [f"::: {entry.replace(':', '.')}", ""]
    return lines


def reference_page(room: str, modules: tuple[str, ...]) -> str:
    """Public names of a room's main modules; those that do not exist yet are left out."""
    there = [m for m in modules if (ROOT / "src" / "cenote" / f"{m.replace('.', '/')}.py").exists()]
    return "\n".join([f"# {room.capitalize()}", "", *(f"## {m}\n\n::: cenote.{m}\n" for m in there)])


def evidence_index() -> str:
    """Every page with its verdict."""
    lines = [
        "# Evidence",
        "",
        "Each page re-runs a paper's claims on one machine: what was expected, what was measured, and a verdict that "
        "may be negative. `cenote reproduce SLUG` runs them again.",
        "",
        "| system | claim | verdict |",
        "| --- | --- | --- |",
    ]
    for slug in evidence():
        text = (DOCS / "evidence" / f"{slug}.md").read_text()
        claim, verdict = (re.search(rf"\*\*{word}[.:] ?(?:\*\* )?(.+)", text) for word in ("Claim", "Verdict"))
        said = verdict[1].strip("*. ") if verdict else "-"
        lines.append(f"| [{slug}]({slug}.md) | {claim[1].strip('* ') if claim else '-'} | {said} |")
    return "\n".join(lines) + "\n"


def contributing() -> str:
    """CONTRIBUTING.md, links into the repository as plain words."""
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", (ROOT / "CONTRIBUTING.md").read_text())


def options_table(verb: str) -> str:
    """Arguments and options of a verb, as ``--help`` has them."""
    command: Any = typer.main.get_command(cli.load_verb(verb.split()[0]))
    for name in verb.split()[1:]:
        command = command.commands[name]
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        optional = parameter.param_type_name == "option"
        flags = (*parameter.opts, *parameter.secondary_opts)
        name = f"`{', '.join(flags) if optional else (parameter.metavar or parameter.name).upper()}`"
        default = parameter.default
        shown = "" if default is None or callable(default) or default is False else f"`{default}`"
        lines.append(f"| {name} | {shown} | {(parameter.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
