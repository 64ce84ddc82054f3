"""The operations that a model calls, each with a slow reference that tests compare it with.

Owns the choice between MLX's forms and own kernels, one `if` behind one name. Never holds state between
calls.
"""
