"""From ids to ids: sampling, prefill, decode, speculative decoding, and what ends a reply early.

Owns the settings of a reply. Never knows messages or templates; logits never leave it.

Public names: AnswerForm, AnyDecoder, Constraint, Decoder, draft_limit, DraftFigures, DraftMemory,
LoopGuard, make_decoder, MAX_DRAFTS, prefill, rank_next, Ranking, ReplySettings, resolve_sampling, Sampling,
StopStrings, ThinkingBudget, TimedChunks, Vocabulary.
"""
