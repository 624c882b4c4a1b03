"""PASCAL-Context: segmentation (21 classes), human parts, saliency, normals and edges, 4,998 and 5,105 images.

Command:   python -m sgw_jax train --config=pascal_context --config.data.root=DIR --workdir=runs/pascal
Weights:   --config.backbone_weights=PATH: an AugReg .npz or a hub folder (docs/backbones.md); without, from scratch.
Data:      DIR holds JPEGImages/ ImageSets/ semseg/ human_parts/ pascal-context/ normals_distill/ sal_distill/, or, with
           --config.data.format=prepared, what `sgw-jax prepare pascal_context` wrote (images without a
           person have no labels of human parts).
Recipe:    InvPT's, as configs/nyud.py, at 512 x 512; losses 1 / 2 / 5 / 10 / 50 (edge weight 0.95).
Hardware:  as configs/nyud.py.
Variants:  --config=pascal_context:swin_b,interaction=skem,tasks=semseg+human_parts,protocol=published
           protocol=published: saliency's maxF with the field's second sigmoid, absent classes as 0,
           suppressed predictions of edges.
"""

from sgw_jax.configs import base

TASKS = ("semseg", "human_parts", "saliency", "normals", "edges")


def get_config(arg: str | None = None):
    """backbone: a key of base.SYSTEMS; interaction: a key of config.interactions;
    tasks: names joined by "+"; protocol: exact or published."""
    config = base.get_config()
    options = base.parse_arg(arg, backbone="vit_l", interaction="kem", tasks="+".join(TASKS), protocol="exact")
    base.use_system(config, options["backbone"], options["interaction"])
    config.tasks = tuple(options["tasks"].split("+"))
    config.protocol = options["protocol"]

    config.data.source = "pascal_context"
    config.data.fit = "pad"
    config.data.size = (512, 512)
    base.invpt_recipe(config)
    config.boundary.max_dist = 0.0075
    return config
