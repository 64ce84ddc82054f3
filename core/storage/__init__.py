"""Conversations in SQLite, and as files.

Owns schema, migrations, search, export and import. Never loads a model and never trusts an imported file.
"""
