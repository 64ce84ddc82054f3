"""GPU kernels: one source text for Metal and CUDA, its launch, and compiled code on disk.

Owns shapes and tilings. Never decides whether a kernel is used: `ops` does, after a self test.

Public names: backend, compiler_version, decode_attention, delta_net, DENSE_WEIGHTS, dequantize, distrust,
Experts, experts_product, fits, forced_on, group_rows, MAX_EXPERTS, MAX_FUSED_ROWS, MAX_TENSOR_ROWS, may_try,
route, Router, run_matvec, Shape, tensor_product, trust, tuned, WEIGHTS.
"""
