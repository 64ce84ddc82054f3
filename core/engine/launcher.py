"""The rank that `mlx.launch` gives each process it starts, read from the environment. Imports no MLX."""

import os

RANK_VARIABLE = "MLX_RANK"


def is_rank() -> bool:
    """Whether `mlx.launch` started this process, as one of several or alone."""
    return RANK_VARIABLE in os.environ


def follows() -> bool:
    """Whether this process is a follower: any rank but 0, which serves all requests."""
    return os.environ.get(RANK_VARIABLE, "0") != "0"
