"""What each tensor becomes when a model is quantized, and what that costs.

Owns recipes, plans, importance matrices and rounding. Never writes a model folder.

Public names: as_json, BUILTIN_FOLDER, compensate, describe_gaps, describe_use, Factor, factorise, Folds,
GroupReport, Imatrix, load_config, make_plan, Options, Plan, PlannedClass, PlanSummary, quantize,
read_imatrix, Recipe, rounding_error, RoundingMethod, Statistics, tensor_class, VARIANTS, write_imatrix.
"""
