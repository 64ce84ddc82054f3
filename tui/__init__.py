"""The front ends: what a person types and sees. Everything about models is `qchat.core`'s."""

__version__ = "0.1.0"
