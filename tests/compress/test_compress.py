"""The whole comparison on a small input: rows, files, resuming, what is kept."""

import dataclasses
import functools
import json
import math

import pandas as pd
import pytest
import torch

import cenote.compress.run as run
from attention_hosts import decoder
from cenote.attention import Recipe, Window
from cenote.backbones.embedded_language import load_embedded_language
from cenote.compress import CompressResult, Row, compress
from cenote.compress.cost import measure_cost
from cenote.compress.methods import Method, ReadyDense
from cenote.compress.result import DENSE, ranked, row_from_json, row_json
from cenote.tuning import load_quantized

SMALL = {"context": 160, "steps": 4, "documents": 1, "depths": (0.0, 1.0)}
SCHEMA = {
    "method", "quality", "quality_name", "prefill_ms", "decode_ms_per_token", "peak_bytes", "cache_bytes", "density",
}  # fmt: skip


@functools.cache
def tiny():
    """A random model that reads what the embedded tokenizer writes."""
    model = decoder(vocab_size=1024, num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
    return model, load_embedded_language()[1]


def compare(**options):
    model, tokenizer = tiny()
    return compress(**{"model": model, "tokenizer": tokenizer, **SMALL, **options})


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compress") / "out"
    methods = ["window", "h2o", "rtn", "window(budget=400)"]
    return compare(methods=methods, budget=(0.25, 0.5), keep="window 0.5", out=out)


def test_rows_say_what_was_done(compared):
    rows = {row.name: row for row in compared.rows}
    assert compared.rows[0].method == DENSE
    assert set(rows) == {
        "dense", "window 0.25", "window 0.5", "h2o 0.25", "h2o 0.5", "rtn 0.25", "rtn 0.5", "window(budget=400)",
    }  # fmt: skip
    dense = rows["dense"]
    assert dense.quality == dense.agreement == 1.0
    assert dense.kl == 0.0
    assert dense.density == pytest.approx(1.0, abs=0.02)
    assert rows["window 0.25"].density == pytest.approx(0.25, abs=0.01)
    assert rows["window 0.25"].spec == "window(budget=40)"
    wide = rows["window(budget=400)"]  # room for everything: the dense model, through other code
    assert (wide.perplexity, wide.retrieval) == pytest.approx((dense.perplexity, dense.retrieval), rel=1e-4)
    assert wide.kl < 1e-5
    assert rows["h2o 0.25"].cache_bytes < rows["h2o 0.5"].cache_bytes < dense.cache_bytes
    assert rows["rtn 0.25"].weight_bytes < rows["rtn 0.5"].weight_bytes < dense.weight_bytes
    assert rows["rtn 0.5"].kl < rows["rtn 0.25"].kl
    assert all(row.peak_bytes > dense.weight_bytes for row in rows.values())
    assert all(row.prefill_ms > 0 and row.decode_ms_per_token > 0 for row in rows.values())


def test_files_hold_the_table_and_the_kept_recipe(compared):
    folder = compared.folder
    read = json.loads((folder / "results.json").read_text())
    assert [row["method"] for row in read] == [row.method for row in compared.rows]
    assert set(read[0]) >= SCHEMA
    assert "NaN" not in (folder / "results.json").read_text()
    table = pd.read_parquet(folder / "results.parquet")
    assert list(table["quality"]) == [row.quality for row in compared.rows]
    assert len(pd.read_csv(folder / "results.csv")) == len(read)
    assert "retrieval@160" in table
    assert json.loads((folder / "summary.json").read_text())["kept"] == compared.kept == "window 0.5"
    recipe = Recipe.from_pretrained(folder / "recipe")
    assert recipe == Window(budget=80)
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    assert compared.plot().axes[0].get_ylabel().startswith("quality")


def test_finished_rows_are_not_measured_again(compared, monkeypatch):
    asked = []
    real = run._Meter.row

    def row(self, name, budget, ready):
        asked.append((name, budget))
        return real(self, name, budget, ready)

    monkeypatch.setattr(run._Meter, "row", row)
    again = compare(methods=["window", "h2o"], budget=(0.25, 0.75), out=compared.folder)
    assert asked == [("window", 0.75), ("h2o", 0.75)]
    before = {each.name: each for each in compared.rows}
    assert {r.name: r.kl for r in again.rows if r.name in before} == {
        name: before[name].kl for name in ("dense", "window 0.25", "h2o 0.25")
    }
    asked.clear()
    compare(methods=["window"], budget=0.25, out=compared.folder, steps=5)
    assert asked == [("dense", None), ("window", 0.25)]  # other inputs: nothing of the folder counts


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    real = Method.ready

    def fail(self, *args):
        if self.name == "h2o":
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Method, "ready", fail)
    with pytest.raises(KeyboardInterrupt):
        compare(methods=["window", "h2o"], budget=0.25, out=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 2
    monkeypatch.setattr(Method, "ready", real)
    result = compare(methods=["window", "h2o"], budget=0.25, out=tmp_path / "out")
    assert len(result.rows) == 3


def test_a_kept_weight_method_gives_its_model(tmp_path):
    result = compare(methods=["rtn"], budget=0.25, keep="rtn 0.25", out=tmp_path / "out")
    model = load_quantized(tmp_path / "out" / "model")
    assert not (tmp_path / "out" / "recipe").exists()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert result.kept == "rtn 0.25"


def test_under_all_what_does_not_fit_is_listed(monkeypatch):
    monkeypatch.setattr("cenote.compress.methods.list_recipes", lambda: ["visual_attention_redistribution", "hylra"])
    monkeypatch.setattr("cenote.compress.methods.WEIGHTS", ())

    def broken(self, model, batches):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("cenote.attention.hylra.HyLRA.calibrate", broken)
    result = compare(budget=0.25)
    assert dict(result.refused) == {
        "hylra": "RuntimeError: out of luck",
        "visual_attention_redistribution": "it moves attention between the tokens of an image, and the inputs are text",
    }
    assert [row.method for row in result.rows] == [DENSE]
    assert result.kept is None
    with pytest.raises(ValueError, match="tokens of an image"):
        compare(methods=["visual_attention_redistribution"], budget=0.25)


def made_up(method, quality, time, budget=0.25):
    return Row(
        method=method, spec=method, budget=budget, quality=quality, quality_name="share", perplexity=10.0,
        agreement=0.9, kl=0.1, retrieval=0.5, retrieval_grid={}, prefill_ms=1.0, prefill_ms_spread=0.1,
        decode_ms_per_token=1.0, decode_ms_spread=0.1, dense_prefill_ms=1.0, dense_decode_ms=1.0, request_ms=time,
        peak_bytes=1, cache_bytes=1, weight_bytes=1, density=0.5, prefill_density=1.0, calibration_seconds=0.0,
    )  # fmt: skip


def test_the_fastest_recipe_within_the_loss_is_chosen():
    rows = [
        made_up(DENSE, 1.0, 10, None), made_up("slow", 0.99, 8), made_up("fast", 0.96, 5), made_up("poor", 0.5, 1),
        made_up("rtn", 0.97, 2),
    ]  # fmt: skip
    table = ranked(rows)
    assert [row.method for row in table] == [DENSE, "slow", "rtn", "fast", "poor"]
    assert {row.method for row in table if row.front} == {DENSE, "slow", "fast", "poor"}
    assert run._choose(table, 0.05) == ("fast 0.25", "")
    assert run._choose(table, 0.02)[0] == "slow 0.25"
    name, why = run._choose(table, 0.001)
    assert name == "slow 0.25"
    assert "comes nearest" in why
    assert run._choose(table[:1], 0.05)[0] is None


def test_a_row_survives_its_file():
    row = dataclasses.replace(made_up("quest", math.nan, 3.0), retrieval=None)
    back = row_from_json(json.loads(json.dumps(row_json(row), allow_nan=False)))
    assert math.isnan(back.quality)
    assert dataclasses.replace(back, quality=0.0) == dataclasses.replace(row, quality=0.0)
    result = CompressResult((made_up(DENSE, 1.0, 1, None),), {})
    assert result.frame()["method"].tolist() == [DENSE]


def test_peak_memory_counts_what_a_prompt_needs():
    """Attention maps made in full are the largest thing there is; the cache comes on top."""
    model = decoder(vocab_size=1024, num_hidden_layers=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(1000, (1, 300))
    ready = ReadyDense(model)
    cost = measure_cost(ready, ready, ids, steps=4)
    one_map = 6 * 293 * 293 * 4
    assert one_map < cost.working_bytes < 6 * one_map
    assert cost.cache_bytes == 2 * 2 * 297 * 8 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "above 0 and below 1"), ({"budget": (0.5, 1.5)}, "above 0 and below 1"),
        ({"context": 30}, "context must lie between"), ({"context": 5000}, "context must lie between"),
        ({"steps": 0}, "steps must be at least 1"), ({"loss": 1.0}, "loss < 1"), ({"depths": (2.0,)}, "depths"),
        ({"keep": "quest 0.5"}, "keep names one of"), ({"methods": ["windw"]}, "did you mean window"),
        ({"model": "no/such/model"}, "cannot load"), ({"text": "x", "data": "y"}, "not both"),
        ({"model": "embedded", "dtype": "int8"}, "dtype must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare(**{"methods": ["window"], "budget": 0.25, **options})


def test_texts_too_short_and_folders_of_others_are_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    with pytest.raises(ValueError, match="give a longer text or a smaller context"):
        compare(methods=["window"], text=short)
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        compare(methods=["window"], text=short)
    with pytest.raises(ValueError, match="holds no comparison"):
        compare(methods=["window"], out=tmp_path)
    model, _ = tiny()
    with pytest.raises(ValueError, match="needs its tokenizer"):
        compress(model, methods=["window"], **SMALL)
