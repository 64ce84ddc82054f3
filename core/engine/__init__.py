"""A loaded model folder, on one machine or shared by ranks.

Owns loading and identity. Immutable after loading: everything that changes belongs to a session.

Public names: build_model, drop_collected, Engine, follow, follows, join_ranks, load_head, load_model,
stop_followers.
"""
