"""From ids to ids: sampling, prefill, decode, speculative decoding, and what ends a reply early.

Owns the settings of a reply. Never knows messages or templates; logits never leave it.

Public names: AnswerForm, AnyDecoder, Constraint, Decoder, describe_draw, draft_limit, DraftFigures,
DraftMemory, LoopGuard, make_decoder, MAX_DRAFTS, MAX_TOP_LOGPROBS, prefill, rank_each, rank_next, Ranking,
ReplySettings, resolve_sampling, Sampling, StopStrings, ThinkingBudget, TimedChunks, Vocabulary.
"""
