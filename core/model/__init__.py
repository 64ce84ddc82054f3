"""The network, its caches, and the memory it needs.

Owns the forward pass. Never reads a file, never samples, and knows neither folders nor ranks.
"""
