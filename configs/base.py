"""Every configuration key once, with its meaning and its range; the other configs change values, they add no keys.

Ranges are enforced by sgw_jax/experiment/keys.py before anything else is done, [0, 1) holding 0 and not 1; what
`optional` makes may be None besides. Numbers are finite, whole ones below 2^31.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def optional(kind: type, value=None):
    """A key that holds `kind` or None (on the command line: `--config.key=None`)."""
    reference = placeholder(kind)
    reference.set(value)
    return reference


def parse_arg(arg: str | None, **defaults: str) -> dict[str, str]:
    """The part after the colon of `--config=FILE:key=value,key=value`, over its defaults; unknown keys are an error.

    A word alone is the backbone, where there is one to choose: `--config=nyud:swin_l,interaction=skem`.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        item = f"backbone={item}" if "backbone" in defaults and item in SYSTEMS else item
        key, separator, value = item.partition("=")
        if not separator or key not in defaults:
            systems = f", or alone a backbone of {list(SYSTEMS)}" if "backbone" in defaults else ""
            raise ValueError(f"config argument {item!r}: expected key=value with a key of {sorted(defaults)}{systems}.")
        values[key] = value
    return values


def kem(etf_vertices: int | None = None) -> dict[str, Any]:
    """The options of KEM; with ``etf_vertices`` of sKEM."""
    return {
        "num_slots": 16,  # L, in [1, 8192]
        "num_heads": 1,  # in [1, 8192]; must divide channels and slot_dim
        "top_k": optional(int, 32),  # tokens a slot keeps, at least 1; None = all
        "slot_dim": optional(int),  # in [1, 8192]; None = channels
        "etf_for": "all",  # sKEM: project keys, queries and values ("all") or keys and queries ("selection")
        "projection": "etf",  # sKEM: etf, or a control: direction | orthonormal | learned
        "etf_vertices": optional(int, etf_vertices),  # sKEM's K, in [2, 8193], at most channels + 1; None = KEM
        "pre_norm": False,  # LayerNorm before the projections
        "task_embedding": False,  # a learned vector per task on keys and queries
        "task_gate": False,  # a learned scalar per task on what is written back, from 0: it starts as the identity
        "balanced": False,  # slots retrieve from every task by itself: num_slots of them, top_k tokens each
        "slot_exchange": False,  # the slots attend to each other, behind a gate from 0
        "pair_gate": False,  # balanced: a learned scalar per pair of tasks on what one reads of the other, from 0
        "rounds": 1,  # retrieve-write rounds with the same weights, in [1, 64]
        "recall": optional(float),  # on TPUs: find the top k approximately, this expected share of them, in (0, 1]
        "temperature": 1.0,  # the scores of the retrieval are divided by it; positive
    }


def mixture_source(**changed: Any) -> dict[str, Any]:
    """One source of a mixture, `config.data.mixture.NAME`: these keys, with those changed that are given.

    All else of `config.data` (size, fit, lengths and seed of scenes ...) is the run's.
    """
    return {
        "source": "folder",  # DATA_SETS in sgw_jax/experiment/data_sets.py, but for mixture
        "root": "",  # these as of config.data: the source's directory
        "format": "archive",  # archive | prepared
        "weight": 1.0,  # positive: the source's share of the rows of training is this over the sum of all
        "num_classes": 12,  # folder: of its semseg, in [2, 255]
        "num_parts": 7,  # folder: of its human_parts, in [2, 255]
        "class_names": (),  # folder: of its semseg
        "part_names": (),  # folder: of its human_parts
        "normals_axes": "opencv",  # of its normals: opencv | opengl
        # The run's tasks that it has labels of. KIND@LABEL, such as semseg@street, is a head of its own for labels of
        # that kind, in config.tasks too.
        "tasks": ("semseg",),
        # Task -> class of the run by class of the source, each in [0, 255], 255 = ignored; a task without: as they are.
        "maps": {},
        **changed,
    }


def get_config() -> ConfigDict:
    """The defaults."""
    config = ConfigDict(
        {
            "seed": 0,  # initialisation, data order, augmentation, drop path; in [0, 2^32)
            "dtype": "float32",  # of the computation: float32 or bfloat16; parameters and losses stay float32
            "mesh": {  # how devices are arranged (docs/scaling.md)
                "name": "data",  # data | fsdp | data_fsdp4 | ...: MESHES in sgw_jax/sharding.py
                # Devices per axis, in place of the named mesh's, at least 1; one may be -1 and takes what is left.
                "data": optional(int),  # copies of the network
                "fsdp": optional(int),  # parts of the parameters
                "context": optional(int),  # parts of an image's rows
                # Where parameters and their moments lie that the mesh places badly: pairs of a pattern of paths and,
                # for each axis, None or the mesh's axes that split it; the first match wins. A file sets them:
                # config.mesh.rules = (("backbone/.*mlp/hidden/kernel", (None, None, "fsdp")),)
                "rules": optional(tuple),
            },
            # --- data -------------------------------------------------------------------------------------------
            "data": {
                # scenes | folder | nyud | ...: DATA_SETS in sgw_jax/experiment/data_sets.py
                "source": "scenes",
                # source mixture: NAME -> `mixture_source` of each, which a configuration file adds (docs/your-data.md)
                "mixture": {},
                "root": "",  # the data's directory (docs/datasets.md); scenes need none
                "format": "archive",  # archive: the files as published | prepared: written by data_pipelines.prepare
                "num_classes": 12,  # folder: of semseg, in [2, 255]
                "num_parts": 7,  # folder: of human_parts, background included, in [2, 255]
                # folder: names of these classes, in the order of their numbers; () makes them "class 0", "class 1" ...
                "class_names": (),  # of semseg
                "part_names": (),  # of human_parts; of seven parts () is PASCAL-Context's
                # The labels' axes: opencv = x right, y down, z forward | opengl = x right, y up, z to the viewer.
                "normals_axes": "opencv",
                "size": (64, 96),  # height, width that the network sees, in training and evaluation; each in [1, 16384]
                # How images of other sizes come to it; scores are those of each image's own size, whatever the fit.
                # resize: enlarged or shrunk to the largest copy inside, before augmentation as in evaluation.
                # pad: pixels keep their scale, as the published protocols have it. Training crops larger images and
                # pads smaller ones; evaluation pads, and shrinks what is larger.
                "fit": "resize",
                "seed": 0,  # scenes: of the scenes themselves; in [0, 2^32)
                "lengths": {  # scenes: images per split; 0 = no such split
                    "train": 2048,  # at least 1
                    "validation": 256,  # at least 0
                    "test": 256,  # at least 0
                },
                # The look at the data before step 1 (docs/your-data.md): full = every value | sizes = names of files
                # and sizes of images alone | off.
                "check": "full",
                "workers": 0,  # loader processes, in [0, 1024]; 0 = threads alone
                "threads": 2,  # loader threads per process, in [1, 1024]
            },
            "augment": {
                "scale": (1.0, 1.0),  # uniform range of the random zoom, each in (0, 16], the smaller first
                "scale_crop": (),  # factors of MTAN's random crop, enlarged to the image's size; each in [1, 16]
                # Redraw a crop while one class of semseg covers this share, in (0, 1]; None = take the first.
                "cat_max_ratio": optional(float),
                "flip": True,  # horizontally, with probability 1/2
                "colour": True,  # brightness, contrast, saturation, hue
            },
            # --- tasks ------------------------------------------------------------------------------------------
            "tasks": ("semseg", "depth", "normals", "edges", "saliency", "human_parts"),
            "protocol": "exact",  # exact | published: the field's quirks reproduced
            # Weights of the summed losses (InvPT's), at least 0; not all of the tasks' may be 0.
            "task_weights": {
                "semseg": 1.0,
                "depth": 1.0,
                "normals": 10.0,
                "edges": 50.0,
                "saliency": 5.0,
                "human_parts": 2.0,
            },
            "boundary": {  # ODS, OIS and AP of edges at the end of a run and in `evaluate`
                # Of a match, as a share of the image's diagonal, in [0, 1); None = not evaluated.
                "max_dist": optional(float),
                "outline_targets": False,  # the published NYUD evaluation's: outlines of the stored edge masks
                "suppress": False,  # keep the crests of predicted ridges alone; protocol=published always does
                "workers": 0,  # processes, in [0, 1024]; 0 = this one
            },
            "metric_options": {  # what is measured beside the rest, by task: docs/evaluation.md
                "depth": {
                    "crop": optional(str),  # garg | eigen | nyu_eigen
                    "min_depth": optional(float),  # pixels of less, or as much, do not count; at least 0
                    "max_depth": optional(float),  # of more, or as much; positive; None = as the data set says
                    "clip": False,  # predictions to [min_depth, max_depth]
                    "by_image": False,  # means over images, not over the pixels of all
                },
                "semseg": {"boundary_iou": False},
                "human_parts": {"boundary_iou": False},
                "saliency": {"image_scores": False},  # S, E, weighted F ... of each image, at the end of a run
            },
            "edge_weight": optional(float, 0.95),  # of edge pixels in their loss, in (0, 1); None = balanced per batch
            # Weight of the loss that pulls semseg's features to the vertices of an ETF, at least 0.
            "dot_regression": 0.0,
            # --- model ------------------------------------------------------------------------------------------
            "backbone": "vit",  # vit | dinov2 | dinov3 | swin | convnext
            # Pretrained: a folder with config.json and model.safetensors, or its shards and their index (as the hub has
            # them), or an AugReg .npz; read when a run starts.
            "backbone_weights": "",
            # A directory for what a frozen backbone makes of the images, computed once and read by every run that has
            # the same backbone, images and size; made if it is not there. Empty = it is computed in every step.
            "backbone_cache": "",
            "backbones": {
                "vit": {
                    "size": "small",  # tiny | small | base | large; the next three override it
                    "width": optional(int),  # in [1, 8192]
                    "depth": optional(int),  # in [4, 1024], a multiple of 4
                    "num_heads": optional(int),  # in [1, 8192]; must divide width
                    "mlp_ratio": 4.0,  # of the hidden width to width; in [0.0625, 64]
                    "patch_size": 16,  # pixels, in [1, 1024]; conv: a power of two from 2 on
                    "patch_embed": "patch",  # patch | conv
                    "class_token": False,  # True for pretrained weights, as are the next two their values
                    "approximate_gelu": False,  # the tanh approximation (AugReg)
                    "epsilon": 1e-6,  # of the layer norms; positive
                    "drop_path": 0.0,  # of the last block, in [0, 1), linear from 0
                    # What a block keeps for the backward pass: none = all | dots = matrix products | full = its input
                    # alone (least memory, a third more compute).
                    "remat": "none",
                    # Attention of so many queries at a time, at least 1; None = all. Saves memory, and on TPUs most of
                    # attention's time, if there are several times as many tokens.
                    "attention_chunk": optional(int),
                },
                "dinov2": {
                    "size": "small",  # small | base | large | giant
                    "registers": 0,  # in [0, 64]; 4 for the weights with registers
                    "width": optional(int),  # these as of vit: in [1, 8192]
                    "depth": optional(int),  # in [4, 1024]
                    "num_heads": optional(int),  # in [1, 8192]
                    "drop_path": 0.0,  # in [0, 1)
                    "remat": "none",  # none | dots | full
                    "attention_chunk": optional(int),  # at least 1
                },
                "dinov3": {
                    "size": "small",  # small | small_plus | base | large | huge_plus | 7b
                    "width": optional(int),  # these as of vit: in [1, 8192]
                    "depth": optional(int),  # in [4, 1024]
                    "num_heads": optional(int),  # in [1, 8192]
                    "drop_path": 0.0,  # in [0, 1)
                    "remat": "none",  # none | dots | full
                    "attention_chunk": optional(int),  # at least 1
                },
                "swin": {
                    "size": "tiny",  # tiny | small | base | large; width overrides it, a multiple of its first heads
                    "width": optional(int),  # of the first stage, in [1, 8192]
                    "window_size": 7,  # tokens, in [1, 64]; 12 for the weights pretrained at 384 pixels
                    "always_partition": True,  # False: no shift on maps within one window, as in the classifier
                    "drop_path": 0.0,  # of the last block, in [0, 1), linear from 0
                    "remat": "none",  # none | dots | full
                    "window_chunk": optional(int),  # windows x heads of an image at a time, at least 1; None = all
                },
                "convnext": {  # DINOv3's
                    "size": "tiny",  # atto | tiny | small | base | large; width overrides it
                    "width": optional(int),  # of the first stage, in [1, 8192]
                    "drop_path": 0.0,  # of the last block, in [0, 1), linear from 0
                    "remat": "none",  # none | dots | full
                },
            },
            # Low-rank updates of the backbone's matrices, which are frozen themselves (docs/backbones.md).
            "lora": {
                "rank": optional(int),  # at least 1, at most the smaller side of every matrix; None = no LoRA
                "alpha": 16.0,  # positive: W + (alpha / rank) A B
                "targets": ("attention", "mlp"),  # attention, mlp: whose matrices
            },
            "interaction": "kem",  # none | cross_attention | kem | skem | shared_workspace | within_tasks
            "interactions": {
                "none": {
                    "mlp_width": optional(int),  # of a token-wise MLP, to compare at equal parameters; in [1, 8192]
                },
                "cross_attention": {
                    "num_heads": 1,  # in [1, 8192]; must divide channels
                    "query_chunk": optional(int, 1024),  # queries at a time, at least 1; None = all
                    "pre_norm": False,
                },
                "kem": kem(),
                "skem": kem(etf_vertices=64),
                "shared_workspace": {
                    "num_slots": 8,  # in [1, 8192]
                    "num_heads": 1,  # in [1, 8192]; must divide channels
                    "key_dim": optional(int),  # per head of queries and keys, in [1, 8192]; None = channels / num_heads
                    "top_k": optional(int, 32),  # weights a slot keeps, at least 1; None = all
                    "gate": optional(str, "unit"),  # unit | memory | None
                    "mlp_layers": 1,  # in [1, 64]
                    "rounds": 1,  # in [1, 64]
                },
                "within_tasks": kem(),
            },
            "input_scale": 1.0,  # the network sees images so resized, in (0, 16]; predictions keep the labels' size
            "channels": 64,  # width of the task features, in [1, 8192]
            "stride": 4,  # of the task features, in [1, 1024]: one of the backbone's
            "scales": (),  # coarser strides at which the tasks interact too, such as 16,8; each in [1, 1024]
            "persist": False,  # slots of one scale start the next
            "upsample": "bilinear",  # bilinear | subpixel: how heads reach the image size
            "preliminary": False,  # deep supervision: predictions from before the interaction
            # --- objective: how the tasks' losses become one update (docs/objectives.md) ---------------------------
            # equal (the sum weighted by task_weights), uncertainty, uw_so, log_loss, gls, dwa, rlw, stch, famo;
            # upgrad, dualproj, nash_mtl, fairgrad, cagrad, mgda, imtl_g, aligned_mtl, pcgrad, gradvac, config, db_mtl,
            # gradnorm: these take the gradient of every task.
            "objective": "equal",
            "gradients": "parameters",  # parameters | representation: one backward pass of the backbone for all tasks
            "weights_ema": optional(float),  # average the tasks' weights over steps, with this decay in [0, 1)
            "weights_every": 1,  # compute them every k-th step, k at least 1
            "objectives": {
                "uncertainty": {"learning_rate": 0.025},  # positive
                "uw_so": {"temperature": 1.0},  # positive
                "dwa": {"temperature": 2.0},  # positive
                "stch": {"mu": 1.0},  # positive
                "famo": {"learning_rate": 0.025},  # positive
                "nash_mtl": {"max_norm": optional(float, 1.0)},  # positive; None = as it comes
                "fairgrad": {"alpha": 1.0},  # positive
                "cagrad": {"c": 0.5, "rescale": False},  # c at least 0
                "mgda": {"normalisation": "none"},  # none | l2 | loss | loss+
                "aligned_mtl": {"scale": "min"},  # min | median | rmse
                "gradvac": {"beta": 0.01},  # in [0, 1]
                "gradnorm": {"alpha": 1.5, "learning_rate": 0.025},  # alpha at least 0, learning_rate positive
            },
            # --- optimisation -----------------------------------------------------------------------------------
            "steps": 40_000,  # at least 1
            "batch_size": 8,  # at least 1, global: over all devices and processes
            "accumulate": 1,  # micro-batches per step, at least 1
            "optimizer": {
                "name": "adamw",  # adamw | muon | sgd
                "learning_rate": 1e-4,  # positive
                "weight_decay": 1e-4,  # at least 0
                "b1": 0.9,  # in [0, 1)
                "b2": 0.999,  # in [0, 1)
                "momentum": 0.9,  # sgd; in [0, 1)
                "muon_rms": 0.2,  # muon: size of a kernel's update, relative to the learning rate; positive
                "clip_norm": optional(float, 10.0),  # positive; None = no clipping
                # The pretrained layers' learning rate relative to the rest, at least 0; 0 freezes them.
                "backbone_scale": 1.0,
                "layer_decay": 1.0,  # ... times this, in (0, 1], to the power of the number of layers above
                "lora_scale": 1.0,  # the learning rate of LoRA's factors relative to the rest, positive
                "frozen_layers": 0,  # how many of the lowest blocks are frozen, with what is below them; at least 0
            },
            "schedule": {
                "name": "poly",  # poly | cosine | constant | step
                "warmup_steps": 0,  # at least 0, less than steps
            },
            "ema_decay": optional(float),  # evaluate an average of the parameters, with this decay in [0, 1)
            # --- housekeeping -----------------------------------------------------------------------------------
            "log_every": 10,  # steps between lines of metrics.jsonl, at least 1
            "checkpoint_every": 500,  # steps, at least 1
            # Steps between evaluations on the validation split, at least 1; a multiple of checkpoint_every.
            "eval_every": 1000,
            "keep": 2,  # last checkpoints kept, beside the best; at least 1
            # The step after which jax.profiler begins its record, at least 0, less than steps; None = no record.
            "profile_after": optional(int),
            "profile_steps": 5,  # how many steps it covers, at least 1
        }
    )
    config.lock()  # a mistyped key in a config file is an error, not a new key
    config.data.mixture.unlock()  # but here, where keys are names of the user's
    return config


# The full-size networks: backbone and its options. Windows of 12 and ViTs with a class token are what the weights
# pretrained at 384 pixels have; AugReg's were trained with the tanh GELU.
CHUNKED = {"attention_chunk": 128}  # of a thousand tokens and more
CHUNKED_WINDOWS = {"window_chunk": 96}  # of 144 tokens: 8 MB of scores an image
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_t": ("swin", {"size": "tiny", "window_size": 7, "drop_path": 0.2}),
    "swin_b": ("swin", {"size": "base", "window_size": 12, "drop_path": 0.2, **CHUNKED_WINDOWS}),
    "swin_l": ("swin", {"size": "large", "window_size": 12, "drop_path": 0.2, **CHUNKED_WINDOWS}),
    "vit_b": ("vit", {"size": "base", "class_token": True, "approximate_gelu": True, "drop_path": 0.15, **CHUNKED}),
    "vit_l": ("vit", {"size": "large", "class_token": True, "approximate_gelu": True, "drop_path": 0.15, **CHUNKED}),
    "dinov2_l": ("dinov2", {"size": "large", "drop_path": 0.15, **CHUNKED}),
    "dinov3_l": ("dinov3", {"size": "large", "drop_path": 0.15, **CHUNKED}),
    "dinov3_hplus": ("dinov3", {"size": "huge_plus", "drop_path": 0.15, **CHUNKED}),
    "convnext_l": ("convnext", {"size": "large", "drop_path": 0.2}),
}


def use_system(config: ConfigDict, name: str, interaction: str) -> None:
    """A full-size network: one of `SYSTEMS`, task features of width 192 at 1/4 of the image, 32 slots as wide."""
    if name not in SYSTEMS:
        raise ValueError(f"config argument backbone={name!r}; it must be one of {list(SYSTEMS)}.")
    config.backbone, options = SYSTEMS[name]
    config.backbones[config.backbone].update(options)
    config.interaction = interaction
    config.channels = 192
    for workspace in config.interactions.values():
        if "num_slots" in workspace:
            workspace.num_slots = 32
    config.interactions.skem.etf_vertices = 128
    config.dtype = "bfloat16"


def invpt_recipe(config: ConfigDict) -> None:
    """Augmentation and optimisation of InvPT, ATRC, TaskPrompter and MLoRE, as configs/nyud.py lists them."""
    config.augment.update({"scale": (0.5, 2.0), "cat_max_ratio": 0.75, "flip": True, "colour": True})
    config.preliminary = True
    config.steps = 40_000
    config.batch_size = 6
    config.optimizer.update({"name": "adamw", "learning_rate": 2e-5, "weight_decay": 1e-6, "clip_norm": 10.0})
    config.schedule.name = "poly"
