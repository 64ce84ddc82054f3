"""Speed and quality of models: benchmarks, perplexity, divergence, calibration.

Owns the texts and statistics. Never runs inside a conversation.

Public names: Bench, BenchResult, BenchRun, calibrate_model, Calibration, CHUNK_SIZE, compare_models,
Comparison, evaluate_models, Evaluation, Evaluations, Interval, measure, measure_peer, measure_random,
Measurements, PeerFigures, PEERS, RUNS, Score.
"""
