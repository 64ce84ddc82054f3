"""Tool calls and structured answers: read from a model's text, or written as grammars that it must follow.

Owns the formats of calls and their tolerance. Never imports MLX.

Public names: call_style, CallGrammar, CallStyle, json_rule, NO_CALLS, Piece, Schema, ToolCallParser.
"""
