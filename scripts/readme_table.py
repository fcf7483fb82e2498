"""Write the committed results of the key-value experiment into README.md, between its two markers.

.venv/bin/python scripts/readme_table.py            # rewrite README.md
.venv/bin/python scripts/readme_table.py --check    # status 1 if README.md is behind the results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from calmlm.experiments.kv_arithmetic.report import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "kv_arithmetic" / "results" / "small.json"
PAGE = "experiments/kv_arithmetic/results/small.md"
START, END = "<!-- table:start -->", "<!-- table:end -->"


def short_table(result: dict[str, Any]) -> str:
    """The table alone, and where the rest is."""
    rows = [line for line in markdown(result).splitlines() if line.startswith("|")]
    caption = (
        f"Exact match in per cent, mean over {len(result['seeds'])} seeds and its 95 % interval; in brackets what the "
        f"slides publish for far larger models. [What was trained on what, and how long it took]({PAGE})."
    )
    return "\n".join([*rows, "", caption])


def with_table(text: str, table: str) -> str:
    """The text with `table` between the markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table.strip()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    if not RESULTS.exists():
        print(f"error: expected results at {RESULTS}, but there are none; run calmlm repro first.", file=sys.stderr)
        return 2
    old = readme.read_text(encoding="utf-8")
    new = with_table(old, short_table(json.loads(RESULTS.read_text(encoding="utf-8"))))
    if arguments == ["--check"]:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
