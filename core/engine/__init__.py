"""A loaded model folder, on one machine or shared by ranks.

Owns loading and identity. Immutable after loading: everything that changes belongs to a session.
"""
