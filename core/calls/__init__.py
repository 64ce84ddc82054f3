"""Tool calls and structured answers: read from a model's text, or written as grammars that it must follow.

Owns the formats of calls and their tolerance. Never imports MLX.

Public names: call_style, CallGrammar, CallStyle, check_grammar, json_rule, matcher_error, NO_CALLS, Piece,
require_llguidance, Schema, ToolCallParser.
"""
