"""What each tensor becomes when a model is quantized, and what that costs.

Owns recipes, plans, importance matrices and rounding. Never writes a model folder.

Public names: Allocation, AllocationSummary, as_json, BLOCK, BUILTIN_FOLDER, check_options, compensate,
CurvePoint, cut_lower, describe_gaps, describe_use, Factor, factorise, Folds, GB, GroupReport, Imatrix,
KEEP_BF16_NAMES, load_config, make_plan, make_table, Options, Plan, PlannedClass, PlanSummary, quantize,
read_imatrix, read_nbytes, Recipe, RecipeFile, rounding_error, RoundingMethod, Statistics, tensor_class,
tensor_nbytes, unpack, VARIANTS, write_imatrix.
"""
