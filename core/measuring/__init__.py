"""Speed and quality of models: benchmarks, perplexity, divergence, calibration.

Owns the texts and statistics. Never runs inside a conversation.
"""
