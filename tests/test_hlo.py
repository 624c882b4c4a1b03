"""What a compiled program exchanges and moves, against programs whose figures are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgw_jax.plan.hlo import group_size, memory_by, parse, traffic
from sgw_jax.sharding import make_mesh

MIB = 2**20


def compiled(function, *args, mesh=None, specs=()):
    if mesh is not None:
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, s)) for a, s in zip(args, specs)]  # noqa: B905
    return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize(
    ("collective", "kind", "sent"),
    [
        # Of 8 devices with 1 MiB each: round a ring every device sends 7/8 of the whole.
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 2 * MIB * 7 / 8),
        (lambda x: jax.lax.all_gather(x, "data", tiled=True), "all-gather", 8 * MIB * 7 / 8),
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", MIB * 7 / 8),
        (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), "all-to-all", MIB * 7 / 8),
        (lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), "collective-permute", MIB),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_each_collective_sends(collective, kind, sent):
    mesh = make_mesh({"data": 8})
    function = jax.shard_map(collective, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * MIB // 4,), jnp.float32)
    found = traffic(compiled(function, x, mesh=mesh, specs=[P("data")]))
    assert found.number == {kind: 1}
    assert found.exchanged[kind] == pytest.approx(sent)


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def body(carry, _):
        return jax.lax.psum(carry, "fsdp") / 4, None

    function = jax.shard_map(
        lambda x: jax.lax.scan(body, x, length=5)[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((4 * 1024,), jnp.float32)
    found = traffic(compiled(function, x, mesh=mesh, specs=[P("fsdp")]))
    assert found.number == {"all-reduce": 5}
    assert found.exchanged["all-reduce"] == pytest.approx(5 * 2 * 4096 * 3 / 4)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", 4),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b','c'}", 8),
        ("replica_groups=mesh['a'=16,'b'=2] {'a':(4)2}", 2),
        ("source_target_pairs={{0,1},{1,0}}", 2),
    ],
)
def test_notations_of_groups(attributes, size):
    assert group_size(attributes) == size


def test_memory_of_a_sum_is_its_operands_and_its_result():
    x = jax.ShapeDtypeStruct((MIB,), jnp.float32)
    assert traffic(compiled(jnp.add, x, x)).memory == pytest.approx(12 * MIB, rel=0.01)


def test_a_loop_that_reads_slices_reads_each_once():
    """A scan over stacked weights reads every layer's once, not the whole stack in every layer."""
    stack, x = jax.ShapeDtypeStruct((32, 256, 256), jnp.float32), jax.ShapeDtypeStruct((8, 256), jnp.float32)
    program = compiled(lambda x, w: jax.lax.scan(lambda c, m: (jnp.tanh(c @ m), None), x, w)[0], x, stack)
    whole = 32 * 256 * 256 * 4
    assert whole <= traffic(program).memory <= 4 * whole  # the slice, perhaps copied out before the product


def test_the_parser_reads_what_xla_writes():
    program = compiled(functools.partial(jnp.einsum, "ij,jk->ik"), np.ones((3, 4)), np.ones((4, 5)))
    computations, entry = parse(program)
    shapes = [x.shape for x in computations[entry].values() if x.opcode == "parameter"]
    assert sorted(shape.partition("{")[0] for shape in shapes) == ["f32[3,4]", "f32[4,5]"]


TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[1024]) -> bf16[512] {
  %input = bf16[1024]{0:T(1024)(128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[1024]{0} all-reduce(%input), channel_id=7, replica_groups={{0,1}}, to_apply=%add
  ROOT %slice = bf16[512]{0} slice(%all-reduce.1), slice={[0:512]}
}

%condition (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(24)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[])) -> (s32[]) {
  %b = (s32[]) parameter(0)
  %w = f32[256]{0} constant({...})
  %near = f32[256]{0:T(256)S(1)} add(%w, %w)
  %gather.1 = f32[1024]{0:T(1024)S(1)} all-gather(%near), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %gather.2 = f32[1024]{0:T(1024)S(1)} all-gather(%near), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (s32[]) tuple(%b)
}

ENTRY %main (p: bf16[1024]) -> bf16[512] {
  %p = bf16[1024]{0:T(1024)(128)(2,1)} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[]) tuple(%zero)
  %loop = (s32[], /*index=1*/f32[4]{0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %scattered = bf16[512]{0:T(512)(128)(2,1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_memory_by_what_is_asked():
    """The sum over the labels is the whole; a path is the traced program's."""
    x = jnp.ones((512, 512))
    program = compiled(lambda x: jnp.sort(x) @ x, x)
    found = memory_by(program, lambda instruction: instruction.path.rpartition("/")[2])
    assert sum(found.values()) == traffic(program).memory
    assert found["dot_general"] >= 3 * x.nbytes
    assert found["sort"] >= 2 * x.nbytes


def test_a_slice_copied_to_the_chip_is_read_alone():
    shapes = "((bf16[4,1024]{1,0}), bf16[1,1024]{1,0:S(1)}, s32[]{:S(2)})"
    line = f"  ROOT %s = {shapes} slice-start(%p), slice={{[0:1], [0:1024]}}"
    program = f"ENTRY %main (p: bf16[4,1024]) -> bf16[1,1024] {{\n  %p = bf16[4,1024]{{1,0}} parameter(0)\n{line}\n}}"
    assert traffic(program).memory == 2048


NESTED = """
%deeper (a: f32[24,256], b: s32[]) -> f32[1,256] {
  %a = f32[24,256]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = f32[1,256]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,256}
}

%fused (d: s32[], e: f32[24,256]) -> f32[1,256] {
  %d = s32[] parameter(0)
  %e = f32[24,256]{1,0} parameter(1)
  %f = f32[1,256]{1,0} fusion(%e, %d), kind=kLoop, calls=%deeper
  ROOT %g = f32[1,256]{1,0} negate(%f)
}

ENTRY %main (h: f32[24,256], i: s32[]) -> f32[1,256] {
  %h = f32[24,256]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  ROOT %j = f32[1,256]{1,0} fusion(%i, %h), kind=kOutput, calls=%fused
}
"""


def test_a_slice_in_a_fusion_in_a_fusion_is_read_alone():
    """As of a stack over layers, of which a step of the loop reads its own."""
    assert traffic(NESTED).memory == 2 * 1024


def test_how_a_tpu_writes_it():
    """A reduce-scatter as a fused all-reduce, a collective cut into pieces, loops without their number of turns, and
    on-chip buffers (S(1))."""
    found = traffic(TPU)
    assert found.number == {"reduce-scatter": 1, "all-gather": 24}
    assert found.exchanged["reduce-scatter"] == pytest.approx(2048 / 2)
    assert found.exchanged["all-gather"] == pytest.approx(24 * 4096 * 3 / 4)
    assert found.memory == pytest.approx(2048 + 1024 + 24 * 2 * 1024)  # the fusion's ends; twice the constant a turn
