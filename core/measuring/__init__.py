"""Speed and quality of models: benchmarks, perplexity, divergence, calibration.

Owns the texts and statistics. Never runs inside a conversation.

Public names: calibrate_model, CHUNK_SIZE, compare_models, evaluate_model, measure, Measurements, RUNS.
"""
