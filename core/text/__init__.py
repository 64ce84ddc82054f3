"""Tokens, chat templates and the parsers of replies.

Owns everything between messages and ids. Never imports MLX.

Public names: arrange_messages, call_style, CallGrammar, CallStyle, check_messages, json_rule, Kind,
leaves_thought_open, NO_CALLS, Piece, PlainParser, ReplyParser, Schema, separate_thought, Template,
ThinkSplitter, Tokenizer, ToolCallParser.
"""
