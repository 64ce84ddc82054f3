"""One conversation: exact ids, replies, and their record on disk.

Owns everything that changes while a model answers. Never re-encodes generated ids from text, and never knows
a front end.

Public names: Branch, CacheSummary, ConversationState, describe_cache, describe_session, History, Session,
SnapshotSummary, ToolCall, Turn, TurnStats.
"""
