"""Conversations in a store, as talks without a model."""

from qchat.core import Store
from qchat.core.storage.records import ModelIdentity

MODEL = ModelIdentity(name="fake-4bit", folder="/models/fake")


def talk(store: Store, *texts: str, title: str = "", thinking: str = "") -> int:
    """A conversation of one branch: the user begins, roles alternate."""
    conversation = store.create(title=title, model=MODEL)
    parent = None
    for place, text in enumerate(texts):
        if place % 2:
            parent = store.add_node(conversation, parent, "assistant", text=text, thinking=thinking)
        else:
            parent = store.add_node(conversation, parent, "user", text=text)
    return conversation
