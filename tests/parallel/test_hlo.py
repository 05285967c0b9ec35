"""What is read from the text of compiled programs."""

import pytest

from stdit_jax.parallel import hlo

TEXT = """HloModule toy

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %part = bf16[2,4]{1,0} fusion(%x), kind=kLoop, calls=%cast
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%part), channel_id=1, dimensions={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %x)
}

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] constant(28)
  ROOT %less = pred[] compare(%n, %n), direction=LT
}

%cast (q: f32[8,4]) -> bf16[2,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %c = bf16[2,4]{1,0} convert(%q)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%w), index=1
  ROOT %all-reduce.1 = f32[8,4]{1,0} all-reduce(%y), channel_id=2, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run():
  found = {(c.kind, c.bytes, c.times, c.in_loop) for c in hlo.collectives(TEXT)}
  assert found == {("all-gather", 64, 28, True), ("all-reduce", 128, 1, False)}
  # per turn: the fusion reads 128 and writes 16, the gather reads 16 and writes 64; at the end 128 twice
  assert hlo.memory_bytes(TEXT) == 28 * (128 + 16 + 16 + 64) + 2 * 128


SLICES = """HloModule toy

%inner (a: bf16[28,8,4], i: s32[]) -> bf16[8,4] {
  %a = bf16[28,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = bf16[8,4]{1,0} bitcast(%slice)
}

%outer (a: bf16[28,8,4], i: s32[], y: bf16[28,8,4]) -> (bf16[8,4], bf16[28,8,4]) {
  %a = bf16[28,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = bf16[28,8,4]{2,1,0} parameter(2)
  %taken = bf16[8,4]{1,0} fusion(%a, %i), kind=kLoop, calls=%inner
  %one = bf16[1,8,4]{2,1,0} bitcast(%taken)
  %put = bf16[28,8,4]{2,1,0} dynamic-update-slice(%y, %one, %i, %i, %i)
  ROOT %both = (bf16[8,4]{1,0}, bf16[28,8,4]{2,1,0}) tuple(%taken, %put)
}

ENTRY %main (a: bf16[28,8,4], i: s32[], y: bf16[28,8,4]) -> bf16[8,4] {
  %a = bf16[28,8,4]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %y = bf16[28,8,4]{2,1,0} parameter(2)
  %f = (bf16[8,4]{1,0}, bf16[28,8,4]{2,1,0}) fusion(%a, %i, %y), kind=kLoop, calls=%outer
  %near = bf16[8,4]{1,0:S(1)} get-tuple-element(%f), index=0
  %start = (bf16[8,4]{1,0}, bf16[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  %done = bf16[8,4]{1,0} copy-done(%start)
  ROOT %sum = bf16[8,4]{1,0:S(1)} add(%done, %near)
}
"""


def test_memory_counts_slices_and_leaves_out_what_stays_on_the_chip():
  slice_bytes = 8 * 4 * 2
  # the fusion reads one slice and writes one and its result; the copy writes one; the sum reads one, its other side is near
  assert hlo.memory_bytes(SLICES) == (1 + 2 + 1 + 1) * slice_bytes


@pytest.mark.parametrize(
  ("attributes", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, dimensions={0}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
  ],
)
def test_groups(attributes, groups):
  assert hlo.replica_groups(attributes).tolist() == groups


@pytest.mark.parametrize(
  ("kind", "groups", "expected"),
  [
    ("all-reduce", [[0, 1], [2, 3]], 0),  # within the slices
    ("all-reduce", [[0, 2], [1, 3]], 2 * 100 / 2),  # each sends its half over, and gets the sum of the other back
    ("all-reduce", [[0, 1, 2, 3]], 2 * 100 / 4),  # scattered within a slice first: half as much for each
    ("all-gather", [[0, 1, 2, 3]], 100 / 4),
    ("all-to-all", [[0, 2], [1, 3]], 50),
    ("collective-permute", [[0, 2], [1, 3]], 100),
  ],
)
def test_what_crosses_slices(kind, groups, expected):
  assert hlo.between_slices(kind, 100, groups, (0, 0, 1, 1)) == expected
