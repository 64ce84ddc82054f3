"""What each tensor becomes when a model is quantized, and what that costs.

Owns recipes, plans, importance matrices and rounding. Never writes a model folder.
"""
