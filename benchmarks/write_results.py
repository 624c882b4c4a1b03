"""The pages of results: every table and every number of them comes from a file of benchmarks/results.

    python benchmarks/write_results.py

docs/accuracy.md, claims.md, cost.md and exchange.md are the templates of benchmarks/pages, filled by the table
functions of the scripts that measured. A test compares the pages with what this script would write, so that neither is
edited alone.
"""

import sys
from pathlib import Path
from typing import Any

import jinja2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, where this runs as a script

from benchmarks.claims import comparison, elsewhere, noise, noise_trained, real, seeds, stability
from benchmarks.measure import Results
from benchmarks.speed import (
    backbone_speed,
    chunked_attention,
    export,
    finetuning,
    full_size,
    interaction_cost,
    kem_products,
    objective_cost,
    products,
    pytorch,
    where_time_goes,
    whole_images,
)
from sgw_jax.data_pipelines.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "pages"
PAGES = {path.name.split(".")[0]: ROOT / "docs" / path.stem for path in sorted(TEMPLATES.glob("*.md.jinja"))}


def load(name: str) -> Any:
    """A file of benchmarks/results."""
    return Results(name).load()


def render(name: str) -> str:
    """One of the pages."""
    folder = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=folder, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    modules = (
        chunked_attention,
        backbone_speed,
        comparison,
        elsewhere,
        export,
        finetuning,
        full_size,
        interaction_cost,
        kem_products,
        noise,
        noise_trained,
        objective_cost,
        products,
        pytorch,
        real,
        seeds,
        stability,
        where_time_goes,
        whole_images,
    )
    scripts = {module.__name__.rpartition(".")[2]: module for module in modules}
    environment.filters["lines"] = "\n".join
    return environment.get_template(f"{name}.md.jinja").render(load=load, **scripts)


if __name__ == "__main__":
    for page, path in PAGES.items():
        write_atomically(path, render(page))
