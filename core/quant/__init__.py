"""Quantizing a checkpoint: what each tensor becomes (recipes), what that costs (plan), which inputs matter.

Nothing is imported here: each module is asked for by name.
"""
