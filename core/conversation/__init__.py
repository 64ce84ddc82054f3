"""One conversation: exact ids, replies, and their record on disk.

Owns everything that changes while a model answers. Never re-encodes generated ids from text, and never knows
a front end.

Public names: Branch, branch, CacheSummary, check_history, ConversationState, describe_cache,
describe_replies, describe_session, Encoder, History, Input, Node, Output, PendingReply, read_messages,
ReplyContext, score_reply, Session, ShownPicture, Signals, SnapshotSummary, SOON, tool_calls_of, ToolCall,
ToolResult, Turn, turn_number, TurnStats, with_pictures.
"""
