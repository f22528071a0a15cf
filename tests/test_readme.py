"""What README and CONTRIBUTING show is true: code blocks run, commands exist, tables are complete."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
import typer

from attention_hosts import decoder, padded
from cenote import cli
from cenote.attention import create_recipe, list_recipes
from cenote.attention import registry as recipes
from cenote.attention.host import cache_argument, output_cache
from cenote.catalog import find
from cenote.mixing import create_mixer, list_mixers
from cenote.mixing import registry as mixers
from cenote.pooling import create_pooling, list_layer_reductions, list_poolings, registry
from cenote.reproductions.base import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(page):
    """The Python code blocks of a page, unindented."""
    for indent, code in re.findall(r"^( *)```python\n(.*?)^\1```", page, re.DOTALL | re.MULTILINE):
        yield "\n".join(line.removeprefix(indent) for line in code.splitlines())


@pytest.mark.parametrize("code", list(blocks(README)), ids=lambda code: code.splitlines()[0])
def test_readme_code_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CENOTE_CACHE", str(tmp_path / "cache"))
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("page", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(page):
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", page, re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^ {4}(cenote .+)$", README, re.MULTILINE))))
def test_command_lines_are_understood(line):
    """Verb, options and names of every shown command exist (nothing is run)."""
    verb, *args = shlex.split(line)[1:]
    target = cli.load_verb(verb)
    options = {name for parameter in typer.main.get_command(target).params for name in parameter.opts}
    assert {arg for arg in args if arg.startswith("--")} <= options
    if verb in ("show", "reproduce"):
        find(args[0])


def test_verbs_in_the_table_are_the_verbs():
    assert set(re.findall(r"`cenote ([a-z]+)`", README)) == set(cli.VERBS)


def test_table_of_readouts_is_complete():
    section = README.partition("## Readouts")[2].partition("\n## ")[0]
    named = {name for row in section.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert named - set(registry._ALIASES) == set(list_poolings())
    assert set(re.findall(r"`(\w+_layers?)`", section)) == set(list_layer_reductions())


def test_table_of_mixers_is_complete():
    section = README.partition("## Mixers")[2].partition("\n## ")[0]
    named = {name for row in section.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert named == set(list_mixers())


def test_table_of_recipes_is_complete():
    section = README.partition("## Recipes")[2].partition("\n## ")[0]
    named = {name for row in section.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert named == set(list_recipes())


def test_files_that_are_named_exist():
    for page in (README, CONTRIBUTING):
        for path in re.findall(r"\]\((?!https?:)([\w./-]+)\)", page):
            assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./]+)`", CONTRIBUTING):
        assert "your_method" in path or (ROOT / path).exists(), path


def test_contributing_recipe_works(monkeypatch):
    """The example readout, registered as told, and its example reproduction."""
    method, reproduction, *_ = blocks(CONTRIBUTING)
    module = types.ModuleType("cenote.pooling.your_method")
    exec(compile(method, "your_method.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line = re.search(r'"(root_mean_square)": "([\w:]+)"', CONTRIBUTING)
    monkeypatch.setitem(registry._FILES, line[1], line[2])
    assert create_pooling("root_mean_square", dim=4).name in list_poolings()
    scope = {}
    exec(compile(reproduction, "reproductions/your_method.py", "exec"), scope)
    (found,) = scope["REPRODUCTION"].run(Settings())
    assert found.verdict == "holds"
    assert len(found.values) == 3


def test_contributing_mixer_works(monkeypatch):
    """The example mixer, registered as told: the running mean, whole and in stretches, with padding in between."""
    *_, code, _ = blocks(CONTRIBUTING)
    module = types.ModuleType("cenote.mixing.your_method")
    exec(compile(code, "your_method.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(mixers._FILES, "running_mean", "your_method:RunningMean")
    mix = create_mixer("running_mean", dim=3)
    tokens = torch.arange(18.0).view(2, 3, 3)
    expected = tokens.cumsum(1) / torch.arange(1, 4)[None, :, None]
    torch.testing.assert_close(mix(tokens), expected)
    first, state = mix.chunk(tokens[:, :2])
    torch.testing.assert_close(torch.cat([first, mix.chunk(tokens[:, 2:], state)[0]], dim=1), expected)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    torch.testing.assert_close(mix(tokens, mask)[0, 2], (tokens[0, 0] + tokens[0, 2]) / 2)


def test_contributing_recipe_for_attention_works(monkeypatch):
    """The example recipe, registered as told: decoding equals attention under the mask that it stands for."""
    *_, code = blocks(CONTRIBUTING)
    module = types.ModuleType("cenote.attention.your_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "your_method.py", "exec"), module.__dict__)
    monkeypatch.setitem(recipes._FILES, "every_other", "your_method:EveryOther")
    model = decoder("llama", num_hidden_layers=1)
    ids, mask = padded((12, 9))
    with create_recipe("every_other")(model), torch.no_grad():
        out = model(ids[:, :-1], attention_mask=mask[:, :-1])
        step = model(ids[:, -1:], attention_mask=mask, **cache_argument(output_cache(out))).logits
    seen = torch.ones(12, 12, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    seen[:, :, -1, 0:11:2] = False  # the last query sees every other key, counted from its own
    seen[1, :, :, :3] = False
    seen |= torch.eye(12, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids, attention_mask=seen).logits[:, -1:]  # rotary positions count differences only
    torch.testing.assert_close(step, expected, atol=1e-4, rtol=1e-4)
