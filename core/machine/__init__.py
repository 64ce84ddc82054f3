"""This machine: MLX, the BLAS under it, memory, bandwidth, small files and the time remaining.

Owns the only import of MLX. Never knows a model, a token or a conversation.
"""
