"""The queue: one at a time, clients in turn, no more than can wait."""

import asyncio

import pytest

from qchat.tui.serve.errors import RequestError
from qchat.tui.serve.fair_queue import FairQueue
from tests.run_async import run_async


async def hold(queue: FairQueue, client: str, order: list[str], release: asyncio.Event) -> None:
    async with queue.turn(client):
        order.append(client)
        await release.wait()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_clients_take_turns_however_much_one_asks():
    async def scenario() -> list[str]:
        queue, order, release = FairQueue(), [], asyncio.Event()
        tasks = []
        for client in ("greedy", "greedy", "greedy", "greedy", "modest"):
            tasks.append(asyncio.create_task(hold(queue, client, order, release)))
            await settled()
        assert queue.waiting == 4
        release.set()
        await asyncio.gather(*tasks)
        return order

    assert run_async(scenario()) == ["greedy", "greedy", "modest", "greedy", "greedy"]


def test_only_one_is_inside():
    async def scenario() -> int:
        queue, inside, most = FairQueue(), 0, 0

        async def enter(client: str) -> None:
            nonlocal inside, most
            async with queue.turn(client):
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

        await asyncio.gather(*(enter(str(number % 7)) for number in range(50)))
        return most

    assert run_async(scenario()) == 1


def test_a_full_queue_says_when_to_try_again():
    async def scenario() -> RequestError:
        queue, release = FairQueue(max_waiting=1), asyncio.Event()
        tasks = [asyncio.create_task(hold(queue, "a", [], release)) for _ in range(2)]
        await settled()
        with pytest.raises(RequestError) as caught:
            async with queue.turn("b"):
                pass
        release.set()
        await asyncio.gather(*tasks)
        async with queue.turn("b"):
            return caught.value

    error = run_async(scenario())
    assert error.status == 429
    assert 1 <= int(error.headers["retry-after"]) <= 60


async def three_in_line() -> tuple[FairQueue, dict[str, asyncio.Task[None]], list[str], asyncio.Event]:
    """A queue with one client inside and two waiting, the order in which they enter, what lets them out."""
    queue, order, release = FairQueue(), [], asyncio.Event()
    tasks: dict[str, asyncio.Task[None]] = {}
    for client in ("first", "leaves", "last"):
        tasks[client] = asyncio.create_task(hold(queue, client, order, release))
        await settled()
    return queue, tasks, order, release


def test_whoever_stops_waiting_leaves_no_gap():
    async def scenario() -> list[str]:
        _, tasks, order, release = await three_in_line()
        tasks["leaves"].cancel()
        await settled()
        release.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        return order

    assert run_async(scenario()) == ["first", "last"]


def test_a_cancel_at_the_moment_of_the_turn_passes_it_on():
    async def scenario() -> list[str]:
        queue, tasks, order, release = await three_in_line()
        release.set()
        await asyncio.wait({tasks["first"]})  # which has given its turn to the next
        tasks["leaves"].cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        async with queue.turn("after"):
            return order

    assert run_async(scenario())[-1] == "last"


@pytest.mark.parametrize("others", [[], ["last"]])
def test_a_cancel_in_the_tick_of_the_release_does_not_stop_the_queue(others: list[str]):
    async def scenario() -> list[str]:
        queue, order, release = FairQueue(), [], asyncio.Event()
        tasks = {}
        for client in ("first", "leaves", *others):
            tasks[client] = asyncio.create_task(hold(queue, client, order, release))
            await settled()
        release.set()
        tasks["leaves"].cancel()  # its future is cancelled before the holder lets the next one in
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await asyncio.wait_for(hold(queue, "after", order, release), 5)
        assert queue.waiting == 0
        return order

    assert run_async(scenario()) == ["first", *others, "after"]
