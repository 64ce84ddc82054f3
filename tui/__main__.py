"""`python -m qchat.tui` is the `qchat` command."""

import sys

from .cli.main import main

sys.exit(main())
