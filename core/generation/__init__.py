"""From ids to ids: sampling, prefill, decode, speculative decoding, and what ends a reply early.

Owns the settings of a reply. Never knows messages or templates; logits never leave it.
"""
