"""GPU kernels: one source text for Metal and CUDA, its launch, and compiled code on disk.

Owns shapes and tilings. Never decides whether a kernel is used: `ops` does, after a self test.
"""
