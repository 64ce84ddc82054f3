"""GPU kernels: one source text for Metal and CUDA, its launch, and compiled code on disk.

Owns shapes and tilings. Never decides whether a kernel is used: `ops` does, after a self test.

Public names: backend, compiler_version, decode_attention, delta_net, DENSE_WEIGHTS, dequantize,
dequantize_kernel, distrust, Experts, Kernel, matvec, MAX_FUSED_ROWS, route, route_kernel, run_matvec, Shape,
texts, WEIGHTS.
"""
