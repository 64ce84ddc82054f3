"""What can be set, and where each value comes from: flags, environment, project, user, model, default.

Owns the table of keys. Refuses unknown keys with the nearest known one, and bad values, in one sentence with
the file (or flag, or variable) and the key. A project's file comes with whatever folder one enters, so it may
only shape replies and their look (`Key.project`): nothing in it names a file or a model, changes keys or
decides about memory, and no key anywhere holds a command.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import UsageError
from .paths import config_file, make_config_dir
from .toml_file import read_toml, replace_line

PROJECT_FILE = ".qchat.toml"
MAX_TEXT = 1 << 14
EFFORTS = ("none", "low", "medium", "high", "xhigh")
# variables that other parts read: the runtime's choices, and where this file's own files are
OTHERS = (
    "CONFIG_DIR", "ACTIVATIONS", "DENSE", "DRAFTING", "COMPILE", "DELTA", "KERNELS", "PRODUCTS",
    "BLAS", "BLAS_CORE", "MALLOC", "FRONT", "SUBNORMALS", "NATIVE", "NATIVE_THREADS",
)  # fmt: skip
OTHER_VARIABLES = {f"QCHAT_{name}" for name in OTHERS}
YES, NO = ("true", "on", "yes", "1"), ("false", "off", "no", "0")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class Kind(Protocol):
    """What values a key takes; both functions raise ValueError for others."""

    @property
    def wanted(self) -> str: ...
    def check(self, value: Any) -> Any:
        """The value as it is kept, from TOML's."""
        ...

    def read(self, text: str) -> Any:
        """The same from a word, as in a variable of the environment."""
        ...


@dataclass(frozen=True)
class Flag:
    auto: bool = False  # whether "auto" is a third choice, kept as None

    @property
    def wanted(self) -> str:
        return "true, false or auto" if self.auto else "true or false"

    def check(self, value: Any) -> bool | None:
        if isinstance(value, bool):
            return value
        if self.auto and value == "auto":
            return None
        raise ValueError

    def read(self, text: str) -> bool | None:
        word = text.lower()
        return self.check(True if word in YES else False if word in NO else word)


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    whole: bool = False
    alone: float | None = None  # a value outside the range that means something of its own

    @property
    def wanted(self) -> str:
        alone = "" if self.alone is None else f", or {self.alone:g}"
        if self.whole:
            return f"a whole number from {self.low:,} to {self.high:,}{alone}"
        return f"a number from {self.low:g} to {self.high:g}{alone}"

    def check(self, value: Any) -> float:
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ValueError
        if not self.low <= value <= self.high and value != self.alone:
            raise ValueError
        return value

    def read(self, text: str) -> float:
        return self.check(int(text) if self.whole else float(text))


@dataclass(frozen=True)
class Size:
    wanted = "bytes, as a number or like '2 GB' or '512 MiB'"

    def check(self, value: Any) -> int:
        if isinstance(value, str):
            return self.read(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 50:
            return value
        raise ValueError

    def read(self, text: str) -> int:
        found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmg]i?|)b?", text.strip().lower())
        if found is None:
            raise ValueError
        return self.check(int(float(found[1]) * UNITS[found[2]]))


@dataclass(frozen=True)
class Choice:
    options: tuple[Any, ...]

    @property
    def wanted(self) -> str:
        return " or ".join(map(str, self.options))

    def check(self, value: Any) -> Any:
        if isinstance(value, bool) or value not in self.options:
            raise ValueError
        return value

    def read(self, text: str) -> Any:
        return self.check(next((option for option in self.options if str(option) == text), None))


@dataclass(frozen=True)
class Text:
    pattern: str = r"(?s).+"
    wanted: str = "a text"

    def check(self, value: Any) -> str:
        if isinstance(value, str) and len(value) <= MAX_TEXT and re.fullmatch(self.pattern, value):
            return value
        raise ValueError

    def read(self, text: str) -> str:
        return self.check(text)


@dataclass(frozen=True)
class Texts:
    most: int = 32
    separator: str | None = None  # between texts in one word; None: the word is one text

    @property
    def wanted(self) -> str:
        return f"at most {self.most} texts, none of them empty"

    def check(self, value: Any) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > self.most:
            raise ValueError
        return [Text().check(text) for text in texts]

    def read(self, text: str) -> list[str]:
        return self.check(text.split(self.separator) if self.separator else [text])


@dataclass(frozen=True)
class Table:
    """What is in it is checked by whoever uses it."""

    wanted = "a table"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError
        return value

    def read(self, text: str) -> dict[str, Any]:
        raise ValueError(text)


@dataclass(frozen=True)
class Key:
    """`reply` is the session's name for a setting of replies; `project`: a project's file may set it."""

    name: str
    kind: Kind
    meaning: str
    default: Any = None
    project: bool = False
    reply: str | None = None

    def checked(self, value: Any, where: str) -> Any:
        """Raises UsageError that begins with `where`."""
        try:
            return self.kind.check(value)
        except ValueError:
            raise self._wrong(value, where) from None

    def parsed(self, text: str, where: str) -> Any:
        """From one word. Raises UsageError that begins with `where`."""
        try:
            return self.kind.read(text)
        except ValueError:
            raise self._wrong(text, where) from None

    def _wrong(self, value: Any, where: str) -> UsageError:
        return UsageError(f"{where}: {self.name} is {value!r:.60}, wanted {self.kind.wanted}")


def _reply(name: str, kind: Kind, meaning: str, session_name: str = "") -> Key:
    return Key(name, kind, meaning, project=True, reply=session_name or name)


def _penalty(low: float) -> Number:
    return Number(low, 100)


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("model", Text(), "the model that qchat starts with: a folder or a name"),
        Key(
            "models_dir", Texts(separator=os.pathsep), "folders in which models are looked for", ["~/models"]
        ),
        Key("system", Text(), "the system prompt", project=True),
        _reply(
            "think", Flag(auto=True), "think before answering; auto: as the model does", "enable_thinking"
        ),
        _reply("effort", Choice(EFFORTS), "how much to think", "reasoning_effort"),
        _reply(
            "thinking_budget",
            Number(0, 1 << 22, whole=True),
            "end a thought after so many tokens",
            "thinking_token_budget",
        ),
        _reply(
            "drafts",
            Number(0, 16, whole=True),
            "tokens guessed ahead at most; 0 guesses none",
            "draft_tokens",
        ),
        _reply("max_tokens", Number(1, 1 << 22, whole=True), "the longest reply", "max_new_tokens"),
        _reply("stop", Texts(), "texts that end a reply"),
        _reply("temperature", Number(0, 100), "0 takes the likeliest token"),
        _reply("top_p", Number(0, 1), "keep the likeliest tokens up to this probability in all"),
        _reply("top_k", Number(0, 1 << 22, whole=True), "keep so many tokens; 0 keeps all"),
        _reply("min_p", Number(0, 1), "keep tokens at least this likely relative to the likeliest"),
        _reply("repetition_penalty", _penalty(0.01), "divides the logits of generated tokens; 1 is none"),
        _reply("presence_penalty", _penalty(-100), "subtracted from the logits of generated tokens"),
        _reply("frequency_penalty", _penalty(-100), "subtracted for each time a token was generated"),
        _reply("seed", Number(0, (1 << 63) - 1, whole=True), "equal seeds give equal replies"),
        Key("show_thinking", Flag(), "show thoughts unfolded", False, project=True),
        Key(
            "history",
            Choice(("preserve", "strip")),
            "keep earlier thoughts in the context or not",
            project=True,
        ),
        Key("context_limit", Number(256, 1 << 24, whole=True), "refuse longer contexts, in tokens"),
        Key("snapshot_budget", Size(), "memory for kept states"),
        Key("kv_bits", Choice((8, 16)), "bits of a kept key or value", 16),
        Key(
            "theme",
            Text(r"[\w-]{1,40}", "the name of a theme, or auto"),
            "colours; auto: what suits the terminal",
            "auto",
            project=True,
        ),
        Key(
            "measure",
            Number(40, 400, whole=True, alone=0),
            "the widest line of text, in columns; 0: the whole width",
            100,
            project=True,
        ),
        Key("copy_on_select", Flag(), "copy what the mouse selects", True),
        Key("mouse", Flag(), "use the mouse", True),
        Key("plain", Flag(), "chat line by line instead of full-screen", False),
        Key("screen_reader", Flag(), "line by line, with words for what is drawn", False),
        Key("keys", Table(), "keys of actions, by action id", {}),
    )
}
# how the model's generation_config.json names what it may set
OF_MODEL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True)
class Setting:
    """A value and what gave it: a flag, a variable, a file's path, or "default"."""

    value: Any
    origin: str
    given: bool = True  # by the user, not by the model or by default


class Settings(Mapping[str, Any]):
    """All settings in force, by key; `replaced` makes another one."""

    def __init__(self, settings: Mapping[str, Setting] | None = None):
        default = {key.name: Setting(key.default, "default", given=False) for key in KEYS.values()}
        self._settings = default | dict(settings or {})

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> "Settings":
        """Flags by key (None: not given), over `options` KEY=VALUE, over variables, over files.

        Raises UsageError that names the file, flag or variable and the key.
        """
        env = os.environ if env is None else env
        layers = (
            _from_file(config_file(env), project=False),
            _from_file((cwd or Path.cwd()) / PROJECT_FILE, project=True),
            _from_environment(env),
            _from_options(options),
            _from_flags(flags or {}),
        )
        return cls({name: setting for layer in layers for name, setting in layer.items()})

    def __getitem__(self, name: str) -> Any:
        return self._settings[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def origin(self, name: str) -> str:
        return self._settings[name].origin

    def given(self, name: str) -> bool:
        """Whether the user gave it."""
        return self._settings[name].given

    def replaced(self, origin: str, **values: Any) -> "Settings":
        """Return a copy with these values, checked. Raises UsageError."""
        changed = {
            name: Setting(key_of(name, origin).checked(value, origin), origin)
            for name, value in values.items()
        }
        return Settings(self._settings | changed)

    def without(self, name: str) -> "Settings":
        """Return a copy in which this setting has its default."""
        return Settings({key: setting for key, setting in self._settings.items() if key != name})

    def with_model(self, generation_config: Mapping[str, Any], origin: str) -> "Settings":
        """What the model's authors recommend, where nothing was given; the loader refuses bad values."""
        recommended = {
            name: Setting(generation_config[name], origin, given=False)
            for name in OF_MODEL
            if generation_config.get(name) is not None and not self.given(name)
        }
        return Settings(self._settings | recommended)

    def reply(self) -> dict[str, Any]:
        """What was given for replies, named as the session names it."""
        return {
            key.reply: self[key.name]
            for key in KEYS.values()
            if key.reply and self.given(key.name) and self[key.name] is not None
        }

    def session(self) -> dict[str, Any]:
        """What was given for a session, named as its parameters."""
        chosen = {
            name: self[name]
            for name in ("system", "history", "context_limit", "snapshot_budget")
            if self.given(name)
        }
        return chosen | ({"quantized_kv": True} if self["kv_bits"] == 8 else {})


def key_of(name: str, where: str) -> Key:
    """The key called so; dashes may stand for underscores. Raises UsageError with the nearest name."""
    key = KEYS.get(name.replace("-", "_"))
    if key is None:
        near = nearest(name)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(KEYS)}"
        raise UsageError(f"{where}: there is no setting {name:.60}; {hint}")
    return key


def nearest(name: str, cutoff: float = 0.6) -> str | None:
    """The key called most like `name`; the session's names for keys count too."""
    of_session = {key.reply: key.name for key in KEYS.values() if key.reply}
    near = closest(name.lower(), [*KEYS, *of_session], cutoff)
    return of_session.get(near or "", near)


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Setting]:
    given = {name: value for name, value in flags.items() if value is not None}
    return {
        name: Setting(key_of(name, flag).checked(value, flag), flag)
        for name, value in given.items()
        for flag in [f"--{name.replace('_', '-')}"]
    }


def _from_options(options: Sequence[str]) -> dict[str, Setting]:
    layer: dict[str, Setting] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise UsageError(f"-o {option:.60}: wanted KEY=VALUE")
        key = key_of(name.strip(), "-o")
        layer[key.name] = Setting(key.parsed(text, "-o"), f"-o {key.name}")
    return layer


def _from_environment(env: Mapping[str, str]) -> dict[str, Setting]:
    """Variables of unknown names are others' unless they look like a slip of the pen."""
    layer: dict[str, Setting] = {}
    for variable, text in env.items():
        if not variable.startswith("QCHAT_") or variable in OTHER_VARIABLES or not text:
            continue
        name = variable.removeprefix("QCHAT_").lower()
        if name in KEYS:
            layer[name] = Setting(KEYS[name].parsed(text, variable), variable)
        elif near := nearest(name, 0.8):
            raise UsageError(f"{variable} is no variable of qchat; did you mean QCHAT_{near.upper()}?")
    return layer


def _from_file(path: Path, *, project: bool) -> dict[str, Setting]:
    layer: dict[str, Setting] = {}
    for name, value in read_toml(path).items():
        key = key_of(name, str(path))
        if project and not key.project:
            raise UsageError(f"{path}: {key.name} may not be set by a project, only in {config_file()}")
        layer[key.name] = Setting(key.checked(value, str(path)), str(path))
    return layer


def remember(name: str, value: str) -> None:
    """Set a key to a text in the user's file, where nothing else changes. Raises UsageError."""
    path = config_file()
    value = KEYS[name].checked(value, str(path))
    try:
        make_config_dir()
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    replace_line(path, name, value)
