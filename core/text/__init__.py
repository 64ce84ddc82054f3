"""Tokens, chat templates and the parsers of replies.

Owns everything between messages and ids. Never imports MLX.

Public names: arrange_messages, check_messages, IMAGE_PART, Kind, leaves_thought_open, pair_messages,
PlainParser, ReplyParser, separate_thought, Template, ThinkSplitter, Tokenizer.
"""
