"""Make docs/results.md, its plots and the README's headline from the records.

    python experiments/results.py            # write them
    python experiments/results.py --check    # only say whether they agree with the records (exit status 1 if not)
    python experiments/results.py --size nano --records runs/experiments/records --out runs/experiments/results.md

Needs no torch, and no data or model either: the records are enough.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ablation
import quality

from blockffn.experiments.page import make_page, stale, write_page
from blockffn.experiments.suite import PUBLISHED_SIZE

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "experiments" / "records")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results.md", help="plots lie beside it, in images/"
    )
    parser.add_argument("--size", default=PUBLISHED_SIZE)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    out, images = given.out.resolve(), given.out.resolve().parent / "images"
    readme = ROOT / "README.md" if out == ROOT / "docs" / "results.md" else None
    suites = quality.experiments(given.size), ablation.experiments(given.size)
    page = make_page(given.records.resolve(), *suites, out=out, images=images)
    if given.check:
        problems = stale(page, out=out, images=images, readme=readme)
        print("\n".join([*problems, "run: python experiments/results.py"] if problems else ["up to date"]))
        return 1 if problems else 0
    write_page(page, out=out, images=images, readme=readme)
    print(f"{out}, {len(page.plots)} plots in {images}")
    print(page.headline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
