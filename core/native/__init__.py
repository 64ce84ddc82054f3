"""The decode step in C: its source text, its compilation on the user's machine, and the way to call it.

A few tokens go through the whole network in one call that reads weights as they are stored. It is compiled in
the background by whatever C compiler there is, kept in the cache folder, and never waited for. This package
knows nothing of models: `core/model/native_decode.py` fills its structures and hands over caches. Where it is
missing, refuses or fails, MLX computes the same.

Public names: address, copied, DeltaNet, finder, Library, MAX_ROWS, Pinned, structures, wanted.
"""
