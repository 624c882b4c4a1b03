"""The configuration of real.py: photographs with the labels of ../shared/data, from pretrained DINOv2-S.

Its values are written down here and not taken from configs/people.py, so that a comparison goes on as it began.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sgw_jax.configs import base
from sgw_jax.data_pipelines.atomic import write_atomically

PEOPLE = ("semseg", "human_parts", "saliency", "edges")
# Of mixed/, by the beginning of the images' names: the tasks that they have labels of. Streets have other classes.
MIXED = {
    "camvid": ("semseg@street", "edges"),
    "bsds500": ("edges",),
    "ecssd": ("saliency",),
    "rgbd": ("depth", "normals"),
}
ALL = (*PEOPLE, "semseg@street", "depth", "normals")


def get_config(arg: str | None = None):
    """root: the folder that holds people/; views: that of the views of mixed/ (`view`), or empty for people alone;
    tasks: names joined by "+", all where there are none; tuned: frozen, or lora."""
    config = base.get_config()
    options = base.parse_arg(arg, root="", views="", tasks="", tuned="frozen")
    views, people = options["views"], str(Path(options["root"]) / "people")
    config.tasks = tuple(options["tasks"].split("+")) if options["tasks"] else ALL if views else PEOPLE
    if views:
        config.data.source, config.data.size = "mixture", (224, 224)  # people stand, streets lie
        sources = {"people": (people, PEOPLE)} | {name: (str(Path(views) / name), own) for name, own in MIXED.items()}
        for name, (root, own) in sources.items():
            if set(own) & set(config.tasks):  # half of the rows are people, an eighth each of the others
                config.data.mixture[name] = base.mixture_source(
                    root=root,
                    tasks=own,
                    num_classes=14 if name == "people" else 11,
                    weight=4.0 if name == "people" else 1.0,
                )
    else:
        config.data.update({"source": "folder", "root": people, "num_classes": 14, "num_parts": 7, "size": (224, 112)})
    config.augment.update({"flip": False, "colour": False})  # in three passes over the data neither is missed

    config.backbone = "dinov2"
    config.channels = 64
    config.stride = 8
    config.upsample = "subpixel"
    for name in ("kem", "skem", "within_tasks"):
        config.interactions[name].update({"pre_norm": True, "task_gate": True})
    config.interactions.cross_attention.pre_norm = True

    config.batch_size = 8
    # Muon's products for the pyramid's kernels would be as much work as all the rest of a step from cached taps.
    config.optimizer.update({"name": "adamw", "weight_decay": 0.01})
    config.schedule.update({"name": "cosine", "warmup_steps": 20})
    config.ema_decay = 0.98
    if options["tuned"] == "lora":
        config.lora.rank = 8
        config.dtype = "bfloat16"  # on cores with AMX products are three times as fast, from jax 0.12 on
    else:
        config.optimizer.backbone_scale = 0.0
    return config


def view(mixed: Path, tasks: Sequence[str], start: str, out: Path) -> Path:
    """A data folder of those images of another whose names begin so, by links to that one's folders."""
    folder = out.resolve() / "views" / start
    (folder / "splits").mkdir(parents=True, exist_ok=True)
    for name in ("images", *(task.partition("@")[0] for task in tasks)):
        with contextlib.suppress(FileExistsError):  # of an earlier time, or another process
            (folder / name).symlink_to(mixed / name)
    for split in ("train", "validation", "test"):
        ids = (mixed / "splits" / f"{split}.txt").read_text(encoding="utf-8").split()
        kept = [name for name in ids if name.startswith(start)]
        write_atomically(folder / "splits" / f"{split}.txt", "\n".join(kept) + "\n", contended=True)
    return folder
