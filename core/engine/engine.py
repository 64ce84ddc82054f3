"""A loaded model folder: config, tokenizer, chat template and network. None of it changes afterwards."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig, load_generation_config
from ..checkpoint.weights import Progress
from ..errors import DoesNotFit, UsageError
from ..generation.constraint import Vocabulary
from ..hub.names import model_name
from ..machine import fusion
from ..machine.backend import mx
from ..model.network import Model
from ..storage.records import ModelIdentity
from ..text.template import Template
from ..text.tokenizer import Tokenizer
from ..vision.images import Images
from ..vision.placement import is_image
from .followers import load_model
from .identity import read_identity
from .precompile import Precompiler

PROBE = [{"role": "user", "content": "?"}]


@dataclass(frozen=True)
class Engine:
    """Everything a session needs of a model; `notices` are sentences that the user should see once."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: Template
    model: Model
    generation_config: Mapping[str, Any]
    notices: tuple[str, ...]
    thinks_by_default: bool
    images: Images
    precompiler: Precompiler | None = None

    @classmethod
    def load(cls, path: str | Path, progress: Progress | None = None) -> "Engine":
        """Load the model folder `path`, reporting to `progress` as `load_model` does.

        Raises ModelError and its subclasses, with the file that is wrong.
        """
        folder = Path(path).expanduser()
        config = ModelConfig.load(folder)
        with ThreadPoolExecutor(1) as beside:  # a template's process starts while the vocabulary is read
            loading = beside.submit(Template.load, folder)
            tokenizer = Tokenizer.load(folder)
            template = loading.result()
        tokenizer.check_vocabulary(config.vocab_size)
        tokenizer.stop_ids |= frozenset(config.eos_token_ids)
        thinks = _thinks_by_default(template)
        model = load_model(folder, config, progress)
        precompiler = Precompiler(model, folder)
        precompiler.wait() if fusion.choice() == "on" else precompiler.load()
        notices = [template.notice] if template.notice else []
        return cls(
            folder=folder,
            config=replace(config, tie_word_embeddings=model.config.tie_word_embeddings),
            tokenizer=tokenizer,
            template=template,
            model=model,
            generation_config=load_generation_config(folder),
            notices=(*notices, *model.policy.notices),
            thinks_by_default=thinks,
            images=Images(folder, config, model.policy, shared=model.shared),
            precompiler=precompiler,
        )

    @property
    def name(self) -> str:
        return model_name(self.folder.resolve())

    @cached_property
    def identity(self) -> ModelIdentity:
        """The identity that stored conversations and states of this model carry. Raises ModelError."""
        return read_identity(self.folder, self.config.raw, self.template.source)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary for constrained replies. Raises UsageError where they are not possible."""
        return Vocabulary(self.tokenizer, self.config.vocab_size)

    @property
    def knows_efforts(self) -> bool:
        """Whether the chat template has its own reasoning efforts."""
        return "reasoning_effort" in self.template.source

    def context_limit(self, wanted: int | None, *, quantized: bool) -> tuple[int, list[str]]:
        """Return the longest context in tokens, at most `wanted`, and a notice if model or memory allow less.

        `quantized` means an 8-bit KV cache. Raises UsageError for a number below 1.
        """
        trained_for = self.config.max_position_embeddings
        try:
            plan = self.model.plan_for(wanted, quantized=quantized)
        except DoesNotFit:
            plan = self.model.plan_for(None, quantized=quantized)
        fits = plan.context if plan else trained_for
        if wanted is None or wanted <= fits:
            return wanted or fits, []
        memory = "more does not fit in this machine's memory"
        why = "the model supports no more" if fits == trained_for else memory
        return fits, [f"the context limit is {fits:,} tokens, not the {wanted:,} requested: {why}"]

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Compute the logits [T, V] float32 after each of `ids` [T], with an empty cache.

        Raises UsageError for no ids, and for an id outside the vocabulary: MLX would read past the end of it.
        """
        ids, size = list(ids), self.config.vocab_size
        wrong = [id for id in ids if not (0 <= id < size or is_image(id))]
        if wrong or not ids:
            found = f"the id {wrong[0]}" if wrong else "no ids"
            raise UsageError(f"cannot compute logits after {found}, wanted ids from 0 to {size - 1:,}")
        prompt, cache = self.images.mixed_prompt(ids), self.model.new_cache()
        if prompt and (tokens := prompt.chunk(0, len(ids))):
            return self.model.logits(self.model.hidden_with_images(tokens, cache))
        return self.model.logits(self.model.hidden(ids, cache))


def _thinks_by_default(template: Template) -> bool:
    """Whether the template thinks by default; those of small models do not."""
    off = template.render(PROBE, add_generation_prompt=True, enable_thinking=False)
    return template.render(PROBE, add_generation_prompt=True, enable_thinking=None) != off
