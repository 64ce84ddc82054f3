"""A model folder, loaded: config, tokenizer, chat template and network, none of which changes afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config import ModelConfig, load_generation_config
from ..checkpoint.weights import Progress
from ..errors import TokenizerError, UsageError
from ..machine import fusion
from ..machine.backend import mx
from ..model.network import Model
from ..text.template import Template
from ..text.tokenizer import Tokenizer
from .followers import load_model
from .precompile import Precompiler

PROBE = [{"role": "user", "content": "?"}]


@dataclass(frozen=True)
class Engine:
    """What a session needs of a model; `notices` are sentences the user should see once."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: Template
    model: Model
    generation_config: Mapping[str, Any]
    notices: tuple[str, ...]
    thinks_by_default: bool
    precompiler: Precompiler | None = None

    @classmethod
    def load(cls, path: str | Path, progress: Progress | None = None) -> "Engine":
        """Load the model folder `path`, telling `progress` how far its weights are, as `load_model` does.

        Raises ModelError and its children, each naming what is wrong.
        """
        folder = Path(path).expanduser()
        config = ModelConfig.load(folder)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size:,} entries and the model's "
                f"vocabulary {config.vocab_size:,}: they do not belong together"
            )
        tokenizer.stop_ids |= frozenset(config.eos_token_ids)
        template = Template.load(folder)
        thinks = _thinks_by_default(template)
        model = load_model(folder, config, progress)
        precompiler = Precompiler(model, folder)
        precompiler.wait() if fusion.choice() == "on" else precompiler.load()
        notices = [template.notice] if template.notice else []
        return cls(
            folder=folder,
            config=config,
            tokenizer=tokenizer,
            template=template,
            model=model,
            generation_config=load_generation_config(folder),
            notices=(*notices, *model.policy.notices),
            thinks_by_default=thinks,
            precompiler=precompiler,
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def logits(self, ids: Sequence[int]) -> mx.array:
        """Logits [T, V] float32 after each of `ids` [T], computed from nothing.

        Raises UsageError for no ids and for one outside the vocabulary, which MLX would read beyond its end.
        """
        ids, size = list(ids), self.config.vocab_size
        wrong = [id for id in ids if not 0 <= id < size]
        if wrong or not ids:
            found = wrong[0] if wrong else "nothing"
            raise UsageError(f"logits were asked for after {found}, wanted ids from 0 to {size - 1:,}")
        return self.model.logits(self.model.hidden(ids, self.model.new_cache()))


def _thinks_by_default(template: Template) -> bool:
    """What the template does when it is told nothing: small models' templates leave thinking off."""
    off = template.render(PROBE, add_generation_prompt=True, enable_thinking=False)
    return template.render(PROBE, add_generation_prompt=True, enable_thinking=None) != off
