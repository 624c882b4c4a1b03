"""The cache of a frozen backbone's taps: a run from it equals one without, and nothing else is ever read from it."""

import dataclasses
import functools
import io
import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.freezing import Freezing
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.configs import base
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.tap_cache import VIEWS, TapCache
from sgw_jax.differentiate import flat
from sgw_jax.experiment.build import build
from sgw_jax.experiment.experiment import differences
from sgw_jax.layers.parameter_names import is_added
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.run import backbone_cache
from sgw_jax.run.backbone_cache import with_backbone_cache
from sgw_jax.run.state import new_state
from sgw_jax.run.workdir import DiskFullError, disk_full_named
from sgw_jax.train import check_start, train
from sgw_jax.train_step import init_state, make_train_step

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

SIZE, STEPS, ITEMS = (32, 24), 6, 20  # 48 rows of 8: more than two epochs, so that both views of an image are read
VIT = ViT(8, 8, 4, 2, 2.0, SIZE, class_token=True)
BACKBONES = {
    "vit": VIT,
    "dinov3": VIT.clone(registers=2, rope_theta=100.0, gated=True, qkv_bias="query_value", layer_scale=0.1),
    "conv": VIT.clone(patch_embed="conv"),
    "swin": Swin(4, (2, 2, 2, 2), (1, 1, 1, 1), window_size=2),
    "convnext": ConvNeXt(4, (1, 1, 2, 1)),
}


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random images, smaller than the network's by an odd number of columns, with depth."""

    length: int
    seed: int

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        size = (SIZE[0], SIZE[1] - 3)
        depth = rng.uniform(1, 4, size).astype(np.float32)
        return {"image": rng.integers(0, 256, (*size, 3), dtype=np.uint8), "depth": depth}

    def fingerprint(self):
        return {"name": "noise", "length": self.length, "seed": self.seed}


def experiment(cache="", data_seed=1, items=ITEMS, **changes):
    config = base.get_config()
    with config.unlocked():
        config.update({"steps": STEPS, "checkpoint_every": 3, "eval_every": 3, "log_every": 1, "channels": 8})
        config.update({"batch_size": 8, "tasks": ("depth",), "backbone_cache": str(cache), "ema_decay": 0.9})
        config.data.update(size=SIZE, threads=1)
        config.augment.update(scale=(1.0, 1.0), flip=True, colour=False, cat_max_ratio=None)
        config.backbones.vit.update(width=8, depth=4, num_heads=2, patch_size=8, drop_path=0.1)
        config.interactions.kem.num_slots = 2
        config.optimizer.backbone_scale = 0.0
        config.update_from_flattened_dict(changes)
    built = build(config, "unused")
    sources = {"train": Noise(items, data_seed), "validation": Noise(5, data_seed + 1)}
    return dataclasses.replace(built, data=dataclasses.replace(built.data, sources=sources))


def quiet():
    return Console(file=io.StringIO(), width=400)


@functools.cache
def params():
    """Of the network of `experiment`."""
    return new_state(experiment()).params


def cached(built, params=params, console=None):
    return with_backbone_cache(built, params(), console or quiet())


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in found]


# ---- where a backbone divides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES if name != "vit")]
)
def test_taps_stand_for_all_that_is_pretrained(name):
    """They need no parameter that is added, and with them no other is needed: what is not needed is not a number."""
    backbone, image = BACKBONES[name], jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 22, 3)), jnp.float32)
    params = jit(backbone.init)(jax.random.key(0), image)["params"]

    def without(added):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * jnp.nan if is_added("/".join(key.key for key in path)) == added else leaf, params
        )

    @jit
    def sown(params):
        _, found = backbone.apply({"params": params}, image, mutable=["intermediates"])
        return found["intermediates"]["taps"][0]

    taps = sown(without(added=True))
    assert all(np.isfinite(value).all() for value in taps.values())
    maps = jit(backbone.apply)({"params": params}, image)
    above = jit(lambda params, taps: backbone.apply({"params": params}, image, taps=taps))(without(False), taps)
    assert list(above) == list(maps)
    for stride, value in maps.items():  # the same sums, perhaps fused otherwise: a few roundings of normalised values
        np.testing.assert_allclose(above[stride], value, rtol=0, atol=1e-5)


def test_a_step_from_the_cache_has_no_forward_pass_of_the_backbone():
    built = experiment()
    model, tasks, freezing = built.model, built.tasks, Freezing(pretrained=True)
    batch = {"image": jnp.zeros((8, *SIZE, 3)), "depth": jnp.ones((8, *SIZE, 1))}
    state = jax.eval_shape(lambda: init_state(model, built.optimizer, batch["image"], trained=freezing))

    def sown(params, image):
        variables = {"params": params}
        _, found = model.apply(variables, image, method="encode", mutable=["intermediates"])
        return found["intermediates"]["backbone"]["taps"][0]

    taps = jax.eval_shape(sown, state.params, batch["image"])
    known = {f"taps/{name}": jnp.zeros(value.shape, value.dtype) for name, value in taps.items()}
    step = make_train_step(model, tasks, built.optimizer, trained=freezing)

    def cost(function, *args):
        return sum(multiply_accumulates(function, *args).values())

    def pyramid(params, image, taps):
        return model.apply({"params": params}, image, taps=taps, method="encode")

    def encoded(params, image):
        return model.apply({"params": params}, image, method="encode")

    forward = cost(encoded, state.params, batch["image"]) - cost(pyramid, state.params, batch["image"], taps)
    assert forward > 0
    assert cost(step, state, batch) - cost(step, state, {**batch, **known}) == forward


# ---- a run from it equals one without --------------------------------------------------------------------------------


def assert_alike(one, other):
    """Two runs but for the order of sums, which is each compiled program's own: at most of the pixels of a batch, in
    float32 also where the network computes in bfloat16. Other images' features would change the first digits of losses.
    """
    bound = 8 * SIZE[0] * SIZE[1] * float(np.finfo(np.float32).eps)
    (state, found), (other_state, other_found) = one, other
    assert [line.keys() for line in found] == [line.keys() for line in other_found]
    for line, same in zip(found, other_found, strict=True):
        for key, value in line.items():
            assert same[key] == (pytest.approx(value, rel=bound) if isinstance(value, float) else value), key
    for kept in ("params", "ema"):
        for path, leaf in flat(getattr(state, kept)).items():
            again = flat(getattr(other_state, kept))[path]
            np.testing.assert_allclose(again, leaf, rtol=0, atol=bound * np.abs(leaf).max(), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_from_the_cache_equals_one_without(tmp_path, dtype):
    """Over two epochs with flips, on eight devices, evaluated on the way; also begun without and gone on with."""
    cache, plain = tmp_path / "cache", experiment(dtype=dtype)
    kept = experiment(cache, dtype=dtype)
    assert len(plain.mesh.devices.flat) == 8
    one = train(plain, tmp_path / "without", quiet()).state, lines(tmp_path / "without")
    console = quiet()
    other = train(kept, tmp_path / "with", console).state, lines(tmp_path / "with")
    assert_alike(one, other)
    assert sorted(path.name for path in (cache / "train").iterdir()) == ["00000.mirrored", "00000.own", "cache.json"]
    assert sorted(path.name for path in (cache / "validation").iterdir()) == ["00000.own", "cache.json"]
    assert f"{ITEMS} train images (own, mirrored) and 5 validation images (own) in {cache}" in console.file.getvalue()
    assert "are free there" in console.file.getvalue()

    # The same configuration, as far as a run's identity goes; the shards are as they were.
    assert not list(differences(plain.identity(), kept.identity()))
    shutil.copytree(tmp_path / "without", tmp_path / "half")
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.own")}
    console = quiet()
    again = train(kept, tmp_path / "half", console, step=3).state
    assert "all there" in console.file.getvalue()
    assert_alike(one, (again, lines(tmp_path / "half")))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.own")} == before


def test_batches_bring_the_taps_of_their_own_images(tmp_path):
    """Whatever the seed, tasks' labels or number of rows; threads and a copy by pickle read the same."""
    built = cached(experiment(tmp_path / "cache"))
    taps = built.data.taps["train"]
    assert pickle.loads(pickle.dumps(taps)) == taps
    flipped = cached(experiment(tmp_path / "cache", batch_size=16, **{"optimizer.learning_rate": 0.3}))
    with built.data.train(0, 2) as small, flipped.data.train(0, 1) as large:
        (wide,), both = list(large), list(small)
    for name, values in wide.items():
        np.testing.assert_array_equal(values, np.concatenate([batch[name] for batch in both]))
    views = {
        view: np.concatenate([np.fromfile(tmp_path / "cache" / "train" / f"00000.{view}", "<u4", ITEMS)])
        for view in VIEWS
    }
    assert not set(views["own"]) & set(views["mirrored"])


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.backbone_scale": 0.5}, r"config\.optimizer\.backbone_scale: \d+ arrays of the pretrained network"),
        ({"optimizer.backbone_scale": 1.0, "optimizer.frozen_layers": 4}, r"backbone_scale: 2 arrays .* as norm/bias"),
        ({"lora.rank": 2, "optimizer.backbone_scale": 1.0}, r"config\.lora\.rank: .*set it to None"),
        ({"augment.scale": (0.5, 2.0)}, r"config\.augment\.scale is \(0\.5, 2\.0\); it must be \(1, 1\)"),
        ({"augment.scale_crop": (1.0, 1.2)}, r"config\.augment\.scale_crop is \(1\.0, 1\.2\); it must be \(\)"),
        ({"augment.colour": True}, r"config\.augment\.colour is True; it must be False"),
    ],
    ids=["trained", "norm", "lora", "zoom", "crop", "colour"],
)
def test_what_changes_an_images_taps_is_refused_at_the_start(tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"(?s)config\.backbone_cache is .*{message}.*backbone_cache=''"):
        check_start(experiment(tmp_path / "cache", **changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_images_that_are_cropped_at_random_are_refused(tmp_path):
    built = experiment(tmp_path / "cache", **{"data.size": (32, 16), "data.fit": "pad"})
    with pytest.raises(InputError, match=r"20 images of train are larger than config\.data\.size.*fit='resize'"):
        cached(built)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, r"config\.dtype: 'float32' there, 'bfloat16' now"),
        ({"data.size": (32, 32)}, r"config\.data\.size: \[32, 24\] there, \[32, 32\] now"),
        ({"input_scale": 0.5}, r"config\.input_scale: 1\.0 there, 0\.5 now"),
        ({"backbones.vit.width": 4}, r"config\.backbones\.vit\.width: 8 there, 4 now"),
    ],
    ids=["dtype", "size", "scale", "width"],
)
def test_a_cache_of_another_configuration_is_refused_at_the_start(tmp_path, kept_cache, changes, message):
    with pytest.raises(InputError, match=rf"(?s){message}.*Give another directory"):
        check_start(experiment(kept_cache, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": ITEMS + 1}, r"items: 20 there, 21 now"),
        ({"data_seed": 5}, r"holds no row of this image of item 0"),
    ],
    ids=["length", "data"],
)
def test_a_cache_of_other_images_is_refused_by_name(kept_cache, changes, message):
    with pytest.raises(InputError, match=rf"(?s){message}.*[Gg]ive another"):
        cached(experiment(kept_cache, **changes))


def test_a_cache_of_other_weights_is_refused_by_name_and_one_of_other_additions_is_not(kept_cache):
    def moved(added):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + (("pyramid" in str(path)) == added), {"backbone": params()["backbone"]}
        )

    cached(experiment(kept_cache), lambda: moved(added=True))
    with pytest.raises(InputError, match=r"(?s)the backbone's parameters: '\w{32}' there, '\w{32}' now.*Give another"):
        cached(experiment(kept_cache), lambda: moved(added=False))


@pytest.fixture(scope="module")
def kept_cache(tmp_path_factory):
    """A whole cache, which no test may change."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    cached(experiment(directory))
    return directory


@pytest.fixture
def own_cache(kept_cache, tmp_path):
    return Path(shutil.copytree(kept_cache, tmp_path / "cache"))


def test_a_shard_that_is_cut_short_is_named(own_cache):
    shard = own_cache / "train" / "00000.mirrored"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged at .*00000\.mirrored: it has \d+ bytes .* Delete the file"):
        cached(experiment(own_cache))


@pytest.mark.parametrize("view", VIEWS)
def test_a_changed_byte_is_named_where_it_is_read(own_cache, view):
    built = cached(experiment(own_cache))
    shard = own_cache / "train" / f"00000.{view}"
    content = bytearray(shard.read_bytes())
    content[8 * ITEMS + 5 :: built.data.taps["train"].row_bytes] = b"\xa5" * ITEMS  # a byte of every row
    shard.write_bytes(content)
    with (
        pytest.raises(RuntimeError, match=rf"source noise, item \d+.*damaged at .*00000\.{view}: the row of item"),
        built.data.train(0, STEPS) as batches,
    ):
        list(batches)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{}", b'{"version": 1, "key": 3'], ids=["empty", "list", "keys", "cut"]
)
def test_a_damaged_header_is_named(own_cache, content):
    (own_cache / "train" / "cache.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cache\.json .*Delete .*it is made anew"):
        check_start(experiment(own_cache), own_cache / "run")


def test_somebody_elses_directory_is_not_written_to(tmp_path):
    (tmp_path / "cache" / "train").mkdir(parents=True)
    (tmp_path / "cache" / "train" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"has notes\.txt, but no cache\.json"):
        check_start(experiment(tmp_path / "cache"), tmp_path / "run")


def test_an_interrupted_pass_goes_on_from_the_shards_that_are_there(tmp_path, monkeypatch):
    """And never leaves a part of a file under its name."""
    monkeypatch.setattr("sgw_jax.data_pipelines.tap_cache.SHARD_BYTES", 30_000)
    whole = cached(experiment(tmp_path / "whole"))
    write, written = TapCache.write, []

    def dying(self, shard, rows):
        def until_the_end():
            for number, row in enumerate(rows):
                if len(written) == 2 and number == 1:
                    raise KeyboardInterrupt
                yield row

        write(self, shard, until_the_end())
        written.append(f"{self.directory.name}/{shard.name}")

    monkeypatch.setattr(TapCache, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        cached(experiment(tmp_path / "cut"))
    there = [f"train/{path.name}" for path in sorted((tmp_path / "cut" / "train").iterdir())]
    assert there == [*sorted(written), "train/cache.json"]
    done = list(written)
    written.append("more")
    assert cached(experiment(tmp_path / "cut")).data.taps["train"].shard == whole.data.taps["train"].shard
    assert not set(done) & set(written[3:])
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_disk_without_the_room_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(backbone_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"MB of it to be computed now; 0\.00 MB are free there\. Give a directory"):
        cached(experiment(tmp_path / "cache"))


def test_a_full_disk_is_named_by_the_directory_that_is_full():
    with (
        pytest.raises(DiskFullError, match="that holds cache is full"),
        disk_full_named(Path("run")),
        disk_full_named(Path("cache")),
    ):
        raise OSError(28, "No space left on device")
