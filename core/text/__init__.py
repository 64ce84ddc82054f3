"""Tokens, chat templates and the parsers of replies.

Owns everything between messages and ids. Never imports MLX.
"""
