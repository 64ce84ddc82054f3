"""The settings of a run: the table of all keys, and one object that holds each value with its origin.

Values come from flags, the environment, the project, the user's file, the model and defaults, and from what
the user changes during the run. Refuses unknown keys with the nearest known one, and bad values, in one
sentence with the source and the key. A project's file comes with any folder that one enters, so it may only
shape replies and their look (`Key.project`): no file or model names, no keys, no memory limits, no commands.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import UsageError
from ...core.quoting import quote_value
from .kinds import (
    OFF,
    Choice,
    Flag,
    Kind,
    Number,
    Refusal,
    SchemaFile,
    SchemaPath,
    Several,
    Size,
    Table,
    Text,
    Texts,
)
from .paths import config_file, make_config_dir
from .toml_file import edit_toml, read_toml

PROJECT_FILE = ".qchat.toml"
# qchat's own tools, which `tools/own.py` defines
TOOL_NAMES = ("read_file", "find_files", "shell", "calculate")
# in the order in which they are shown
PANE_NAMES = ("speed", "memory", "context", "thinking", "branches")
EFFORTS = ("none", "low", "medium", "high", "xhigh")
# environment variables that are not settings: the runtime's, and the location of the settings file
OTHERS = (
    "CONFIG_DIR", "ACTIVATIONS", "DENSE", "DRAFTING", "COMPILE", "DELTA", "KERNELS", "PRODUCTS",
    "BLAS", "BLAS_CORE", "MALLOC", "FRONT", "SUBNORMALS", "NATIVE", "NATIVE_THREADS", "TUNE",
    "PRESSURE", "API_KEY", "GRAPHS",
)  # fmt: skip
OTHER_VARIABLES = {f"QCHAT_{name}" for name in OTHERS}
# when a change takes effect
Applies = Literal["now", "next reply", "next load", "next start"]


@dataclass(frozen=True)
class Key:
    """A setting and everything that is decided about it.

    `reply` and `session` are its names as a parameter of replies and of sessions; `aliases` are other names
    that slash commands understand. `project`: a project's file may set it. `of_model`: the model's
    generation_config.json may recommend it, under the same name.
    """

    name: str
    kind: Kind
    meaning: str
    default: Any = None
    project: bool = False
    reply: str | None = None
    session: str | None = None
    of_model: bool = False
    applies: Applies = "now"
    aliases: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> Any:
        """Check a TOML value. Raises UsageError that begins with `where`."""
        try:
            return self.kind.check(value)
        except ValueError as problem:
            raise self._error(value, where, problem) from None

    def parse(self, text: str, where: str) -> Any:
        """Parse one word. Raises UsageError that begins with `where`."""
        try:
            return self.kind.read(text)
        except ValueError as problem:
            raise self._error(text, where, problem) from None

    def parameter(self, value: Any) -> Any:
        """Return a value as a reply takes it."""
        return value.schema if isinstance(value, SchemaFile) else value

    def written(self, value: Any) -> Any:
        """Return a value as a settings file has it."""
        if value is None:
            return OFF if isinstance(self.kind, SchemaPath) else "auto"
        return str(value) if isinstance(value, SchemaFile) else value

    def _error(self, value: Any, where: str, problem: ValueError) -> UsageError:
        why = f": {problem}" if isinstance(problem, Refusal) else f", wanted {self.kind.wanted}"
        return UsageError(f"{where}: {self.name} is {quote_value(value)}{why}")


def _reply(name: str, kind: Kind, meaning: str, **options: Any) -> Key:
    given = {"reply": name, "project": True, "applies": "next reply", **options}
    return Key(name, kind, meaning, **given)


def _sampling(name: str, kind: Kind, meaning: str, *aliases: str) -> Key:
    return _reply(name, kind, meaning, of_model=True, aliases=aliases)


KEYS: dict[str, Key] = {
    key.name: key
    for key in (
        Key("model", Text(), "the model that qchat starts with: a folder or a name"),
        Key("models_dir", Texts(separator=os.pathsep), "folders in which models are found", ["~/models"]),
        Key("system", Text(most=1 << 22), "the system prompt", project=True, session="system"),
        _reply(
            "think",
            Flag(auto=True),
            "think before answering; auto: as the model does",
            reply="enable_thinking",
        ),
        _reply("effort", Choice(EFFORTS), "how much to think", reply="reasoning_effort"),
        _reply(
            "thinking_budget",
            Number(0, 1 << 22, whole=True),
            "end each thought after this many tokens",
            reply="thinking_token_budget",
            aliases=("budget",),
        ),
        _reply(
            "drafts",
            Number(0, 16, whole=True),
            "the most draft tokens per step of speculative decoding; 0 turns it off",
            reply="draft_tokens",
        ),
        _reply(
            "max_tokens",
            Number(1, 1 << 22, whole=True),
            "the longest reply, in tokens",
            reply="max_new_tokens",
            aliases=("num_predict",),
        ),
        _reply("stop", Texts(), "texts that end a reply"),
        _reply("schema", SchemaPath(), "the file of the JSON schema that answers satisfy", project=False),
        _reply("stop_loops", Flag(), "end a thought or an answer that repeats itself endlessly"),
        _sampling("temperature", Number(0, 100), "0 takes the most likely token", "temp"),
        _sampling("top_p", Number(0, 1), "sample from the tokens that add up to this probability"),
        _sampling("top_k", Number(0, 1 << 22, whole=True), "sample from this many tokens; 0 keeps all"),
        _sampling("min_p", Number(0, 1), "drop tokens less likely than this times the most likely one"),
        _sampling(
            "repetition_penalty",
            Number(0.01, 100),
            "divides the logits of generated tokens; 1 has no effect",
            "repeat_penalty",
        ),
        _sampling("presence_penalty", Number(-100, 100), "subtracted from the logits of generated tokens"),
        _sampling("frequency_penalty", Number(-100, 100), "subtracted for each time a token was generated"),
        _reply("seed", Number(0, (1 << 63) - 1, whole=True), "the same seed gives the same reply"),
        Key("tools", Several(TOOL_NAMES), "tools of qchat's own that the model may call", []),
        Key(
            "max_tool_rounds",
            Number(1, 1000, whole=True),
            "how often in a row a reply may call tools",
            20,
        ),
        Key(
            "servers",
            Table(),
            "servers of tools, by name: a command with args, or a url",
            {},
            applies="next start",
        ),
        Key("show_thinking", Flag(), "show thoughts unfolded", False, project=True),
        Key(
            "history",
            Choice(("preserve", "strip")),
            "keep earlier thoughts in the context, or drop them",
            project=True,
            session="history",
        ),
        Key(
            "context_limit",
            Number(256, 1 << 24, whole=True),
            "refuse longer contexts, in tokens",
            session="context_limit",
            applies="next load",
            aliases=("num_ctx",),
        ),
        Key(
            "snapshot_budget",
            Size(),
            "memory for snapshots",
            session="snapshot_budget",
            applies="next load",
        ),
        Key(
            "image_tokens",
            Number(4, 1 << 16, whole=True),
            "the most tokens of a picture",
            session="image_tokens",
            applies="next load",
        ),
        Key("kv_bits", Choice((8, 16)), "bits of each cached key and value", 16, applies="next load"),
        Key(
            "theme",
            Text(r"[\w-]{1,40}", "the name of a theme, or auto"),
            "colour theme; auto matches the terminal",
            "auto",
            project=True,
        ),
        Key(
            "measure",
            Number(40, 400, whole=True, alone=0),
            "the widest line of text, in columns; 0: the whole width",
            100,
            project=True,
            applies="next start",
        ),
        Key(
            "pictures",
            Choice(("auto", "kitty", "blocks", "off")),
            "draw pictures by Kitty's protocol or in half blocks; auto: as the terminal can; off: name them",
            "auto",
        ),
        Key("panes", Flag(), "show the live panes", True),
        Key("shown_panes", Several(PANE_NAMES), "which panes there are", list(PANE_NAMES)),
        Key("live_bench", Flag(), "show the figures of each reply, and /stats of all branches", False),
        Key("copy_on_select", Flag(), "copy what the mouse selects", True),
        Key("mouse", Flag(), "use the mouse", True),
        Key("notify", Flag(), "notify you of a long reply's or job's end while you look elsewhere", True),
        Key("window_title", Flag(), "show conversation and progress in the window's title and taskbar", True),
        Key("plain", Flag(), "chat line by line instead of full-screen", False, applies="next start"),
        Key(
            "screen_reader",
            Flag(),
            "chat line by line, with words in place of drawings",
            False,
            applies="next start",
        ),
        Key("keys", Table(), "keys of actions, by action id", {}, applies="next start"),
    )
}


@dataclass(frozen=True)
class Setting:
    """A value and its origin: a flag, a variable, a file's path, a command, or "default".

    `given`: by the user, not by the model or as a default.
    """

    value: Any
    origin: str
    given: bool = True


class Settings(Mapping[str, Any]):
    """The values in force, by key, with their origins.

    A run has one such object. Whoever needs a value reads it here each time, and `change` is the only way to
    change one, so that every part of qchat sees the same value and can tell where it came from.
    """

    def __init__(self, settings: Mapping[str, Setting] | None = None):
        self._settings = {name: _default(name) for name in KEYS} | dict(settings or {})
        self.persona = ""  # the one that is on
        self._under: dict[str, Setting] = {}  # what it replaced

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        persona: tuple[str, Mapping[str, Any]] | None = None,
    ) -> "Settings":
        """Load all sources: flags by key (None: not given) before KEY=VALUE `options`, the `persona` with its
        settings, variables, files.

        Raises UsageError that names the file, flag or variable and the key.
        """
        env = os.environ if env is None else env
        under = _from_file(config_file(env), project=False)
        under |= _from_file((cwd or Path.cwd()) / PROJECT_FILE, project=True) | _from_environment(env)
        settings = cls(under)
        if persona is not None:
            settings.put_on(*persona, {name: settings.setting(name) for name in persona[1]})
        settings._settings |= _from_options(options) | _from_flags(flags or {})
        return settings

    def __getitem__(self, name: str) -> Any:
        return self._settings[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def origin(self, name: str) -> str:
        return self._settings[name].origin

    def given(self, name: str) -> bool:
        """Tell whether the user gave it."""
        return self._settings[name].given

    def change(self, name: str, value: Any, origin: str) -> None:
        """Change a setting for the rest of the run; None restores its default. Raises UsageError."""
        key = key_of(name, origin)
        changed = _default(key.name) if value is None else Setting(key.check(value, origin), origin)
        self._settings[key.name] = changed

    def setting(self, name: str) -> Setting:
        """Return a value with its origin."""
        return self._settings[name]

    def before_persona(self) -> dict[str, Setting]:
        """Return what the persona replaced, unless the user has changed it since."""
        origin = persona_origin(self.persona)
        return {name: old for name, old in self._under.items() if self.origin(name) == origin}

    def put_on(self, persona: str, values: Mapping[str, Any], under: Mapping[str, Setting]) -> None:
        """Take over the checked values of a persona; `under` is what comes back when it is put off."""
        self._settings |= under
        origin = persona_origin(persona)
        self._settings |= {name: Setting(value, origin) for name, value in values.items()}
        self.persona, self._under = persona, {name: under[name] for name in values}

    def record(self, name: str, value: Any, origin: str) -> None:
        """Record a value that is in force already, because another part decided it."""
        self._settings[name] = Setting(value, origin)

    def replaced(self, origin: str, **values: Any) -> "Settings":
        """Return a copy with these values. Raises UsageError."""
        copy = Settings(self._settings)
        for name, value in values.items():
            copy.change(name, value, origin)
        return copy

    def with_model(self, generation_config: Mapping[str, Any], origin: str) -> "Settings":
        """Return a copy with the recommendations of the model's authors where the user gave nothing."""
        recommended = {
            key.name: Setting(generation_config[key.name], origin, given=False)
            for key in KEYS.values()
            if key.of_model and generation_config.get(key.name) is not None and not self.given(key.name)
        }
        return Settings(self._settings | recommended)

    def reply(self) -> dict[str, Any]:
        """Return what the user gave for replies, by the names of their parameters."""
        return {
            key.reply: key.parameter(self[key.name])
            for key in KEYS.values()
            if key.reply and self.given(key.name) and self[key.name] is not None
        }

    def session(self) -> dict[str, Any]:
        """Return what the user gave for sessions, by the names of their parameters."""
        given = {key.session: self[key.name] for key in KEYS.values() if key.session and self.given(key.name)}
        return given | ({"quantized_kv": True} if self["kv_bits"] == 8 else {})


def persona_origin(persona: str) -> str:
    return f"persona {persona}"


def _default(name: str) -> Setting:
    return Setting(KEYS[name].default, "default", given=False)


def key_of(name: str, where: str) -> Key:
    """Return the key of this name, written with dashes or underscores. Raises UsageError with the nearest."""
    key = KEYS.get(name.replace("-", "_"))
    if key is None:
        near = nearest(name)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(KEYS)}"
        raise UsageError(f"{where}: there is no setting {name:.60}; {hint}")
    return key


def nearest(name: str, cutoff: float = 0.6) -> str | None:
    """Return the key whose name, or name as a reply's parameter, is most like `name`."""
    parameters = {key.reply: key.name for key in KEYS.values() if key.reply}
    near = closest(name.lower(), [*KEYS, *parameters], cutoff)
    return parameters.get(near or "", near)


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `known` that is most like `name`, or None if none is."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


def _from_flags(flags: Mapping[str, Any]) -> dict[str, Setting]:
    given = {name: value for name, value in flags.items() if value is not None}
    return {
        name: Setting(key_of(name, flag).check(value, flag), flag)
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
        layer[key.name] = Setting(key.parse(text, "-o"), f"-o {key.name}")
    return layer


def _from_environment(env: Mapping[str, str]) -> dict[str, Setting]:
    """Read QCHAT_ variables; an unknown one belongs to another program, unless it looks like a typo."""
    layer: dict[str, Setting] = {}
    for variable, text in env.items():
        if not variable.startswith("QCHAT_") or variable in OTHER_VARIABLES or not text:
            continue
        name = variable.removeprefix("QCHAT_").lower()
        if name in KEYS:
            layer[name] = Setting(KEYS[name].parse(text, variable), variable)
        elif near := nearest(name, 0.8):
            raise UsageError(f"qchat has no variable {variable}; did you mean QCHAT_{near.upper()}?")
    return layer


def _from_file(path: Path, *, project: bool) -> dict[str, Setting]:
    layer: dict[str, Setting] = {}
    for name, value in read_toml(path).items():
        key = key_of(name, str(path))
        if project and not key.project:
            raise UsageError(f"{path}: {key.name} may not be set by a project, only in {config_file()}")
        layer[key.name] = Setting(key.check(value, str(path)), str(path))
    return layer


def save(name: str, value: Any) -> Path:
    """Set a key in the user's file, None as "auto" or "off", and return its path. Raises UsageError."""
    path = config_file()
    value = KEYS[name].written(value)
    KEYS[name].check(value, str(path))
    make_config_dir()
    edit_toml(path, lambda table: table.update({name: value}))
    return path


def unsave(name: str) -> bool:
    """Remove a key from the user's file; return whether it was there. Raises UsageError."""
    path = config_file()
    if name not in read_toml(path):
        return False
    edit_toml(path, lambda table: table.pop(name))
    return True
