"""Stateless replies: each request brings its whole conversation, and only what is new is read.

Owns the way from others' messages to exact ids. Remembers the ids of its own replies, never a conversation.

Public names: Completer, CompletionRequest.
"""
