"""What was read before: the live state, snapshots of earlier states in memory, and states on disk.

All conversations with an engine share it. Owns every decision of what is kept; never knows messages, and
never hands out a state for ids that it has not read exactly.

Public names: DISK_BUDGET, LiveState, Snapshot, SnapshotKind.
"""
