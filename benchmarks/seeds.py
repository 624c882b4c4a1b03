"""The same configuration with several seeds: trains what is missing and prints one Markdown table with the spread.

    python benchmarks/seeds.py --config=scenes --seeds=3 --out=runs/seeds [--results=FILE] [--config.key=value ...]

Seed s differs in initialisation, data order and drop path; the scenes are the same. Run again, it goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, collects every results.json, prints the table and writes seeds.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--results", type=Path, help="where the numbers go too, for the page of results")
    arguments, overrides = parser.parse_known_args(argv)
    results = []
    for seed in range(arguments.seeds):
        workdir = arguments.out / f"seed{seed}"
        if not (workdir / "results.json").exists():
            command = [sys.executable, "-m", "sgw_jax", "train", f"--config={arguments.config}", f"--workdir={workdir}"]
            subprocess.run([*command, f"--config.seed={seed}", *overrides], check=True)
        results.append(json.loads((workdir / "results.json").read_text(encoding="utf-8")))
    print(table(results))
    for path in (arguments.out / "seeds.json", arguments.results):
        if path is not None:
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


def table(results: Sequence[dict[str, Any]]) -> str:
    """Headline metrics: mean over the runs and, in brackets, lowest and highest; the references beside them."""
    lines = ["| task | metric | network, mean [lowest, highest] | linear probe | constant |", "|---|---|---|---|---|"]
    for task in results[0]["tasks"]:
        name, metric = task["name"], task["metric"]
        values = [result["metrics"][name][metric] for result in results]
        references = [results[0]["references"][kind][name][metric] for kind in ("linear", "constant")]
        unit = " ".join(filter(None, [metric, task["unit"], "↑" if task["higher_is_better"] else "↓"]))
        spread = f"**{np.mean(values):.3g}** [{min(values):.3g}, {max(values):.3g}]"
        lines.append(f"| {name} | {unit} | {spread} | {references[0]:.3g} | {references[1]:.3g} |")
    for key in ("slot_diversity", "retrieve_entropy", "write_entropy", "readout_cosine", "update_ratio"):
        found = [result["diagnostics"][key] for result in results if result["diagnostics"]]
        if found and all(value is not None for value in found):
            lines.append(f"| | {key} | {np.mean(found):.3f} [{min(found):.3f}, {max(found):.3f}] | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
