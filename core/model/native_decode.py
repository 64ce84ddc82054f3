"""A few tokens through the whole network by the library of `core/native`, in place of MLX's operations.

Keys and values are written in place behind what MLX wrote, which nobody else reads; recurrent states are
written in place only where this module made the arrays and nobody copied the cache since. Weights are read as
stored, so `tensors` stay alive beside what MLX multiplies with.
"""

import ctypes
import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.config import ModelConfig
from ..checkpoint.layouts import MTP_PREFIX
from ..checkpoint.packed import Packed
from ..checkpoint.weights import Tensor
from ..machine.backend import Policy, mx
from ..native import structures
from ..native.library import MAX_ROWS, Library, finder, wanted
from ..native.structures import Pinned, address, copied
from ..ops.agreement import relative_rms
from ..ops.rotary import Rotary
from .cache import Cache, DeltaState, KVCache, LayerCache, SpeculativeTokens
from .layers import AttentionLayer, DeltaLayer, Layer
from .native_prompt import NativePrompt

LANES = 16  # heads are read so many floats at a time
MOST_TAPS = 64
# relative RMS of hidden states between C and MLX; rounding alone gives 1e-6
LIMIT = 1e-2
PROBE = list(range(1, MAX_ROWS + 2))

PlainHidden = Callable[[mx.array, Cache, "NativeDecode | None"], mx.array]


def may_run(config: ModelConfig, policy: Policy) -> bool:
    """Whether the library, once there is one, can decode for this model here. Raises UsageError."""
    dims = [config.head_dim, config.linear_key_head_dim, config.linear_value_head_dim]
    fits = all(dim % LANES == 0 for dim in dims) and 1 < config.linear_conv_kernel_dim <= MOST_TAPS
    fits = fits and config.rotary_dim % 2 == 0 and config.conv_dim % LANES == 0
    return wanted() and fits and policy.activations == mx.float32 and policy.sum is None


def kept_nbytes(tensors: Mapping[str, Tensor], config: ModelConfig, policy: Policy) -> int:
    """Bytes that weights take as stored beside what MLX multiplies with, where the library may run."""
    if not may_run(config, policy):
        return 0
    return sum(_kept_nbytes(t, policy) for name, t in tensors.items() if not name.startswith(MTP_PREFIX))


def _kept_nbytes(tensor: Tensor, policy: Policy) -> int:
    if isinstance(tensor, Packed):
        scales = tensor.scales.nbytes + tensor.biases.nbytes if tensor.biases is not None else 0
        return tensor.nbytes if policy.dense else scales
    return tensor.nbytes if policy.dense and tensor.dtype != policy.activations else 0


class NativeTokens(NamedTuple):
    """Speculative tokens that C has read, and the function that commits them."""

    tokens: SpeculativeTokens
    commit_tokens: Callable[[DeltaState, SpeculativeTokens, int], None]

    def commit(self, state: DeltaState, count: int) -> None:
        self.commit_tokens(state, self.tokens, count)


class NativeDecode:
    """The decode step of one model; `notice` says in one sentence why it is not used and will not be."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]):
        self.config = config
        self.notice: str | None = None
        self._tensors = {n: t for n, t in tensors.items() if not n.startswith(MTP_PREFIX)}
        self._library: Library | None = None
        self._prompt: NativePrompt | None = None
        self._pinned = Pinned()
        self._network: structures.Network
        self._layers: ctypes.Array
        self._like = mx.zeros((1, config.num_key_value_heads, 1, config.head_dim))

    def adopt(self, plain: PlainHidden | None = None) -> None:
        """Use the library if it is there by now and has once agreed with MLX on such a model; where it never
        did, `plain`, MLX's hidden states for ids, is asked now.

        Raises UsageError where QCHAT_NATIVE=on is in vain."""
        if self._library or self.notice:
            return
        library = finder.find()
        if finder.notice:
            self._give_up(finder.notice)
        if library is None:
            return
        trust = library.path.with_name(f"{library.path.stem}-{self._signature()}.trusted")
        if plain is None and not trust.exists():
            return
        self._library, self._prompt = library, NativePrompt(library, self.config.rms_norm_eps)
        try:
            self._fill()
        except ValueError as error:
            self._give_up(f"the decode step in C does not read this model, so MLX decodes: {error}")
        if self._library and not trust.exists() and plain is not None:
            self._try(plain, trust)

    @property
    def is_used(self) -> bool:
        return self._library is not None

    def supports(self, count: int, cache: Cache) -> bool:
        """Whether `count` tokens can be read into this cache here and now."""
        return self._library is not None and 0 < count <= MAX_ROWS and not cache.quantized

    def hidden(self, ids: list[int], cache: Cache) -> mx.array:
        """Read a few ids into the layers of `cache`; hidden states [1, T, hidden] after the final norm."""
        return self._step(ids, cache, _open_state)

    def read_prompt(self, number: int, layer: Layer, x: mx.array, memory: LayerCache) -> mx.array:
        """Return layer `number`'s output [1, T, hidden] for a prompt x, by the library where it can."""
        if self._prompt is not None and isinstance(layer, DeltaLayer) and isinstance(memory, DeltaState):
            _own(memory)
            return self._prompt.delta_layer(layer, self._layers[number].delta, x, memory)
        if self._prompt is not None and isinstance(layer, AttentionLayer) and isinstance(memory, KVCache):
            return layer(x, memory) if memory.quantized else self._prompt.attention_layer(layer, x, memory)
        return layer(x, memory)

    def forward_speculative(self, ids: list[int], cache: Cache) -> mx.array:
        """Do what `hidden` does for ids of which `cache.commit` commits only the first ones."""

        def open_delta(memory: structures.Memory, layer: DeltaState) -> None:
            tokens = self._open_speculative(memory, layer, len(ids))
            layer.speculative = NativeTokens(tokens, self._commit)

        return self._step(ids, cache, open_delta)

    def logits(self, hidden: mx.array) -> mx.array | None:
        """Hidden states [1, T, hidden] to logits [T, V] float32; None for more rows than a call takes."""
        if self._library is None or hidden.shape[1] > MAX_ROWS:
            return None
        return self._library.product(self._network.head, hidden[0])

    def _step(
        self, ids: list[int], cache: Cache, open_delta: Callable[[structures.Memory, DeltaState], None]
    ) -> mx.array:
        """Run the library on `ids`; `open_delta` says where a delta net's state is read and written."""
        if self._library is None:
            raise ValueError("there is no library")
        memories = (structures.Memory * len(cache.layers))()
        for memory, layer in zip(memories, cache.layers, strict=True):
            if isinstance(layer, KVCache):
                self._open_keys(memory, layer, len(ids))
            else:
                open_delta(memory, layer)
        return self._library.step(self._network, memories, ids, cache.length, cache.shift)

    def _open_keys(self, memory: structures.Memory, layer: KVCache, count: int) -> None:
        """Make room for `count` tokens behind those of `layer`, and say where."""
        keys, values = layer.extend(count, [self._like, self._like])
        memory.first, memory.second, memory.capacity = address(keys), address(values), keys.shape[2]

    def _open_speculative(
        self, memory: structures.Memory, layer: DeltaState, count: int
    ) -> SpeculativeTokens:
        """Say where the states are, which C leaves as they are, and what it fills for `DeltaState.commit`."""
        config = self.config
        mx.eval(layer.conv, layer.state)
        shapes = (
            (layer.conv.shape[1] + count, config.conv_dim),
            (count, config.linear_num_key_heads, config.linear_key_head_dim),
            (count, config.linear_num_value_heads),
            (count, config.linear_num_value_heads, config.linear_value_head_dim),
        )
        tokens = SpeculativeTokens(*(mx.zeros((1, *shape)) for shape in shapes))
        mx.eval(*tokens)
        memory.window, memory.keys, memory.decays, memory.updates = map(address, tokens)
        memory.first, memory.second = address(layer.conv), address(layer.state)
        return tokens

    def _commit(self, layer: DeltaState, tokens: SpeculativeTokens, count: int) -> None:
        """Move the states of `layer` on by the first tokens of a speculative step, in place where it may."""
        if self._library is None:
            raise ValueError("there is no library")
        config = self.config
        sizes = structures.DeltaNet(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
        )
        conv, state = _own(layer)
        self._library.commit_delta(sizes, count, tokens.keys, tokens.decays, tokens.updates, state)
        layer.conv = mx.contiguous(tokens.window[:, count : count + conv.shape[1]])  # [B, K-1, channels]

    # --- the network as C sees it ---

    def _give_up(self, notice: str) -> None:
        self.notice, self._library, self._prompt = notice, None, None
        self._tensors, self._pinned = {}, Pinned()

    def _fill(self) -> None:
        """Raises ValueError for weights that C does not read."""
        config = self.config
        self._layers = (structures.Layer * config.num_hidden_layers)()
        for number, kind in enumerate(config.layer_types):
            self._fill_layer(self._layers[number], f"layers.{number}.", kind == "full_attention")
        embedding = self._matrix("embed_tokens")
        head = embedding if config.tie_word_embeddings else self._matrix("lm_head")
        self._network = structures.Network(
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            widest=_widest(config),
            eps=config.rms_norm_eps,
            norm=self._floats("norm"),
            all=ctypes.addressof(self._layers),
            embedding=embedding,
            head=head,
        )
        self._tensors = {}  # what is needed of them is pinned

    def _fill_layer(self, layer: structures.Layer, prefix: str, attends: bool) -> None:
        layer.attends = attends
        layer.input_norm = self._floats(f"{prefix}input_layernorm")
        layer.post_norm = self._floats(f"{prefix}post_attention_layernorm")
        if attends:
            layer.attention = self._attention(f"{prefix}self_attn.")
        else:
            layer.delta = self._delta_net(f"{prefix}linear_attn.")
        layer.block = self._experts(f"{prefix}mlp.") if self.config.is_moe else self._dense(f"{prefix}mlp.")

    def _attention(self, prefix: str) -> structures.Attention:
        config, rotary = self.config, Rotary(self.config)
        norms = {name: rotary.scale_norm(self._vector(prefix + name)) for name in ("q_norm", "k_norm")}
        return structures.Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=config.head_dim,
            rotary=config.rotary_dim,
            **{name: self._pinned.floats(norm) for name, norm in norms.items()},
            frequencies=self._pinned.floats(rotary.frequencies),
            **{name: self._matrix(f"{prefix}{name}_proj") for name in "qkv"},
            out=self._matrix(f"{prefix}o_proj"),
        )

    def _delta_net(self, prefix: str) -> structures.DeltaNet:
        config = self.config
        taps = self._vector(f"{prefix}conv1d").astype(mx.float32).T  # [K, channels]
        return structures.DeltaNet(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            taps=config.linear_conv_kernel_dim,
            conv=self._pinned.floats(taps),
            norm=self._floats(f"{prefix}norm"),
            log_a=self._floats(f"{prefix}A_log"),
            dt_bias=self._floats(f"{prefix}dt_bias"),
            **{name: self._matrix(f"{prefix}in_proj_{name}") for name in ("qkv", "z", "a", "b")},
            out=self._matrix(f"{prefix}out_proj"),
        )

    def _dense(self, prefix: str) -> structures.FeedForward:
        return structures.FeedForward(
            **{name: self._matrix(f"{prefix}{name}_proj") for name in ("gate", "up", "down")}
        )

    def _experts(self, prefix: str) -> structures.FeedForward:
        config = self.config
        names = {
            **{name: f"switch_mlp.{name}_proj" for name in ("gate", "up", "down")},
            "router": "gate",
            "shared_gate": "shared_expert_gate",
            "shared_expert_gate": "shared_expert.gate_proj",
            "shared_up": "shared_expert.up_proj",
            "shared_down": "shared_expert.down_proj",
        }
        return structures.FeedForward(
            **{field: self._matrix(prefix + name) for field, name in names.items()},
            experts=config.num_experts,
            top=config.num_experts_per_tok,
            inner=config.moe_intermediate_size,
            shared_inner=config.shared_expert_intermediate_size,
            renormalise=config.norm_topk_prob,
        )

    def _vector(self, name: str) -> mx.array:
        tensor = self._tensors[name]
        if isinstance(tensor, Packed):
            raise ValueError(f"{name} is packed")
        return tensor

    def _floats(self, name: str) -> int:
        return self._pinned.floats(self._vector(name))

    def _matrix(self, name: str) -> structures.Matrix:
        matrix = self._pinned.matrix(self._tensors[name])
        if self._library is None or not self._library.takes(matrix):
            raise ValueError(f"{name} is stored in a form that it does not know")
        return matrix

    # --- trust ---

    def _signature(self) -> str:
        """Changes with everything that chooses among the library's code, and with MLX."""
        config = self.config
        forms = {str(t.geometry) if isinstance(t, Packed) else str(t.dtype) for t in self._tensors.values()}
        sizes = {
            name: value for name, value in vars(config).items() if isinstance(value, int | tuple | float)
        }
        told = (version("mlx"), sorted(forms), sorted(sizes.items()))
        return hashlib.sha256(repr(told).encode()).hexdigest()[:12]

    def _try(self, plain: PlainHidden, trust: Path) -> None:
        """Compare with MLX on a few ids; from now on trust the library with such models, or leave it."""
        ids = [id % self.config.vocab_size for id in PROBE]
        caches = [Cache.empty(self.config, mx.float32) for _ in range(3)]
        expected = plain(mx.array(ids), caches[0], None)
        prompt = plain(mx.array(ids), caches[1], self)
        parts = []
        for some in (ids[:-1], ids[-1:]):
            parts.append(self.hidden(some, caches[2]))
            caches[2].length += len(some)
        errors = [relative_rms(found, expected) for found in (prompt, mx.concatenate(parts, axis=1))]
        error = max(errors, key=lambda error: (math.isnan(error), error))
        if not error < LIMIT:  # also for NaN
            self._give_up(f"the decode step in C is off by {error:.2g} here, so MLX decodes, which is slower")
            return
        with suppress(OSError):
            trust.touch()


def _open_state(memory: structures.Memory, layer: DeltaState) -> None:
    """Let C write the state of `layer` in place."""
    memory.first, memory.second = (address(array) for array in _own(layer))


def _own(layer: DeltaState) -> tuple[mx.array, mx.array]:
    """The states of `layer` in arrays that nobody else holds."""
    if layer.private is not layer.state:
        layer.conv, layer.state = copied(layer.conv), copied(layer.state)
        layer.private = layer.state
    return layer.conv, layer.state


def _widest(config: ModelConfig) -> int:
    """Floats of the widest row between two products of a layer."""
    heads = max(2 * config.num_attention_heads, config.num_key_value_heads)
    shared = config.shared_expert_intermediate_size
    wide = (heads * config.head_dim, config.conv_dim, config.value_dim, config.num_experts, shared)
    return max(config.hidden_size, config.intermediate_size, *wide)
