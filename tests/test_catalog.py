"""The catalogue is complete, and what it says is implemented is there, documented and tested."""

import re
from pathlib import Path

import pytest

from cenote.catalog import FAMILIES, SYSTEMS, System, find

TESTS = Path(__file__).parent
NO_GOLDEN: dict[str, str] = {}  # slug: why no official output can be had

DONE = [system for system in SYSTEMS if not system.planned]


def test_lists_38_systems_once():
    assert len(SYSTEMS) == 38
    assert [system.slug for system in SYSTEMS] == sorted({system.slug for system in SYSTEMS})
    assert len({system.arxiv for system in SYSTEMS}) == 38
    assert len({system.title for system in SYSTEMS}) == 38


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.slug)
def test_entry_is_well_formed(system):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv)
    assert system.year == 2000 + int(system.arxiv[:2]), "the year of the first public version is in the arXiv id"
    assert system.family in FAMILIES
    assert system.hosts
    assert all(system.hosts)
    assert system.purpose.endswith(".")
    assert len(system.purpose) <= 110
    assert system.planned or re.fullmatch(r"cenote(\.\w+)+:\w+", system.entry_point)


def test_the_systems_of_the_first_release_are_implemented():
    assert {"efficient-probing", "ggem", "spp", "nv-embed", "multi-layer-pooling"} <= {system.slug for system in DONE}


@pytest.mark.parametrize("system", DONE, ids=lambda system: system.slug)
def test_entry_point_resolves_and_names_its_paper(system):
    docstring = " ".join((system.load().__doc__ or "").split()).lower()
    assert system.arxiv in docstring or system.title.lower() in docstring


@pytest.mark.parametrize("system", DONE, ids=lambda system: system.slug)
def test_is_tested(system):
    module, _, name = system.entry_point.partition(":")
    mention = re.compile(rf"\b({name}|{module.rpartition('.')[2]})\b")
    files = [path for path in TESTS.rglob("test_*.py") if path.name != "test_catalog.py"]
    assert any(mention.search(path.read_text()) for path in files), f"no test file mentions {name}"


@pytest.mark.parametrize("system", DONE, ids=lambda system: system.slug)
def test_has_a_golden_or_a_reason_for_none(system):
    files = list((TESTS / "golden" / "data").glob(f"{system.slug}*.safetensors"))
    assert files or NO_GOLDEN.get(system.slug), f"no golden file {system.slug}*.safetensors and no reason in NO_GOLDEN"


def test_every_reproduction_belongs_to_a_system():
    folder = TESTS.parent / "src" / "cenote" / "reproductions"
    known = {system.slug.replace("-", "_") for system in SYSTEMS}
    offered = {path.stem for path in folder.glob("*.py") if "\nREPRODUCTION = " in path.read_text()}
    assert offered
    assert offered <= known


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("effcient-probing", "efficient-probing"),
        ("multi_layer_pooling", "multi-layer-pooling"),
        ("seer", "seer-attention"),
    ],
)
def test_unknown_slug_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=nearest):
        find(wrong)


def test_planned_system_does_not_load():
    with pytest.raises(ValueError, match="planned"):
        System("x", "X", 2025, "2501.00001", "pooling", "Nothing.").load()
