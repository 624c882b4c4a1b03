"""NYUD-v2: segmentation (40 classes), depth, normals and edges, 795 images for training and 654 for testing.

Command:   python -m sgw_jax train --config=nyud --config.data.root=DIR --workdir=runs/nyud
Weights:   --config.backbone_weights=PATH: an AugReg .npz or a hub folder (docs/backbones.md); without, from scratch.
Data:      DIR holds images/ segmentation/ depth/ normals/ edge/ gt_sets/, any of the three archives that look alike,
           or, with --config.data.format=prepared, what `sgw-jax prepare nyud` wrote.
Recipe:    InvPT's, as published: zoom 0.5 to 2, crop 448 x 576 (no class over 75 %), flip, photometric distortion;
           40,000 steps of 6 images, Adam 2e-5, decay 1e-6, poly 0.9, drop path 0.15, losses 1 / 1 / 10 / 50 (edge
           weight 0.95), predictions before the interaction supervised too. Differences: decoupled decay (AdamW),
           gradients clipped at norm 10 (TaskPrompter, MLoRE), layer instead of batch normalisation.
Hardware:  1, 2, 3 or 6 accelerators (they must divide the batch of 6; --config.batch_size=8 for 8) of 16 GB or more.
Variants:  --config=nyud:swin_b,interaction=skem,tasks=semseg+depth,protocol=published
           protocol=published repeats the quirks of the published numbers, here outlined edge masks and suppressed
           predictions of edges.
"""

from sgw_jax.configs import base

TASKS = ("semseg", "depth", "normals", "edges")


def get_config(arg: str | None = None):
    """backbone: a key of base.SYSTEMS; interaction: a key of config.interactions;
    tasks: names joined by "+"; protocol: exact or published."""
    config = base.get_config()
    options = base.parse_arg(arg, backbone="vit_l", interaction="kem", tasks="+".join(TASKS), protocol="exact")
    base.use_system(config, options["backbone"], options["interaction"])
    config.tasks = tuple(options["tasks"].split("+"))
    config.protocol = options["protocol"]

    config.data.source = "nyud"
    config.data.fit = "pad"
    config.data.size = (448, 576)
    base.invpt_recipe(config)
    config.boundary.max_dist = 0.011
    config.boundary.outline_targets = options["protocol"] == "published"
    return config
