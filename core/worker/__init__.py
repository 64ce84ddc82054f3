"""The engine process: JSON lines in and out, one request at a time.

Owns the protocol and the loop. Never imports a terminal library; it is ready before MLX is imported.
"""
