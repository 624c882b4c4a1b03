"""The small sets of MTAN and LibMTL: NYUv2 with 13 classes at 288 x 384, Cityscapes with 7 classes at 128 x 256.

Command:   python -m sgw_jax train --config=mtan --config.data.root=DIR --workdir=runs/mtan
Data:      DIR holds {train,val}/{image,label,depth,normal}/<i>.npy, or, with --config.data.format=prepared, what
           `sgw-jax prepare mtan_nyuv2` (mtan_cityscapes) wrote. Depth of Cityscapes is inverse depth.
Recipe:    LibMTL's, as published: batch 8, Adam 1e-4, decay 1e-5, halved at half of 200 epochs; NYUv2 with random
           crops enlarged by 1, 1.2 or 1.5 and flips, Cityscapes without augmentation. Differences: a ViT-S in place of
           the dilated ResNet-50, decoupled decay, images normalised by ImageNet's mean and deviation, L1 loss of
           normals in place of 1 - cosine (InvPT's weight for it).
Hardware:  one accelerator.
Variants:  --config=mtan:data=cityscapes,interaction=skem
"""

from sgw_jax.configs import base

TASKS = {"nyuv2": ("semseg", "depth", "normals"), "cityscapes": ("semseg", "depth")}


def get_config(arg: str | None = None):
    """data: nyuv2 or cityscapes; interaction: a key of config.interactions."""
    config = base.get_config()
    options = base.parse_arg(arg, data="nyuv2", interaction="kem")
    if options["data"] not in TASKS:
        raise ValueError(f"config argument data={options['data']!r}; it must be one of {sorted(TASKS)}.")
    config.interaction = options["interaction"]
    config.tasks = TASKS[options["data"]]
    config.data.source = f"mtan_{options['data']}"
    config.data.fit = "pad"
    config.augment.colour = False
    if options["data"] == "nyuv2":
        config.data.size = (288, 384)
        config.augment.scale_crop = (1.0, 1.2, 1.5)
        config.steps = 200 * 100  # epochs of ceil(795 / 8) steps
    else:
        config.data.size = (128, 256)
        config.augment.flip = False
        config.steps = 200 * 372  # ceil(2975 / 8)
    config.batch_size = 8
    config.optimizer.update({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-5, "clip_norm": None})
    config.schedule.name = "step"
    return config
