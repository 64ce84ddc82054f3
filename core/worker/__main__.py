"""`python -m qchat.core.worker`: serve this process's pipes."""

from .process import main

main()
