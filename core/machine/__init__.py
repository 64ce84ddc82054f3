"""This machine: MLX, the BLAS under it, memory, bandwidth, small files and the time remaining.

Owns the only import of MLX. Never knows a model, a token or a conversation.

Public names: cache_path, CHECK_SECONDS, choose_policy, copy_bandwidth, decode_text, device_free_nbytes,
device_limit_nbytes, DTYPES, file_nbytes, flush_process, fuse, fusion, host_total_nbytes, kernel_home,
Kernels, LFS_POINTER, loading, lock_folder, MAX_JSON_NBYTES, mlx_folder, model_limit_nbytes, mx, on_gpu,
parse_json, parse_json_value, parse_toml, Policy, PressureWatch, read_bytes, read_json, read_pressure,
read_text, Reading, refuse_lfs_pointer, resident_nbytes, return_freed_pages, TimeEstimate, unused_name,
user_folder, whole_file, write_whole.
"""
