"""What `mlx.launch` tells each process that it starts about its rank, in the environment. Imports no MLX."""

import os

RANK_VARIABLE = "MLX_RANK"


def is_rank() -> bool:
    """Whether `mlx.launch` started this process, as one of several or alone."""
    return RANK_VARIABLE in os.environ


def follows() -> bool:
    """Whether this process computes for another one, rank 0, which alone is asked and answers."""
    return os.environ.get(RANK_VARIABLE, "0") != "0"
