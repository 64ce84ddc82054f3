"""The engine process: JSON lines in and out, one request at a time.

Owns the protocol and the loop. Never imports a terminal library; it is ready before MLX is imported.

Public names: Cancelled, decode, encode, Failure, FRONT_END_VARIABLE, JOB_METHODS, LoadResult, MemoryResult,
MAX_LINE_NBYTES, ModelInfo, PromptResult, PROTOCOL_VERSION, RepliesResult, RESULTS, StateResult, UndoResult.
"""
