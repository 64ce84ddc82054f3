"""Models by name: on this machine, in the Hugging Face cache, on the hub.

Owns listing, downloading and deleting. Never imports MLX, and listing never touches the network.

Public names: BUILT_IN_MODEL, download_model, DownloadPlan, DownloadProgress, find_model, Fit, FOLDER,
library, local_model, LocalModel, Locations, model_name, model_names, ModelNotDownloaded, plan_download,
PUBLISHED, PublishedModel, rank_models, Removal.
"""
