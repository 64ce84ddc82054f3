"""Print a script that completes qchat's words in bash, zsh or fish. Add one line to the shell's own file:
bash: `eval "$(qchat completion bash)"`, zsh: `eval "$(qchat completion zsh)"`,
fish: `qchat completion fish | source`."""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ...text.output import write
from . import VERBS, parser_of

PLACES = {"FOLDER": "folder", "MODEL": "folder", "FILE": "file"}  # metavars whose values are paths
LINE = "\n"
ZSH_PLACES = {"folder": "_path_files -/", "file": "_files", "": " "}


@dataclass(frozen=True)
class Option:
    """One option: its spellings, what it means, and what may follow: None for nothing, words, or a path."""

    flags: tuple[str, ...]
    help: str
    value: tuple[str, ...] | str | None


@dataclass(frozen=True)
class Verb:
    """A command and what may come after it; `name` is empty for `qchat` itself."""

    name: str
    help: str
    words: tuple[tuple[str, str], ...]  # first words after it, each with its meaning
    place: str  # what else its words are: "folder", "file" or ""
    options: tuple[Option, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="for which shell")


def run(args: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    from ..arguments import parser

    main = _verb("", "", parser())
    main = Verb("", "", tuple(VERBS.items()), "folder", main.options)
    verbs = [_verb(name, help_, parser_of(name)) for name, help_ in VERBS.items()]
    write(sys.stdout, SCRIPTS[args.shell]([main, *verbs]))
    return 0


# --- what the parsers say ---


def _verb(name: str, help_: str, parser: argparse.ArgumentParser) -> Verb:
    words: list[tuple[str, str]] = []
    place = ""
    for action in parser._actions:
        if not action.option_strings:
            words += _words(action)
            place = place or _place(action)
    return Verb(name, help_, tuple(words), place, tuple(_options(parser)))


def _words(action: argparse.Action) -> list[tuple[str, str]]:
    if isinstance(action, argparse._SubParsersAction):
        return [(part.dest, part.help or "") for part in action._choices_actions]
    return [(str(choice), "") for choice in action.choices or ()]


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    """Yield the parser's options and those of its actions, each once."""
    seen: set[str] = set()
    parts = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += action.choices.values()
    for action in (action for part in parts for action in part._actions if action.option_strings):
        if action.option_strings[0] not in seen:
            seen |= set(action.option_strings)
            yield Option(tuple(action.option_strings), action.help or "", _value(action))


def _value(action: argparse.Action) -> tuple[str, ...] | str | None:
    if action.nargs == 0:
        return None
    return tuple(map(str, action.choices)) if action.choices else _place(action)


def _place(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else ""
    if isinstance(action, argparse._SubParsersAction):
        return "file"  # an action's own words: export's and import's files
    return PLACES.get(name, "")


# --- scripts; every word in them is ours, so that quoting single quotes is enough ---


def bash(verbs: list[Verb]) -> str:
    """Return a function for `complete -F`; it splits words at line ends, since names may hold spaces."""
    cases = "".join(
        f"""    {_quoted(verb.name or "-")})
      options={_quoted(LINE.join(flag for option in verb.options for flag in option.flags))}
      words={_quoted(LINE.join(word for word, _ in verb.words))}
      place={_quoted(verb.place)}
      case "$previous" in
{_bash_values(verb)}      esac
      ;;
"""
        for verb in verbs
    )
    names = "|".join(verb.name for verb in verbs if verb.name)
    return f"""# completion of qchat for bash
_qchat() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD - 1]}}"
  local verb=- options words place value IFS=$'\n'
  case "${{COMP_WORDS[1]}}" in
    {names}) [ "$COMP_CWORD" -gt 1 ] && verb="${{COMP_WORDS[1]}}" ;;
  esac
  case "$verb" in
{cases}  esac
  COMPREPLY=()
  case "$value" in
    =folder) COMPREPLY=($(compgen -d -- "$current")) && compopt -o filenames 2>/dev/null; return ;;
    =file) COMPREPLY=($(compgen -f -- "$current")) && compopt -o filenames 2>/dev/null; return ;;
    =any) return ;;
    ?*) COMPREPLY=($(compgen -W "$value" -- "$current")); return ;;
  esac
  if [[ "$current" == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
    return
  fi
  if [ "$COMP_CWORD" -eq 1 ] || [ "$verb" != - -a "$COMP_CWORD" -eq 2 ]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  fi
  case "$place" in
    folder) COMPREPLY+=($(compgen -d -- "$current")) ;;
    file) COMPREPLY+=($(compgen -f -- "$current")) ;;
  esac
  [ -z "$place" ] || compopt -o filenames 2>/dev/null
}}
complete -F _qchat qchat
"""


def _bash_values(verb: Verb) -> str:
    return "".join(
        f"        {'|'.join(option.flags)}) value={_quoted(_bash_value(option.value))} ;;\n"
        for option in verb.options
        if option.value is not None
    )


def _bash_value(value: tuple[str, ...] | str | None) -> str:
    return LINE.join(value) if isinstance(value, tuple) else f"={value or 'any'}"


def zsh(verbs: list[Verb]) -> str:
    """Return a function for `compdef`, with the options' help."""
    main, *others = verbs
    described = "\n".join(f"    {_quoted(f'{_colons(word)}:{help_}')}" for word, help_ in main.words)
    cases = "\n".join(f"    {verb.name})\n{_zsh_arguments(verb)}\n      ;;" for verb in others)
    return f"""#compdef qchat
# completion of qchat for zsh
_qchat() {{
  local -a verbs
  verbs=(
{described}
  )
  if (( CURRENT == 2 )) && [[ "$words[2]" != -* ]]; then
    _describe -t commands command verbs
    _path_files -/
    return
  fi
  case "$words[2]" in
{cases}
    *)
{_zsh_arguments(main)}
      ;;
  esac
}}
compdef _qchat qchat
"""


def _zsh_arguments(verb: Verb) -> str:
    lines = ["(( CURRENT-- )); shift words"] if verb.name else []
    lines.append("_arguments -S \\")
    for option in verb.options:
        lines += [f"  {_quoted(_zsh_option(flag, option))} \\" for flag in option.flags]
    if verb.name and verb.words:
        words = " ".join(word for word, _ in verb.words)
        lines.append(f"  {_quoted(f'1:word:({words})')} \\")
    lines.append(f"  {_quoted(f'*:word:{ZSH_PLACES[verb.place]}')}")
    return "\n".join(f"      {line}" for line in lines)


def _zsh_option(flag: str, option: Option) -> str:
    meaning = re.sub(r"([\[\]:\\])", r"\\\1", option.help)
    if option.value is None:
        return f"*{flag}[{meaning}]"
    if isinstance(option.value, tuple):
        return f"*{flag}[{meaning}]:value:({' '.join(option.value)})"
    return f"*{flag}[{meaning}]:value:{ZSH_PLACES[option.value]}"


def fish(verbs: list[Verb]) -> str:
    """Return one `complete` for every word and option."""
    main, *others = verbs
    names = " ".join(verb.name for verb in others)
    none = f"not __fish_seen_subcommand_from {names}"
    lines = ["# completion of qchat for fish", "complete -c qchat -f"]
    first = "test (count (commandline -opc)) -eq 1"
    lines += [_fish_word(first, word, help_) for word, help_ in main.words]
    lines.append(f"complete -c qchat -n {_quoted(none)} -a '(__fish_complete_directories)'")
    lines += [_fish_option(none, option) for option in main.options]
    for verb in others:
        seen = f"__fish_seen_subcommand_from {verb.name}"
        second = f"{seen}; and test (count (commandline -opc)) -eq 2"
        lines += [_fish_word(second, word, help_) for word, help_ in verb.words]
        if verb.place:
            paths = "(__fish_complete_directories)" if verb.place == "folder" else "(__fish_complete_path)"
            lines.append(f"complete -c qchat -n {_quoted(seen)} -a {_quoted(paths)}")
        lines += [_fish_option(seen, option) for option in verb.options]
    return "\n".join(lines) + "\n"


def _fish_word(condition: str, word: str, help_: str) -> str:
    return f"complete -c qchat -n {_quoted(condition)} -a {_quoted(word)} -d {_quoted(help_)}"


def _fish_option(condition: str, option: Option) -> str:
    flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    match option.value:
        case None:
            value = ""
        case tuple():
            value = f" -x -a {_quoted(' '.join(option.value))}"
        case "folder":
            value = " -x -a '(__fish_complete_directories)'"
        case "file":
            value = " -r -F"
        case _:
            value = " -x"
    return f"complete -c qchat -n {_quoted(condition)} {flags}{value} -d {_quoted(option.help)}"


def _quoted(text: str) -> str:
    """Quote for all three shells; only fish allows \\' in single quotes, so it is replaced."""
    return "'" + text.replace("'", "’").replace("\\", "") + "'"


def _colons(word: str) -> str:
    return word.replace(":", "\\:")


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
