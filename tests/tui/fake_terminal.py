"""A terminal in place of a standard stream."""

import io


class FakeTerminal(io.StringIO):
    """A stream that claims to be a terminal: what a person types, or what was written to the screen."""

    encoding = "utf-8"  # pyright: ignore

    def isatty(self) -> bool:
        return True
