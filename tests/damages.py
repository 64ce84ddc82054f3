"""Ways to damage a good model folder: each maker returns a function that damages the folder it is given."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qchat.core.machine.backend import mx
from tests.checkpoints import Tensors, edit_header, load_tensors, save_shards, write_raw_header

Damage = Callable[[Path], Any]
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = "model.language_model.layers.0."


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the header of the only shard."""
    return lambda folder: edit_header(folder / WHOLE, change)


def field(name: str, key: str, value: Any) -> Damage:
    """Replace one field of one tensor's entry."""
    return header(lambda fields: fields[name].__setitem__(key, value))


def shift_length(by: int) -> Damage:
    """Change the stored header length by a few bytes."""

    def damage(folder: Path) -> None:
        length = int.from_bytes((folder / WHOLE).read_bytes()[:8], "little")
        header_length(length + by)(folder)

    return damage


def raw_header(text: bytes) -> Damage:
    return lambda folder: write_raw_header(folder / WHOLE, text)


def cut(nbytes: int) -> Damage:
    """Keep the first `nbytes` of the shard, or all but the last -`nbytes`."""
    return lambda folder: (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:nbytes])


def header_length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WHOLE).write_bytes(length.to_bytes(8, "little") + (folder / WHOLE).read_bytes()[8:])

    return damage


def tensors(change: Callable[[Tensors], Any]) -> Damage:
    """Change the tensors themselves and write an honest file."""

    def damage(folder: Path) -> None:
        stored = load_tensors(folder)
        change(stored)
        save_shards(folder, stored)

    return damage


def without(*names: str) -> Damage:
    return tensors(lambda stored: [stored.pop(name) for name in names])


def put(name: str, tensor: mx.array) -> Damage:
    return tensors(lambda stored: stored.update({name: tensor}))


def text(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change a JSON file in place."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**fields: Any) -> Damage:
    """Replace fields of the text part of config.json."""
    return edit("config.json", lambda content: content["text_config"].update(fields))


def index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return edit(INDEX, change)


def placed(name: str) -> Damage:
    """An index that places one tensor in the file `name`."""
    return index(lambda content: content["weight_map"].update({LAYER + "linear_attn.A_log": name}))


def template(source: str) -> Damage:
    return edit("tokenizer_config.json", lambda content: content.update(chat_template=source))


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def sparse(name: str, nbytes: int) -> Damage:
    """A file of `nbytes` zeros that takes no room."""
    return lambda folder: os.truncate(folder / name, nbytes)


def claim(**shapes: tuple[int, ...]) -> Damage:
    """Let the shard claim tensors of these shapes; their zeros take no room on the disk."""

    def damage(folder: Path) -> None:
        content = (folder / WHOLE).read_bytes()
        end = len(content) - 8 - int.from_bytes(content[:8], "little")
        entries: dict[str, Any] = {}
        for name, shape in shapes.items():
            begin, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        header(lambda fields: fields.update(entries))(folder)
        with (folder / WHOLE).open("r+b") as file:
            file.truncate(8 + int.from_bytes(file.read(8), "little") + end)

    return damage


def together(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def replace(name: str, make: Callable[[Path], Any]) -> Damage:
    """Put something that is not a file in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def outside(name: str) -> Damage:
    """Move a file out of the folder and leave a link to it."""

    def damage(folder: Path) -> None:
        away = folder.parent / "elsewhere"
        (folder / name).rename(away)
        (folder / name).symlink_to(away)

    return damage


def only(name: str) -> Damage:
    """A folder whose weights are in one file of another kind."""

    def damage(folder: Path) -> None:
        (folder / WHOLE).unlink()
        (folder / name).write_bytes(b"\x80\x04.")

    return damage
