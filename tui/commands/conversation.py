"""Commands that move in the conversation: new, retry, edit, undo, branches, summary."""

# ruff: noqa: ARG002  a command need not use all that commands are given

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.conversation.summary import Branch, CacheSummary, Turn
from ...core.errors import ContextLengthExceeded, UsageError
from ..chat.client import EngineError
from ..chat.kept_results import list_results
from ..chat.turns import last_question, messages_of
from ..text.report import Report, Table
from ..user.attachments import pictures
from .base import (
    Command,
    Front,
    complete_turn,
    first_words,
    need_model,
    number_among,
    plural,
    starting,
    turn_number,
    turn_or_last,
    turns,
    whole,
)
from .parameters import OF_REPLIES, parse_pairs

if TYPE_CHECKING:
    from ..chat.controller import Chat

SUMMARY_REQUEST = (
    "Summarize our conversation so far for somebody who goes on with it: the facts, names, numbers, "
    "decisions and code that matter, what I want, and what is still open. Be complete and brief; write "
    "nothing else."
)
SUMMARY_TOKENS = 1024
REQUEST_TOKENS = 128  # of SUMMARY_REQUEST, with its frame
SUMMARY_INTRODUCTION = "This is a summary of our conversation so far:"
SUMMARY_REPLY = "I have read the summary and go on from it."
KEPT_TURNS = 1


class New(Command):
    """Begin a new conversation; this one stays in /sessions."""

    names = ("new", "clear")
    key = "new"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        await chat.new()


class Retry(Command):
    """Answer the last question again, on a branch beside the first answer.

    Settings apply to this answer only: /retry temperature=0.9 top_k=40.
    """

    names = ("retry", "regen")
    usage = "[SETTING=VALUE ...]"
    key = "retry"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        before, _, last = argument.rpartition(" ")
        return (
            [f"{before} {name}=".lstrip() for name in starting(last, OF_REPLIES)] if "=" not in last else []
        )

    async def settle(self, chat: "Chat", front: Front, argument: str) -> str | None:
        parse_pairs(argument, "/retry")
        return argument

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        turn_or_last(chat, "")
        await chat.retry(**parse_pairs(argument, "/retry"))


class Edit(Command):
    """Change question N, or the last one, on a new branch; without TEXT in your editor.

    The question keeps its pictures, unless TEXT names others as @PATH.
    """

    names = ("edit", "editor")
    usage = "[N] [TEXT]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_turn(chat, argument)

    async def settle(self, chat: "Chat", front: Front, argument: str) -> str | None:
        changed = await self._changed(chat.replies.asked or turns(chat), front, argument)
        return None if changed is None else f"{changed[0]} {changed[1]}"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        changed = await self._changed(turns(chat), front, argument)
        if changed is not None:
            turn, text = changed
            await chat.edit(turn, text, _other_pictures(turns(chat)[turn - 1], text))

    async def _changed(self, among: Sequence[Turn], front: Front, argument: str) -> tuple[int, str] | None:
        """Return the number and the new text of a question; None if nothing changed. Raises UsageError."""
        first, _, rest = argument.partition(" ")
        if argument and not first.removeprefix("#").isdecimal():
            raise self.wrong(f"the question is {first!r:.40}, wanted its number")
        last = last_question(among)
        turn = number_among(among, first or str(last.number if last else 1))
        before = among[turn - 1].question
        if among[turn - 1].role == "tool":
            raise UsageError(f"turn {turn} holds the results of tools, not a question that could be changed")
        text = rest.strip() or await front.edit_text(before)
        if text is None or text.strip() in ("", before.strip()):
            front.note("nothing changed")
            return None
        return turn, text.strip()


def _other_pictures(turn: Turn, text: str) -> list[str]:
    """Return the pictures that `text` mentions if they are others than those of the turn, by their names."""
    mentioned = pictures(text, Path.cwd())
    return mentioned if [Path(path).name for path in mentioned] != [one.name for one in turn.pictures] else []


class Undo(Command):
    """Remove the last question and its answer; the question returns to the prompt."""

    names = ("undo",)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        front.put_prompt(await chat.undo())


class Fork(Command):
    """Continue from the answer to question N on a new branch; later turns keep theirs."""

    names = ("fork",)
    usage = "[N]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return complete_turn(chat, argument)

    async def settle(self, chat: "Chat", front: Front, argument: str) -> str | None:
        return argument or await choose_turn(chat, front, "Go on after which answer?")

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if chosen := await self.settle(chat, front, argument):
            turn = turn_number(chat, chosen)
            await chat.fork(last_round(turns(chat), turn))
            front.note(f"on a branch after question {turn}; /switch returns to the others")


class Switch(Command):
    """Switch to another branch, by the number of its last answer."""

    names = ("switch",)
    usage = "[NUMBER]"

    def complete(self, chat: "Chat", argument: str) -> list[str]:
        return starting(argument, [str(branch.number) for branch in chat.state.branches])

    async def settle(self, chat: "Chat", front: Front, argument: str) -> str | None:
        known = chat.state.branches
        if not known:
            raise UsageError("there are no branches yet: /retry, /edit and /fork make them")
        options = [(str(one.number), _branch_label(one)) for one in known]
        chosen = argument or await front.choose("Which branch?", options)
        return str(whole(chosen, "the branch", 0)) if chosen else None

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if chosen := await self.settle(chat, front, argument):
            await chat.switch(int(chosen))


class Rewind(Command):
    """Choose an earlier question to change, or to continue from."""

    names = ("rewind",)
    key = "rewind"
    while_busy = True  # to choose; what is chosen waits

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        if not argument:
            turn_number(chat, "1")
            if front.screen("rewind"):
                return
        chosen = argument or await choose_turn(chat, front, "Which question?")
        if chosen:
            await Edit().run(chat, front, chosen)


class Results(Command):
    """List what jobs and /show found out in this conversation, or print one of these results again."""

    names = ("results",)
    usage = "[NUMBER]"
    while_busy = True

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        number = chat.state.conversation
        results = chat.kept_results.read(number) if number is not None else []
        if not results:
            front.note("no results are kept with this conversation")
        elif not argument:
            columns = ("number", "turn", "when", "result")
            front.report(Report("Results", (Table(columns, list_results(results), ">><<"),)))
        else:
            front.report(results[whole(argument, "the result", 1, len(results)) - 1].report)


class Compact(Command):
    """Summarise all but the last N turns (1) and continue from the summary in a new conversation.

    The model writes the summary, which you see; the original conversation stays in /sessions.
    """

    names = ("compact", "compress")
    usage = "[N]"

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        need_model(chat)
        keep = whole(argument, "the turns to keep", 0, 1000) if argument else KEPT_TURNS
        before = turns(chat)
        if len(before) <= keep:
            raise UsageError(
                f"nothing to summarise: {plural(len(before), 'turn')}, and /compact keeps {keep}"
            )
        tokens, title = chat.state.tokens, chat.state.title
        end = turns_with_room(before, len(before) - keep, tokens, chat.status.context_limit)
        chat.replies.gives_back, chat.tools.paused = False, True  # nobody typed the request
        try:
            summary = await written_summary(chat, before, end)
        except EngineError as error:
            if error.kind == ContextLengthExceeded.__name__:
                raise UsageError(f"/compact has no room for a summary: {error}") from error
            raise
        finally:
            chat.replies.gives_back, chat.tools.paused = True, False
        keep = whole_rounds(before, max(keep, len(before) - end))
        await chat.new()
        await chat.prime(summarised(summary, before[len(before) - keep :]))
        if title:
            await chat.rename(f"{title} (summary)")
        front.note(
            f"summarised {plural(len(before) - keep, 'turn')}, kept {keep} · {tokens:,} → "
            f"{chat.state.tokens:,} tokens · the original stays in /sessions"
        )


def turns_with_room(turns: Sequence[Turn], most: int, tokens: int, limit: int) -> int:
    """Return how many turns can be read with room for a summary: all of `turns`, or at least 1 of `most`."""
    reserve = min(SUMMARY_TOKENS, limit // 4) + REQUEST_TOKENS
    if not limit or tokens + reserve <= limit:
        return len(turns)
    following = [turn.stats.prompt_tokens for turn in turns[1 : most + 1]]
    fitting = [count for count, used in enumerate(following, 1) if used + reserve <= limit]
    return max(fitting, default=1)


async def written_summary(chat: "Chat", before: Sequence[Turn], end: int) -> str:
    """Return the model's summary of the first `end` turns; the conversation is then as it was."""
    settings: dict[str, Any] = {"enable_thinking": False, "max_new_tokens": SUMMARY_TOKENS}
    if chat.settings["schema"] is not None:
        settings["schema"] = None  # a summary is text
    if end == len(before):
        await chat.ask(SUMMARY_REQUEST, **settings)
    else:
        await chat.edit(end + 1, SUMMARY_REQUEST, **settings)
    asked = turns(chat)
    if len(asked) != end + 1 or asked[-1].question != SUMMARY_REQUEST:
        raise UsageError("no summary was written: the conversation is as it was")
    summary, reason = asked[-1].answer.strip(), asked[-1].finish_reason
    await (chat.undo() if end == len(before) else chat.switch(before[-1].node))
    if not summary or reason not in ("stop", "length"):
        raise UsageError(f"the summary was not finished ({reason}): the conversation is as it was")
    return summary


def summarised(summary: str, kept: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the messages of a conversation that continues from a summary and the turns after it."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"{SUMMARY_INTRODUCTION}\n\n{summary}"},
        {"role": "assistant", "content": SUMMARY_REPLY},
    ]
    return [*messages, *messages_of([replace(turn, thinking="") for turn in kept])]


def last_round(before: Sequence[Turn], turn: int) -> int:
    """Return the number of the turn with the answer to question `turn`, behind the rounds of tools."""
    while turn < len(before) and before[turn].role == "tool":
        turn += 1
    return turn


def whole_rounds(before: Sequence[Turn], keep: int) -> int:
    """Return how many turns to keep of at least `keep`, so that they begin with a question of the user."""
    while 0 < keep < len(before) and before[-keep].role == "tool":
        keep += 1
    return keep


class Cache(Command):
    """Show how much of each turn the prompt cache reused and why, and the snapshots with their sizes."""

    names = ("cache",)

    async def run(self, chat: "Chat", front: Front, argument: str) -> None:
        need_model(chat)
        front.report(cache_report(await chat.request("explain")))


def cache_report(cache: CacheSummary) -> Report:
    """Return the prompt cache as tables."""
    seen = any(turn.image_tokens for turn in cache.turns)
    rows = [
        (
            *(str(t.turn), t.how, f"{t.cached_tokens:,}", f"{t.prefilled_tokens:,}"),
            *([f"{t.image_tokens:,}"] if seen else []),
            t.why,
        )
        for t in cache.turns
    ]
    columns = ("turn", "how", "reused", "read", *(["of pictures"] if seen else []), "why")
    states = [
        (str(s.turn), s.kind, f"{s.tokens:,}", f"{s.state_nbytes / 2**20:,.1f}") for s in cache.snapshots
    ]
    memory = f"{cache.snapshot_nbytes / 2**20:,.0f} of {cache.snapshot_budget_nbytes / 2**20:,.0f} MiB"
    disk = f"{cache.disk_nbytes / 2**20:,.0f} of {cache.disk_budget_nbytes / 2**20:,.0f} MiB on disk"
    others = f" and {cache.other_snapshots} of other conversations" if cache.other_snapshots else ""
    return Report(
        f"Cache · history {cache.history} · {plural(len(states), 'snapshot')}{others}, {memory} in memory"
        + (f", {disk}" if cache.disk_budget_nbytes else ""),
        (
            Table(columns, rows, "<<>>><" if seen else "<<>><"),
            Table(("snapshot of turn", "kind", "tokens", "MiB"), states, "<<>>"),
        ),
    )


async def choose_turn(chat: "Chat", front: Front, title: str) -> str | None:
    """Let the user choose a question, the last one first. Raises UsageError if there is none."""
    turn_number(chat, "1")
    options = [
        (str(turn.number), f"{turn.number}  {first_words(turn.question)}")
        for turn in reversed(turns(chat))
        if turn.role == "user"
    ]
    return await front.choose(title, options)


def _branch_label(branch: Branch) -> str:
    here = " (here)" if branch.current else ""
    answer = f" → {first_words(branch.answer, 40)}" if branch.answer else ""
    return f"{first_words(branch.first_words, 60 if not answer else 40)}{answer}{here}"
