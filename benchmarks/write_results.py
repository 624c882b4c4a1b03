"""docs/results.md from the measurements: every table and every number of it comes from a file of benchmarks/results.

    python benchmarks/write_results.py

The page is benchmarks/results.md.jinja, filled by the table functions of the scripts that measured. A test compares the
page with what this script would write, so that neither is edited alone.
"""

from pathlib import Path
from typing import Any

import attention
import backbones
import comparison
import full_size
import interactions
import jinja2
import kem_products
import measure
import noise
import noise_trained
import objectives
import products
import pytorch
import seeds
import stability
import where_time_goes

from sgw_jax.run.logs import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"


def load(name: str) -> Any:
    """A file of benchmarks/results."""
    return measure.load(ROOT / "benchmarks" / "results" / f"{name}.json")


def render() -> str:
    """The page."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=folder, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    modules = (
        attention,
        backbones,
        comparison,
        full_size,
        interactions,
        kem_products,
        noise,
        noise_trained,
        objectives,
        products,
        pytorch,
        seeds,
        stability,
        where_time_goes,
    )
    scripts = {module.__name__: module for module in modules}
    environment.filters["lines"] = "\n".join
    return environment.get_template("results.md.jinja").render(load=load, **scripts)


if __name__ == "__main__":
    write_atomically(PAGE, render())
