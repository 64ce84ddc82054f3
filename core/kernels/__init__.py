"""GPU kernels: one source text for Metal and CUDA, its launch, and compiled code on disk.

Owns shapes and tilings. Never decides whether a kernel is used: `ops` does, after a self test.

Public names: addresses, backend, Buffers, compiler_version, copy_after, decode_attention, delta_net,
DENSE_WEIGHTS, dequantize, distrust, driver, DriverError, Experts, experts_product, fits, forced_on, Graph,
graph_of, group_rows, is_recorded, join, MAX_EXPERTS, MAX_FUSED_ROWS, MAX_TENSOR_ROWS, may_try,
read_with_addresses, Recording, route, Router, rows, run_matvec, Shape, signal, split_count, tensor_product,
trust, tuned, WEIGHTS, WORDS.
"""
