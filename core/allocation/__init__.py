"""Bits for every matrix of a model under a byte budget, chosen by measured sensitivity.

Owns the measurement, its file, and the choice. Never writes a model folder; `conversion` takes the choice.

Public names: allocate, Budget, default_place, predict_folder.
"""
