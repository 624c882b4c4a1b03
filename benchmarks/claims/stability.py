"""How stable the slots' selection of tokens is: KEM, sKEM and what is left of sKEM without its frame.

    python benchmarks/claims/stability.py --out=runs/compare [--seeds=3] [--steps=150]

Every variant goes on from one trunk (that of compare.py, trained if it is not there) with the same data in the same
order, and is looked at three times on the way, on test images:

overlap   Jaccard overlap (intersection / union) of the tokens that a slot keeps for an image and for a changed copy of
          it: Gaussian noise, blur, a brighter image, a quarter of it covered; and before and after 50 steps of training
change    of the module's update under the same change, relative to the update
between   overlap between different images: a selection that ignores its input is stable under anything
NC1..NC4  of semseg's features where they enter the interaction; NC3 and NC4 of a least-squares classifier on them

Variants: KEM; sKEM; the controls of a projection (f / |f| alone, a random orthonormal frame of the same rank, a learned
one); KEM and sKEM with the dot-regression loss that pulls semseg's features to the vertices. Writes
benchmarks/results/stability.json and prints a table; killed and run again, it goes on.
"""

import argparse
import io
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims.comparison import shown, spread
from benchmarks.claims.runs import Method, Runs, begin
from benchmarks.measure import DASH, Results, select
from sgw_jax.etf.neural_collapse import class_means, collapse_sums, collapse_values, disagreement_sums
from sgw_jax.evaluation.selection import jaccard, selection_between_images
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.heads import TaskStem
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.state import restored_state
from sgw_jax.train import train

LOOKS = 3  # evenly over the steps
IMAGES = 64
DOT = {"dot_regression": "0.1"}
PROJECTION = "interactions.skem.projection"
VARIANTS: dict[str, Method] = {
    "kem": ("kem", {}),
    "skem": ("skem", {}),
    "direction": ("skem", {PROJECTION: "direction"}),
    "orthonormal": ("skem", {PROJECTION: "orthonormal"}),
    "learned": ("skem", {PROJECTION: "learned"}),
    "kem + dot": ("kem", DOT),
    "skem + dot": ("skem", DOT),
}
CHANGES = ("noise 0.1", "noise 0.3", "blur", "brighter", "covered")


def changed(image: jax.Array, how: str) -> jax.Array:
    """A normalised image (batch, height, width, 3), changed; noise in units of its standard deviation."""
    if how.startswith("noise"):
        return image + float(how.split()[1]) * jax.random.normal(jax.random.key(0), image.shape)
    if how == "blur":
        weights = jnp.asarray([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        along = lambda x, axis: jnp.apply_along_axis(lambda line: jnp.convolve(line, weights, "same"), axis, x)  # noqa: E731
        return along(along(image, 1), 2)
    if how == "brighter":
        return image + 0.5
    height, width = image.shape[1] // 2, image.shape[2] // 2
    return image.at[:, height // 2 : height // 2 + height, width // 2 : width // 2 + width].set(0.0)


def look(
    experiment: Experiment, variables: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of one state, and the tokens that it keeps (images, heads, slots, k)."""

    @jax.jit
    def observe(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, state = experiment.model.apply(
            variables,
            image,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, TaskStem),
        )
        recorded = state["intermediates"]["interaction"]
        stem = state["intermediates"]["stem_semseg"]["__call__"][0]
        return recorded["retrieve_index"][0], recorded["readout"][0], stem

    def all_of(how: str | None) -> list[np.ndarray]:
        parts = [
            observe(variables, part if how is None else changed(part, how))
            for part in (jnp.asarray(images[i : i + 8]) for i in range(0, len(images), 8))
        ]
        return [np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(3)]

    index, readout, features = all_of(None)
    numbers: dict[str, Any] = {}
    for how in CHANGES:
        other, moved, _ = all_of(how)
        numbers[f"overlap, {how}"] = float(jnp.mean(jaccard(index, other)))
        numbers[f"change, {how}"] = float(np.linalg.norm(moved - readout) / np.linalg.norm(readout))
    total, pairs = selection_between_images(jnp.asarray(index))
    numbers["between images"] = float(total) / int(pairs)
    return numbers | collapse(features, labels, experiment.tasks[0].num_classes), index


def collapse(features: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float | None]:
    """NC1..NC4 of cells, each with the label at its centre."""
    rows, columns = (
        (2 * np.arange(n) + 1) * size // (2 * n) for n, size in zip(features.shape[1:3], labels.shape[1:3], strict=True)
    )
    labels = labels[:, rows[:, None], columns]
    means = class_means(collapse_sums(features, labels, classes))
    sums = collapse_sums(features, labels, classes, centres=means)
    flat, known = features.reshape(-1, features.shape[-1]).astype(np.float64), labels.reshape(-1)
    centre = flat[known < classes].mean(axis=0)
    kept = known < classes
    target = np.eye(classes)[known[kept]]
    classifier, *_ = np.linalg.lstsq(flat[kept] - centre, target - target.mean(axis=0), rcond=None)
    decided = np.argmax((flat - centre) @ classifier + target.mean(axis=0), axis=-1).reshape(labels.shape)
    differ = disagreement_sums(features, labels, decided.astype(np.int32), means)
    return collapse_values(sums, classifier.T, differ)


def measure(runs: Runs, name: str, seed: int) -> list[dict[str, Any]]:
    """Trains one variant from the trunk and looks at it on the way."""
    interaction, options = VARIANTS[name]
    every = runs.steps // LOOKS
    options = {**options, "checkpoint_every": str(every), "eval_every": str(every), "keep": str(LOOKS + 1)}
    experiment = runs.build((interaction, options), seed)
    workdir = runs.out / "stability" / name.replace(" ", "") / f"seed{seed}"
    trained = train(experiment, workdir, Console(file=io.StringIO()), init_from=runs.trunk)
    if trained.stopped_by is not None:
        raise SystemExit(f"Stopped by {trained.stopped_by.name}; the same command goes on.")
    with experiment.data.evaluation("test", "network") as batches:
        count = -(-IMAGES // experiment.settings.batch_size)
        found = list(itertools.islice(batches, count))
    images, labels = (
        np.concatenate([np.asarray(batch[key]) for batch in found])[:IMAGES] for key in ("image", "semseg")
    )
    rows: list[dict[str, Any]] = []
    before = None
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        for step in range(every, every * LOOKS + 1, every):
            state = restored_state(experiment, checkpoints, step)
            numbers, index = look(experiment, state.variables, images, labels)
            if before is not None:
                numbers[f"overlap, {every} steps"] = float(jnp.mean(jaccard(before, index)))
            before = index
            rows.append({"variant": name, "seed": seed, "step": step, **numbers})
    shutil.rmtree(workdir)  # its checkpoints are large, and its numbers known
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: mean and standard deviation over the seeds, after the last step."""
    last = max(row["step"] for row in rows)
    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    keys = [key for key in rows[-1] if key not in ("variant", "seed", "step")]
    lines = ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for key in keys:
        cells = []
        for name in names:
            values = [row[key] for row in select(rows, variant=name, step=last)]
            cells.append(DASH if None in values else shown(spread(values)))  # None: not defined for these features
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--trunk_steps", type=int, default=500)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    parser.add_argument("--output", type=Path)
    arguments, overrides = parser.parse_known_args()
    console = begin(arguments.cache_dir)
    trunk = arguments.out / "trunk"
    runs = Runs(arguments.config, overrides, arguments.steps, arguments.out, arguments.cache_dir, trunk)
    if not (trunk / "checkpoints").exists():
        experiment = runs.build(("none", {}), seed=1000, steps=arguments.trunk_steps)
        train(experiment, trunk, Console(file=io.StringIO()))
    results = Results("stability", arguments.output, steps=arguments.steps, images=IMAGES)
    known = results.rows()
    for seed, name in itertools.product(range(arguments.seeds), arguments.variants):
        if any((row["variant"], row["seed"]) == (name, seed) for row in known):
            continue
        known = results.add(measure(runs, name, seed), "variant", "seed", "step")
        console.print(f"{name}, seed {seed}: done")
    console.print("\n".join(table(known)), soft_wrap=True)


if __name__ == "__main__":
    main()
