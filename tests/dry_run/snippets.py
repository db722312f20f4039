"""Small compiled programs as XLA prints them for TPUs: layouts with tiles and memory spaces, scheduled, partitioned."""

# ruff: noqa: E501

LOOP = """HloModule jit_layers, is_scheduled=true, num_partitions=8

%region_add (a.1: bf16[], b.1: bf16[]) -> bf16[] {
  %a.1 = bf16[] parameter(0)
  %b.1 = bf16[] parameter(1)
  ROOT %add.9 = bf16[] add(%a.1, %b.1)
}

%take_layer (param_0: bf16[5,64,32], param_1: s32[]) -> bf16[64,32] {
  %param_0 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %constant.2 = s32[]{:T(128)} constant(0)
  %dynamic_slice.1 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %constant.2, %constant.2), dynamic_slice_sizes={1,64,32}
  ROOT %bitcast.1 = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%dynamic_slice.1)
}

%multiply (param_0.1: bf16[2,16,64], param_1.1: bf16[5,64,32], param_2.1: s32[]) -> bf16[2,16,32] {
  %param_0.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[]{:T(128)S(6)} parameter(2)
  %fusion.2 = bf16[64,32]{1,0:T(8,128)(2,1)} fusion(%param_1.1, %param_2.1), kind=kLoop, calls=%take_layer
  ROOT %convolution.1 = bf16[2,16,32]{2,1,0:T(8,128)(2,1)S(1)} convolution(%param_0.1, %fusion.2), window={size=1}, dim_labels=0bf_io->0bf
}

%dense (arg.1: (bf16[2,16,64])) -> bf16[2,16,64] {
  %arg.1 = (bf16[2,16,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=0
  ROOT %psum.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} all-reduce(%gte.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%region_add
}

%reduced (arg.2: (bf16[2,16,64])) -> bf16[2,16,64] {
  %arg.2 = (bf16[2,16,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.2), index=0
  %scores = f32[2,8]{1,0:T(2,128)S(1)} custom-call(%gte.2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"a(b\\"c)","cost_estimate":{"flops":"1000","transcendentals":"7","bytes_accessed":"500"},"serialization_format":"1"}}
  %all-gather.1 = f32[2,32]{1,0:T(2,128)S(1)} all-gather(%scores), channel_id=2, replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true
  ROOT %copy.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} copy(%gte.2)
}

%body (state: (s32[], bf16[2,16,64], bf16[5,64,32], /*index=3*/pred[])) -> (s32[], bf16[2,16,64], bf16[5,64,32], /*index=3*/pred[]) {
  %state = (s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, bf16[5,64,32]{2,1,0:T(8,128)(2,1)}, /*index=3*/pred[]{:T(512)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %w = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %flag = pred[]{:T(512)} get-tuple-element(%state), index=3
  %fusion.1 = bf16[2,16,32]{2,1,0:T(8,128)(2,1)S(1)} fusion(%x, %w, %i), kind=kOutput, calls=%multiply, metadata={op_name="jit(layers)/while/body/dot_general" stack_frame_id=40}
  %tuple.1 = (bf16[2,16,64]{2,1,0:T(8,128)(2,1)}) tuple(%x)
  %conditional.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} conditional(%flag, %tuple.1, %tuple.1), branch_computations={%dense, %reduced}
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, bf16[5,64,32]{2,1,0:T(8,128)(2,1)}, /*index=3*/pred[]{:T(512)}) tuple(%i, %conditional.1, %w, %flag)
}

%condition (state.1: (s32[], bf16[2,16,64], bf16[5,64,32], /*index=3*/pred[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, bf16[5,64,32]{2,1,0:T(8,128)(2,1)}, /*index=3*/pred[]{:T(512)}) parameter(0)
  ROOT %flag.1 = pred[]{:T(512)} get-tuple-element(%state.1), index=3
}

ENTRY %main (w.1: bf16[5,64,32], x.1: bf16[2,16,64], n.1: s32[], f.1: pred[]) -> bf16[2,16,64] {
  %w.1 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %x.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %n.1 = s32[]{:T(128)} parameter(2)
  %f.1 = pred[]{:T(512)} parameter(3)
  %copy-start.1 = (bf16[2,16,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done.1 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %tuple.3 = (s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, bf16[5,64,32]{2,1,0:T(8,128)(2,1)}, /*index=3*/pred[]{:T(512)}) tuple(%n.1, %copy-done.1, %w.1, %f.1)
  %while.1 = (s32[]{:T(128)}, bf16[2,16,64]{2,1,0:T(8,128)(2,1)}, bf16[5,64,32]{2,1,0:T(8,128)(2,1)}, /*index=3*/pred[]{:T(512)}) while(%tuple.3), condition=%condition, body=%body
  ROOT %gte.9 = bf16[2,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""
"""A loop of unknown length over layers of a stack [5, 64, 32]: a product, then one of two branches."""

NESTED = """HloModule jit_decode

%inner_body (p.1: (f32[4,4])) -> (f32[4,4]) {
  %p.1 = (f32[4,4]{1,0}) parameter(0)
  %g.1 = f32[4,4]{1,0} get-tuple-element(%p.1), index=0
  %dot.1 = f32[4,4]{1,0} dot(%g.1, %g.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sort_loop = (f32[4,4]{1,0}) while(%p.1), condition=%always, body=%tile_body
  ROOT %t.1 = (f32[4,4]{1,0}) tuple(%dot.1)
}

%tile_body (p.4: (f32[4,4])) -> (f32[4,4]) {
  %p.4 = (f32[4,4]{1,0}) parameter(0)
  %g.4 = f32[4,4]{1,0} get-tuple-element(%p.4), index=0
  %dot.4 = f32[4,4]{1,0} dot(%g.4, %g.4), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t.4 = (f32[4,4]{1,0}) tuple(%dot.4)
}

%always (p.2: (f32[4,4])) -> pred[] {
  %p.2 = (f32[4,4]{1,0}) parameter(0)
  ROOT %c.2 = pred[] constant(true)
}

%outer_body (p.3: (f32[4,4])) -> (f32[4,4]) {
  %p.3 = (f32[4,4]{1,0}) parameter(0)
  ROOT %while.2 = (f32[4,4]{1,0}) while(%p.3), condition=%always, body=%inner_body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
}

ENTRY %main (x: f32[4,4]) -> (f32[4,4]) {
  %x = f32[4,4]{1,0} parameter(0)
  %t = (f32[4,4]{1,0}) tuple(%x)
  ROOT %while.3 = (f32[4,4]{1,0}) while(%t), condition=%always, body=%outer_body
}
"""
"""Decoding: a loop of unknown length around one over 5 layers, in which a loop of unknown length handles what overflows."""

TOWER_KERNEL = """HloModule jit_encode, is_scheduled=true

ENTRY %main (m: s32[1,3,2], w: s32[1,3,2], q: bf16[2,384,80], k: bf16[2,512,80], a: s32[384,128], s: s32[8,512]) -> bf16[2,384,80] {
  %m = s32[1,3,2]{2,1,0:T(4,128)} parameter(0)
  %w = s32[1,3,2]{2,1,0:T(4,128)} parameter(1)
  %q = bf16[2,384,80]{2,1,0:T(8,128)(2,1)} parameter(2)
  %k = bf16[2,512,80]{2,1,0:T(8,128)(2,1)} parameter(3)
  %a = s32[384,128]{1,0:T(8,128)S(1)} parameter(4)
  %s = s32[8,512]{1,0:T(8,128)} parameter(5)
  %kernel = (f32[128,80]{1,0:T(8,128)S(1)}, bf16[2,384,80]{2,1,0:T(8,128)(2,1)}) custom-call(%m, %w, %q, %k, %k, /*index=5*/%a, %s), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128, \\"block_kv_compute\\": 128}"
}}, metadata={op_name="jit(encode)/tower_attention/splash/pallas_call"}, backend_config={"custom_call_config":{"body":"TUz"}}
  %out = bf16[2,384,80]{2,1,0:T(8,128)(2,1)} get-tuple-element(%kernel), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  ROOT %copy.1 = bf16[2,384,80]{1,2,0:T(8,128)(2,1)} copy(%out)
}
"""
"""Three blocks of queries, each of which visits two of four blocks of keys."""
