"""Every error that qchat raises on purpose; the command line turns each into one sentence and an exit code.

QchatError (1)
├── UsageError (2)                a flag, setting or argument that cannot be honoured
├── ModelError (3)                a model folder that is missing, damaged or of an unknown kind
│   ├── ConfigError               config.json or generation_config.json
│   ├── WeightsError              safetensors shards, their index, one tensor
│   ├── TokenizerError            tokenizer.json, tokenizer_config.json
│   └── TemplateError             the chat template, or messages it refuses
├── DoesNotFit (4)                more memory or disk than the machine has
│   └── ContextLengthExceeded     a prompt longer than the model or the memory allows
├── GenerationError (1)           a reply that began and could not go on
└── StoreError (1)                saved conversations that cannot be read, written or imported
"""


class QchatError(Exception):
    """One clear sentence for the user; `exit_code` is what the process ends with."""

    exit_code = 1


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
    """`prompt_tokens` were asked for and `limit` are possible; nothing was computed."""

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
