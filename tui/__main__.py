"""`python -m qchat.tui` is the `qchat` command."""

import sys

from .cli import main

sys.exit(main())
