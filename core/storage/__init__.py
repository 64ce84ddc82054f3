"""Conversations in SQLite, and as files.

Owns schema, migrations, search, export and import. Never loads a model and never trusts an imported file.

Public names: Conversation, ConversationContent, make_title, ModelIdentity, Node, NodeContent, NodeDraft,
NodeState, reply_stats, SAVE_PERIOD_SECONDS, Store, StreamWriter.
"""
