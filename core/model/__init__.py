"""The network, its caches, and the memory it needs.

Owns the forward pass. Never reads a file, never samples, and knows neither folders nor ranks.

Public names: AttentionLayer, Cache, DeltaLayer, DeltaState, DenseMLP, FeedForward, GatedAttention,
kernel_form, KVBuffer, KVCache, LayerCache, make_layer, MemoryPlan, MixedTokens, MixtureOfExperts, Model,
observe, observe_layer, plain_form, plan_folder, plan_memory, rms_norm.
"""
