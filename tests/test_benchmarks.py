"""The page of benchmark tables, from made-up outcomes."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("run_all", Path(__file__).parents[1] / "benchmarks" / "run_all.py")
run_all = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_all)


def test_page_shows_ratio_goal_and_rows():
    page = run_all.render(
        {
            "ep": [
                {
                    "name": "EP",
                    "peer": "official | order",
                    "ratio": 9.26,
                    "goal": 8,
                    "rows": [{"N": 196, "ms": 1.5}, {"N": 49}],
                }
            ],
            "fold": [{"name": "folded", "peer": "plain", "ratio": 5.0, "goal": 6, "rows": []}],
            "free": [{"name": "free", "peer": "none", "ratio": None, "goal": None, "rows": []}],
        }
    )
    assert "| EP | official \\| order | 9.26 | 8 | yes |" in page
    assert "| folded | plain | 5 | 6 | no |" in page
    assert "| free | none | - | - | - |" in page
    assert "| N | ms |\n| --- | --- |\n| 196 | 1.5 |\n| 49 |  |" in page


def test_results_on_file_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "A", "peer": "p", "ratio": 2.0, "goal": 1, "rows": []}')
    (tmp_path / "b.json").write_text('[{"name": "B"}, {"name": "C"}]')
    kept = run_all.read(tmp_path, dict.fromkeys(("a", "b", "c"), Path()))
    assert [each["name"] for several in kept.values() for each in several] == ["A", "B", "C"]


def test_benchmarks_are_the_files_that_run_as_scripts(tmp_path):
    (tmp_path / "helper.py").write_text("x = 1\n")
    for name in ("fast.py", "run_all.py"):
        (tmp_path / name).write_text('if __name__ == "__main__":\n    pass\n')
    assert run_all.scripts(tmp_path) == [tmp_path / "fast.py"]
