"""Bytes read from the text of compiled programs."""

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
  # In each iteration the fusion reads 128 bytes and writes 16, and the gather reads 16 and writes 64. The all-reduce after the
  # loop reads and writes 128.
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


def test_memory_counts_slices_but_not_on_chip_memory():
  slice_bytes = 8 * 4 * 2
  # The fusion reads one slice and writes two. The copy writes one, because its input is on the chip. The sum reads one,
  # because its other input and its result are on the chip.
  assert hlo.memory_bytes(SLICES) == (1 + 2 + 1 + 1) * slice_bytes


EXCHANGE = """HloModule toy

ENTRY %main (a: bf16[32,8]) -> bf16[32,8] {
  %a = bf16[32,8]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[32,8]{1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (bf16[32,8]{1,0}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true
  ROOT %received = bf16[32,8]{1,0} get-tuple-element(%recv), index=0
}
"""  # noqa: E501


def test_bytes_between_slices():
  assert hlo.slice_bytes(EXCHANGE) == 32 * 8 * 2
  assert hlo.slice_bytes(TEXT) == 0
