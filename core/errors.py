"""The errors that qchat raises on purpose; on the command line each is one sentence and an exit code.

QchatError (1)
├── UsageError (2)                an invalid flag, setting or argument
├── ModelError (3)                a missing, damaged or unsupported model folder
│   ├── ConfigError               config.json or generation_config.json
│   ├── WeightsError              safetensors shards, their index, one tensor
│   ├── TokenizerError            tokenizer.json, tokenizer_config.json
│   └── TemplateError             the chat template, or messages that it rejects
├── DoesNotFit (4)                not enough memory or disk space
│   └── ContextLengthExceeded     a prompt longer than the model or the memory allows
├── GenerationError (1)           a reply that failed after it began
└── StoreError (1)                saved conversations that cannot be read, written or imported
"""

from .quoting import bound_sentence


class QchatError(Exception):
    """An error whose message is one sentence for the user; `exit_code` is the exit status of the process.

    The message is bounded, whatever text of others it quotes.
    """

    exit_code = 1

    def __str__(self) -> str:
        return bound_sentence(super().__str__())


class UsageError(QchatError):
    exit_code = 2


class ModelError(QchatError):
    exit_code = 3


class ConfigError(ModelError):
    pass


class WeightsError(ModelError):
    pass


class TokenizerError(ModelError):
    pass


class TemplateError(ModelError):
    pass


class DoesNotFit(QchatError):
    exit_code = 4


class ContextLengthExceeded(DoesNotFit):
    """A prompt of `prompt_tokens` in a context of at most `limit`; raised before anything is computed."""

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, limit: int):
        super().__init__(
            f"the prompt has {prompt_tokens:,} tokens and the context holds {limit:,}: "
            "shorten it or start a new conversation"
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class GenerationError(QchatError):
    exit_code = 1


class StoreError(QchatError):
    exit_code = 1
