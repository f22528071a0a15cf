"""Run reproductions in full and write their evidence pages: python tools/write_evidence.py SLUG... (or --all)."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from cenote.files import write_all
from cenote.reproductions import available, reproduce
from cenote.reproductions.evidence import evidence_page

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("slugs", nargs="*", metavar="SLUG")
    parser.add_argument("--all", action="store_true", help="every system that has a reproduction")
    parser.add_argument("--quick", action="store_true", help="the small version, to try the tool")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "evidence", help="folder of the pages")
    arguments = parser.parse_args()
    slugs = available() if arguments.all else arguments.slugs
    if not slugs:
        parser.error("name at least one system, or --all")
    data = Path(os.environ.get("CENOTE_DATA", ROOT.parent / "shared" / "data"))
    for slug in slugs:
        result = reproduce(
            slug, quick=arguments.quick, seeds=range(arguments.seeds), data_dir=data if data.is_dir() else None
        )
        with tempfile.TemporaryDirectory() as scratch:
            picture = result.plot(Path(scratch) / "figure.png").read_bytes()
        write_all(
            arguments.docs,
            {
                f"{slug}.png": picture,
                f"{slug}.json": json.dumps(result.records(), indent=2, ensure_ascii=False) + "\n",
                f"{slug}.md": evidence_page(result, f"{slug}.png"),
            },
        )
        print(f"{slug}: {result.verdict}; wrote {arguments.docs / slug}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
