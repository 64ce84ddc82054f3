"""Models by name: on this machine, in the Hugging Face cache, on the hub.

Owns listing, downloading and deleting. Never imports MLX, and listing never touches the network.
"""
