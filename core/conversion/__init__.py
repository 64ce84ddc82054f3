"""One model folder into another, every tensor decided, written once and checked.

Owns source, staging, writing and verification. Never changes a source folder, and publishes a whole folder or
none.

Public names: CALIBRATION_TEXT, card, Check, ClassSummary, Conversion, ConversionResult, convert,
inspect_model, InspectionSummary, MAX_TEXT_NBYTES, plan_json, Progress, REPORT_NAME, Source, TensorSummary,
to_dense, weight_files_nbytes.
"""
