"""Does exchange between tasks pay? Four hypotheses about where it could, each a comparison by compare.py.

    python benchmarks/claims/exchange.py --out=runs/exchange [--only swin convnext labels ...] [--seeds=5]

1. swin, convnext, vit: where the backbone is local. A ViT sees the whole image in every block; windows of 4 x 4 tokens
   and depthwise convolutions do not, so that what slots gather over the image may be worth more. A million parameters
   each.
2. pairs: where exchange lives. Slots gather from each task by itself, exchange, and are read through gates of pairs.
3. labels: what only another task knows. Depth has labels in 5 % of the training images, semantic segmentation in half.
   blind: depth's features tell where they lie and nothing of the image, so that all it knows of it came by exchange; a
   module that works at all must succeed here. sighted: the same budget with all features, to compare with.
4. noise6, noise8, noise16: six tasks beside 0, 2 and 10 that have nothing to do with the image.

The plan, written before the runs. Scenes, six tasks, from random parameters: the default budget of 1,000 steps for swin
and vit, half of it for the others. Every method tries the learning rates 1.5e-3 and 3e-3 with a seed of its own, and
keeps that of the lowest loss on the validation split; of KEM with gates and without, and of sKEM, validation keeps one.
Then five seeds each, scored once on the test split, all reported. Where time runs out, a part ends after the last whole
seed of all methods (`--seeds`), and the page says how many there are. Changed since, each time before the first run of
the part: blind and sighted were added when labels had been run and had shown no difference; they have three seeds and
the configuration's rate. The noise parts have it too, and images of half the height and width: a run of dense
attention between 16 tasks' tokens of whole ones takes an hour (of noise8 the first seed of none and kem had been run at
the whole size; it is not used). convnext, whose step takes over twice the ViT's, has three seeds, the configuration's
rate, half the budget and no cross-attention.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims import compare
from benchmarks.claims.runs import PATIENCE, Busy

BASE = ["--config=scenes", "--trunk_steps=0", "--no_singles"]
WHOLE, HALF = ["--steps=1000"], ["--steps=500"]  # of the default budget
TUNE = ["--tune", "1.5e-3", "3e-3"]
ALL = [
    "none",
    "widened",
    "within_tasks",
    "cross_attention",
    "shared_workspace",
    "kem",
    "kem_plain",
    "skem",
    "skem_plain",
]
GATED = ["--either=kem,kem_plain", "--either=skem,skem_plain"]
SWIN = ["--config.backbone=swin", "--config.backbones.swin.width=18", "--config.backbones.swin.window_size=4"]
CONVNEXT = [
    "--config.backbone=convnext",
    "--config.backbones.convnext.size=atto",
    "--config.backbones.convnext.width=20",
]
NOISE = ["--config.data.size=(32, 48)", "--methods", "none", "cross_attention", "kem", "kem_plain", "skem_plain"]
INTERACTIONS = ["--methods", *ALL, *TUNE, *GATED]
WHERE = ["--methods", "none", "within_tasks", "kem", "kem_balanced", "kem_pairs", "kem_pairs_exchange", *TUNE]
PARTS: dict[str, list[str]] = {
    "swin": [*WHOLE, *SWIN, *INTERACTIONS],
    "labels": [*HALF, "--labelled", "depth=0.05", "semseg=0.5", *INTERACTIONS],
    "blind": [*HALF, "--blind=depth", "--methods", *ALL],
    "sighted": [*HALF, "--methods", "none", "kem", "kem_plain"],
    "pairs": [*HALF, *SWIN, *WHERE],
    "noise6": [*HALF, *NOISE],
    "noise8": [*HALF, "--distractors=2", *NOISE],
    "convnext": [*HALF, *CONVNEXT, "--methods", "none", "widened", "within_tasks", "kem", "kem_plain"],
    "noise16": [*HALF, "--distractors=10", *NOISE],
    "vit": [*WHOLE, *INTERACTIONS],
}
FEWER = {"blind": 3, "sighted": 3, "convnext": 3}  # seeds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is missing of each part, and writes exchange_PART.json; several processes share the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/exchange"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the numbers")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    arguments = parser.parse_args(argv)
    left = list(arguments.only)
    while left:
        for part in tuple(left):
            seeds = min(arguments.seeds, FEWER.get(part, arguments.seeds))
            where = [f"--out={arguments.out / part}", f"--results={arguments.results / f'exchange_{part}.json'}"]
            options = [f"--seeds={seeds}", f"--cache_dir={arguments.cache_dir}"]
            try:
                compare.attempt([*BASE, *where, *options, *PARTS[part]])
                left.remove(part)
            except Busy:  # other processes are at the last runs of this part: on with the next
                time.sleep(PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
