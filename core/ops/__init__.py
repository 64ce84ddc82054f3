"""The operations that a model calls, each with a slow reference that tests compare it with.

Owns the choice between MLX's forms and own kernels, one `if` behind one name. Never holds state between
calls.

Public names: as_stack, attention, choices, cut_weight, decay_and_beta, delta_form, delta_forms,
delta_speculative, Dimensions, Embedding, evaluate, ExpertsLinear, fits_stack, fused_matvec, gate_by_sigmoid,
gated_delta, gated_norm, join_weights, l2_normalise, Linear, make_linear, make_projections, masked_softmax,
materialize, MAX_FUSED_ROWS, Norm, Projections, relative_rms, Result, Rotary, sentences, settle, sigmoid,
silu, state_after, swiglu, TiledExperts, TiledLinear, Tuner, USUAL, Weight, winners.
"""
