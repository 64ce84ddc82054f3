"""A model folder as checked, named, lazy tensors.

Owns names, shapes and layouts of every tensor, and the checks of untrusted files. Never computes with
weights, and never imports a network.

Public names: AFFINE_BITS, AFFINE_GROUPS, Assembler, body_specs, CheckedTensors, Checkpoint, Claim, Entry,
Fields, find_not_finite, find_shards, find_vision, FLOAT_MODES, FP8_BLOCK, Geometry, Hints, INDEX_NAME,
is_finite, is_vision, ITEM_NBYTES, LazyReader, load_generation_config, load_weights, MAX_INDEX_NBYTES,
MAX_SHARDS, Mode, ModelConfig, Module, MTP_NAMES, MTP_PREFIX, mtp_specs, not_finite, open_checkpoint, Packed,
parse_table, PATCHES, PLAIN_NAME, Progress, read_header, read_headers, regular_file, Shards, SliceReader,
Spec, split_part, stamp_files, Stored, Tensor, vision_specs, VisionConfig, VisionTensor, Watched, Weights,
WeightScope.
"""
