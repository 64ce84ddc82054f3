"""One model folder into another, every tensor decided, written once and checked.

Owns source, staging, writing and verification. Never changes a source folder, and publishes a whole folder or
none.

Public names: card, Conversion, convert, inspect_model, plan_json, Progress.
"""
