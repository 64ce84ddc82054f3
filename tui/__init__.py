"""The front ends: what a person types and sees. Everything about models is `qchat.core`'s."""

from qchat import __version__ as __version__  # absolute: the checkout's root is no package
