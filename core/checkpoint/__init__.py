"""A model folder as checked, named, lazy tensors.

Owns names, shapes and layouts of every tensor, and the checks of untrusted files. Never computes with
weights, and never imports a network.
"""
