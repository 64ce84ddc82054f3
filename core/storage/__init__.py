"""Conversations in SQLite, and as files.

Owns schema, migrations, search, export and import. Never loads a model and never trusts an imported file.

Public names: claim, claimed, Conversation, ConversationContent, make_title, ModelIdentity, NAME, Node,
NodeContent, NodeDraft, NodeState, reply_stats, SAVE_PERIOD_SECONDS, SERVED, STATE, state_path, Store,
StreamWriter.
"""
