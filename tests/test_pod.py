"""Training steps compiled for a mesh: what the plan says of them, and what it refuses."""

import json

import jax
import pytest
from rich.console import Console

from sgw_jax.__main__ import main
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.plan.chips import CHIPS, GIB, chip_of
from sgw_jax.plan.pod import PodPlan, pod_plan, print_pod_plan, topology_devices
from sgw_jax.sharding import make_mesh, mesh_sizes

SMALL = (
    "--config.data.size=32,64",
    "--config.backbones.vit.patch_embed=patch",
    "--config.backbones.vit.width=16",
    "--config.backbones.vit.num_heads=2",
    "--config.channels=8",
    "--config.interactions.kem.num_slots=4",
    "--config.interactions.kem.top_k=4",
    "--config.batch_size=8",
)


SCALE = "--config.scales=8,"


def planned(*options):
    config = read_config("scenes:tasks=depth+normals", (*SMALL, *options))
    return pod_plan(build(config, None, mesh=make_mesh(mesh_sizes(**config.mesh), jax.devices())))


@pytest.fixture(scope="module")
def plans():
    """On eight devices: copies, and parameters in eight parts."""
    return {name: planned(f"--config.mesh.name={name}") for name in ("data", "fsdp")}


@pytest.mark.slow
def test_parts_of_the_parameters_take_less_room(plans):
    data, fsdp = plans["data"], plans["fsdp"]
    assert data.mesh == {"data": 8, "fsdp": 1, "context": 1}
    assert fsdp.mesh == {"data": 1, "fsdp": 8, "context": 1}
    config = read_config("scenes:tasks=depth+normals", SMALL)
    shapes = jax.eval_shape(
        lambda: build(config, None).model.init(jax.random.key(0), jax.numpy.zeros((1, 32, 64, 3)))["params"]
    )
    state = 3 * sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))  # parameters and two moments
    batch = 32 * 64 * (3 + 1 + 3) * 4  # one image a device
    assert data.arguments == pytest.approx(state + batch, rel=0.02)
    assert fsdp.arguments == pytest.approx(state / 8 + batch, rel=0.1)  # a hundredth may be repeated
    assert data.peak >= data.arguments + data.temporaries


@pytest.mark.slow
def test_flops_are_those_of_an_image(plans):
    assert plans["data"].flops == plans["fsdp"].flops
    # Nothing is recomputed: forward and twice that, without the image's gradient and with the losses' own products,
    # which count for something in so small a network.
    assert plans["data"].flops == pytest.approx(plans["data"].useful, rel=0.15)
    recomputed = planned("--config.mesh.name=data", "--config.backbones.vit.remat=full")
    assert recomputed.useful == plans["data"].useful
    assert recomputed.flops > plans["data"].flops


@pytest.mark.slow
def test_what_is_frozen_has_no_backward_pass(plans):
    frozen = planned("--config.mesh.name=data", "--config.optimizer.frozen_layers=4")
    assert frozen.flops < 0.9 * plans["data"].flops
    assert frozen.flops == pytest.approx(frozen.useful, rel=0.2)  # as above, of less


@pytest.mark.slow
def test_copies_exchange_gradients_alone(plans):
    """Twice the parameters' bytes round the ring, and losses and counts."""
    (sent,) = plans["data"].exchanged.values()
    gradients = (plans["data"].arguments - 32 * 64 * 7 * 4) / 3
    assert sent == pytest.approx(2 * gradients * 7 / 8, rel=0.15)
    assert len(plans["fsdp"].exchanged) >= 1


def test_the_estimate_is_the_roofline():
    chip = CHIPS["v5e"]
    found = PodPlan("TPU v5 lite", 4, {"data": 4}, 16, flops=197e12, useful=1e12, exchanged={"all-reduce": 45e9})
    assert chip_of(found.device) is chip
    times = found.seconds(chip)
    assert times["compute"] == 1
    assert times["exchange"] == 0.5
    assert (times["at least"], times["no overlap"]) == (1, 1.5)
    assert found.to_dict()["seconds"] == times


def test_all_figures_are_printed(capsys):
    """Half a second of computation, a tenth of memory and a tenth of exchange on a v5e."""
    found = PodPlan(
        "TPU v5 lite", 4, {"data": 2, "fsdp": 2}, 16, flops=98.5e12, useful=59.1e12, arguments=2 * GIB,
        temporaries=3 * GIB, peak=5.5 * GIB, exchanged={"all-gather": 3e9, "all-reduce": 6e9},
        number={"all-gather": 24, "all-reduce": 1200}, memory=81.9e9, memory_by={"rest": 1.9e9, "backbone": 80e9},
    )  # fmt: skip
    print_pod_plan(found, Console(width=200))
    output = " ".join(capsys.readouterr().out.split())
    for words in (
        "4 x TPU v5e, mesh data 2, fsdp 2 Batch 16: 4 images a device.",
        "arguments: state and batch │ 2.00",
        "temporaries │ 3.00",
        "peak │ 5.50 of 15.75",
        "all-reduce: 1,200 a step, 6,000.0 MB sent by a device. all-gather: 24 a step, 3,000.0 MB sent by a device.",
        "98.500 TFLOPs and 81.90 GB to and from memory a device and step.",
        "Of the memory's: backbone 80.00, rest 1.90 GB.",
        "Estimate (roofline at the published peaks; ms): compute 500.00, memory 100.00, exchange 100.00.",
        "at least: 500.00 ms a step, 32 images/s, MFU 60%",
        "no overlap: 700.00 ms a step, 23 images/s, MFU 43%",
        "197 TFLOP/s bf16, 819 GB/s, cloud.google.com/tpu/docs/v5e",
    ):
        assert words in output, output


def test_what_does_not_fit_is_said(capsys):
    found = PodPlan("TPU v5 lite", 4, {"data": 4}, 16, flops=1, useful=1, needed=20.5 * GIB)
    print_pod_plan(found, Console())
    output = " ".join(capsys.readouterr().out.split())
    assert "It does not fit: the step needs 20.50 of 15.75 GiB a device." in output
    assert "remat=full" in output


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    path = tmp_path / "plan.json"
    options = ["plan", "--config=scenes:tasks=depth+normals", *SMALL, "--topology=here", f"--json={path}"]
    assert main([*options, f"--cache_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert "mesh data 8, fsdp 1, context 1" in output
    assert "all-reduce" in output
    saved = json.loads(path.read_text())
    assert saved["step"]["devices"] == 8
    assert saved["macs_total"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology=v5litepod-4"], "--topology=v5litepod-4: expected a TPU slice such as v5e:4x4"),
        (["--topology=here", "--config.mesh.name=pod"], "config.mesh.name is 'pod'; it must be one of"),
        (["--topology=here", "--config.mesh.context=3"], "8 devices do not divide by 3"),
        (
            ["--topology=here", "--config.mesh.context=8", "--config.data.size=96,64", "--config.scales=8"],
            "context = 8 does not divide",
        ),
    ],
)
def test_bad_plans_are_refused(options, message, tmp_path, capsys):
    base = ["plan", "--config=scenes:tasks=depth", *SMALL, f"--cache_dir={tmp_path}"]
    assert main([*base, *options]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.tpu_aot
def test_a_step_for_a_tpu_slice():
    """Compiled for four TPU v5e by the real compiler, parameters in two parts and images in two."""
    mesh = make_mesh({"fsdp": 2, "context": 2}, topology_devices("v5e:2x2"))
    config = read_config("scenes:tasks=depth+normals", (*SMALL, "--config.dtype=bfloat16"))
    found = pod_plan(build(config, None, mesh=mesh))
    assert "v5" in found.device
    assert found.devices == 4
    assert found.needed is None
    assert 0 < found.arguments < found.peak < CHIPS["v5e"].memory
    assert {"all-gather", "all-reduce"} <= found.exchanged.keys()


@pytest.mark.tpu_aot
def test_a_step_that_does_not_fit_a_tpu_slice():
    options = ("--config.batch_size=1048576", "--config.dtype=bfloat16")
    config = read_config("scenes:tasks=depth+normals", (*SMALL, *options))
    found = pod_plan(build(config, None, mesh=make_mesh({"data": 4}, topology_devices("v5e:2x2"))))
    assert found.needed > CHIPS["v5e"].memory


@pytest.mark.tpu_aot
def test_an_unknown_slice_is_refused():
    with pytest.raises(ValueError, match=r"--topology=v5e:1x1: .* Slices are named like"):
        topology_devices("v5e:1x1")
