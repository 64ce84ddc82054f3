"""The model in the package answers, fits its size, and carries its card and its draft head."""

from qchat.core import BUILT_IN_MODEL, Session
from qchat.core.engine.engine import Engine

LIMIT_NBYTES = 25_000_000


def test_the_embedded_model_answers_at_once_and_without_notices_about_itself():
    engine = Engine.load(BUILT_IN_MODEL)
    assert engine.template.notice is None
    assert engine.model.mtp is not None
    reply = Session(engine, enable_thinking=False, temperature=0).send("What is the capital of Japan?")
    assert reply.text == "The capital of Japan is Tokyo."


def test_the_embedded_model_keeps_to_its_size_and_says_what_it_is():
    assert sum(path.stat().st_size for path in BUILT_IN_MODEL.iterdir()) <= LIMIT_NBYTES
    card = (BUILT_IN_MODEL / "README.md").read_text()
    assert "tiny and often wrong" in card
    assert "WordNet" in card
