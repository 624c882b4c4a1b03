"""Cityscapes: segmentation (19 classes) and disparity in pixels, 2,975 and 500 images.

Command:   python -m sgw_jax train --config=cityscapes --config.data.root=DIR --workdir=runs/cityscapes
Weights:   --config.backbone_weights=PATH: an AugReg .npz or a hub folder (docs/backbones.md); without, from scratch.
Data:      DIR holds leftImg8bit/ gtFine/ disparity/, or, with --config.data.format=prepared, what
           `sgw-jax prepare cityscapes` wrote. Sky has disparity 0, which is valid; unknown is -1.
Recipe:    MTMamba's, as published: no augmentation, the network sees 512 x 1024, labels and predictions stay at
           1024 x 2048; 40,000 steps of 8 images, AdamW 1e-4, decay 1e-6, poly 0.9, Swin-L with windows of 12.
           Difference: invalid disparity is masked (the released code trains on it as -1), and the losses are summed.
Hardware:  8 accelerators of 24 GB or more.
Variants:  --config=cityscapes:swin_b,interaction=skem,protocol=published
           protocol=published: as in the released code, where not the sky but rail tracks have disparity 0, and pixels
           of 0 are left out of the error.
"""

from sgw_jax.configs import base


def get_config(arg: str | None = None):
    """backbone: a key of base.SYSTEMS; interaction: a key of config.interactions;
    protocol: exact or published."""
    config = base.get_config()
    options = base.parse_arg(arg, backbone="swin_l", interaction="kem", protocol="exact")
    base.use_system(config, options["backbone"], options["interaction"])
    config.tasks = ("semseg", "depth")
    config.protocol = options["protocol"]

    config.data.source = "cityscapes"
    config.data.fit = "pad"
    config.data.size = (1024, 2048)
    config.input_scale = 0.5
    config.augment.update({"flip": False, "colour": False})
    config.steps = 40_000
    config.batch_size = 8
    config.optimizer.update({"name": "adamw", "learning_rate": 1e-4, "weight_decay": 1e-6, "clip_norm": None})
    config.schedule.name = "poly"
    return config
