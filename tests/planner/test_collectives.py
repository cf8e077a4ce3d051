# SPDX-License-Identifier: Apache-2.0
"""The reader of compiled programs agrees with programs whose collectives are known by
construction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from align_jax.planner.collectives import _group, read_collectives, summarize
from align_jax.planner.hlo import array_bytes, array_shapes, memory_traffic, parse

LAYERS, WIDTH, ROWS = 5, 64, 16


def _mesh(data: int, fsdp: int) -> Mesh:
    devices = np.asarray(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _compile(mesh: Mesh) -> str:
    """A scan of layers whose weights are split over fsdp and gathered in each layer."""
    weights = jax.ShapeDtypeStruct(
        (LAYERS, WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None))
    )
    x = jax.ShapeDtypeStruct(
        (ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp")))
    )

    def apply(weights, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    return jax.jit(apply).lower(weights, x).compile().as_text()


def test_a_scanned_layers_collectives_count_once_a_layer():
    mesh = _mesh(2, 4)
    rows = {
        (row["kind"], row["axes"]): row
        for row in summarize(read_collectives(parse(_compile(mesh))), mesh.shape)
    }
    gather = rows["all-gather", "fsdp"]
    assert gather["count"] == LAYERS
    # each chip has a quarter and receives the rest
    assert gather["bytes"] == LAYERS * WIDTH * WIDTH * 4 * 3 / 4
    total = rows["all-reduce", "data+fsdp"]
    assert (total["count"], total["bytes"]) == (1, 2 * 4 * 7 / 8)


def test_a_program_on_one_device_has_no_collectives():
    assert read_collectives(parse(_compile(_mesh(1, 1)))) == []


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        (
            "replica_groups=mesh['a'=8,'b'=2] {'a':(2)2}",
            (0, 4),
        ),  # the middle factor of a = 2 x 2 x 2
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", (0, 3)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_every_spelling_of_a_replica_group_is_read(text, group):
    assert _group(text + ", use_global_device_ids=true") == group


def test_an_unknown_spelling_is_an_error():
    with pytest.raises(ValueError, match="form that this reader does not know"):
        _group("replica_groups=everything")


def test_an_asynchronous_collective_counts_once_and_an_unrolled_loop_by_its_steps():
    text = """
%fused_computation.1 (p.1: f32[4]) -> f32[8] {
  %ag.1 = f32[8]{0} all-gather(%p.1), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %start = (f32[4]{0}, f32[8]{0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.2 (p.2: f32[4]) -> f32[8] {
  ROOT %ag.2 = f32[8]{0:T(8,128)S(1)} all-gather(%p.2), replica_groups=[1,2]<=[2], dimensions={0}
}
%fused_computation.4 (p.4: f32[4]) -> f32[8] {
  %ag.4 = f32[8]{0} all-gather(%p.4), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %end = f32[8]{0} custom-call(%ag.4), custom_call_target="AsyncCollectiveDone"
}
%fused_computation.5 (p.5: f32[2]) -> f32[4] {
  %ag.5 = f32[4]{0} all-gather(%p.5), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  ROOT %other = (f32[2]{0}, f32[4]{0}) custom-call(%ag.5), custom_call_target="AsyncCollectiveStart"
}
%all-reduce-scatter.3 (p.3: f32[8]) -> f32[4] {
  %ar.3 = f32[8]{0} all-reduce(%p.3), channel_id=8, replica_groups=[1,2]<=[2], to_apply=%add
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %kernel = f32[4]{0} custom-call(%x), backend_config={
}
  %a = f32[8]{0} fusion(%x), calls=%fused_computation.1
  %m = f32[8]{0} fusion(%a), calls=%async_collective_fusion.2
  %b = f32[8]{0} fusion(%m), calls=%fused_computation.4
  %o = f32[4]{0} fusion(%h), calls=%fused_computation.5
  %c = f32[4]{0} fusion(%b), calls=%all-reduce-scatter.3
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %both = (s32[], f32[4]{0}) tuple(%next, %c)
}
%limit (q: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  %at = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%at, %n), direction=LT
}
ENTRY %main (x: f32[4]) -> f32[4] {
  ROOT %w = (s32[], f32[4]{0}) while(%t), condition=%limit, body=%body
}
"""
    found = sorted((c.kind, c.count, c.traffic) for c in read_collectives(parse(text)))
    # half of the bytes
    assert found == [("all-gather", 6, 8), ("all-gather", 6, 16), ("reduce-scatter", 6, 16)]


def test_what_shares_a_channel_but_not_its_place_is_another_collective():
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %gate = f32[8]{0} all-reduce(%x), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%add
  %up = f32[8]{0} all-reduce(%gate), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%add
  %recv = (f32[8]{0}, u32[]{:S(2)}, token[]) recv(%after-all), \
channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:1}"}
}
"""
    found = read_collectives(parse(text))
    assert sorted((c.kind, c.network) for c in found) == [
        ("all-reduce", False),
        ("all-reduce", False),
        ("all-reduce", True),
    ]


def test_a_turn_taken_out_of_a_loop_counts_beside_the_loop():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inside = f32[8]{0} all-reduce(%x), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %both = (s32[], f32[8]{0}) tuple(%next, %inside)
}
%limit (q: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(3)
  %at = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%at, %n), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%limit, body=%body
  ROOT %last = f32[8]{0} all-reduce(%y), channel_id=4, replica_groups=[1,2]<=[2], to_apply=%add
}
"""
    assert sorted(collective.count for collective in read_collectives(parse(text))) == [1, 3]


def test_shapes_and_bytes_of_a_programs_arrays_are_found():
    text = "%x = (bf16[2,3]{1,0}, f32[]) fusion(f32[4,5] %y)"
    assert array_bytes("(bf16[2,3]{1,0}, f32[])") == 16
    assert array_shapes(text)["f32", (4, 5)] == 80


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("hello")


def test_memory_traffic_counts_slices_of_stacked_weights_once_a_layer():
    program = parse(_compile(_mesh(1, 1)))
    weights, rows = LAYERS * WIDTH * WIDTH * 4, ROWS * WIDTH * 4
    # every layer's weights once or twice (a slice may be copied before its product), and a few
    # passes over the rows
    assert weights <= memory_traffic(program) <= 4 * weights + 12 * LAYERS * rows


def test_memory_traffic_sees_slices_within_fusions_and_updates_in_place():
    text = """
%slice.1 (p.1: f32[4,8], i.1: s32[]) -> f32[8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %s.1 = f32[8]{0} dynamic-slice(%p.1, %i.1), dynamic_slice_sizes={1,8}
}
%product.2 (p.2: f32[4,8], i.2: s32[]) -> f32[2] {
  %p.2 = f32[4,8]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %f.2 = f32[8]{0} fusion(%p.2, %i.2), kind=kLoop, calls=%slice.1
  ROOT %r.2 = f32[2]{0} convolution(%f.2, %f.2)
}
%write.3 (p.3: f32[4,8], u.3: f32[2]) -> f32[4,8] {
  %p.3 = f32[4,8]{1,0} parameter(0)
  %u.3 = f32[2]{0} parameter(1)
  ROOT %w.3 = f32[4,8]{1,0} scatter(%p.3, %i.3, %u.3), to_apply=%assign
}
ENTRY %main (x: f32[4,8], i: s32[]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %read = f32[2]{0} fusion(%x, %i), kind=kOutput, calls=%product.2
  ROOT %written = f32[4,8]{1,0} fusion(%x, %read), kind=kCustom, calls=%write.3
}
"""
    # 32 bytes of 128 are read, the index (4), 8 written; then 8 are read and written into their
    # place
    assert memory_traffic(parse(text)) == 32 + 4 + 8 + 8 + 8


def test_a_reduction_between_slices_is_read_from_the_transfer_to_the_host():
    program = parse("""
ENTRY %main (x: f32[64,8]) -> f32[64,8] {
  %recv = (f32[64,8]{1,0}, u32[]{:S(2)}, token[]) recv(%after-all), \
channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2}x{0:3}"}
}
""")
    (found,) = read_collectives(program)
    assert (found.kind, found.network, found.payload, found.group) == (
        "all-reduce",
        True,
        64 * 8 * 4,
        (0, 4),
    )
    assert found.axes({"data": 2, "fsdp": 4}) == ("data",)
