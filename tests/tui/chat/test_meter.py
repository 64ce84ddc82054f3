"""The live figures: what events and a clock make of the status."""

import pytest

from qchat.core.events import Done, LoadProgress, Memory, Performance, Prefill, Text, Thought
from qchat.tui.chat.meter import WINDOWS, Meter, ReplyFigures
from tests.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(100.0)


@pytest.fixture
def meter(clock: FakeClock) -> Meter:
    return Meter(clock)


MEMORY = Memory(active_nbytes=5, cache_nbytes=2, peak_nbytes=7, limit_nbytes=24, copy_bandwidth=1e9)


def decode(
    meter: Meter, clock: FakeClock, seconds: float, tokens_per_s: float, kind: type[Text | Thought] = Text
) -> None:
    for _ in range(round(seconds * tokens_per_s)):
        clock.now += 1 / tokens_per_s
        meter.follow(kind("x"))


def test_loading_tells_how_long_it_will_take(meter: Meter, clock: FakeClock):
    meter.begin("loading")
    for done in (0, 25, 50):
        meter.follow(LoadProgress(done, 100, ""))
        clock.now += 1
    status = meter.status
    assert (status.phase, status.done, status.total) == ("loading", 50, 100)
    assert status.seconds_left == pytest.approx(2.0)


def test_what_the_cache_holds_does_not_count_as_read(meter: Meter, clock: FakeClock):
    meter.begin("reading")
    meter.follow(Prefill(8000, 10000, 8000))
    clock.now += 2
    meter.follow(Prefill(9000, 10000, 8000))
    assert meter.status.tokens_per_s == pytest.approx(500)
    assert meter.status.seconds_left == pytest.approx(2.0)
    assert meter.status.context_tokens == 9000


def test_speed_is_measured_over_quarter_seconds_without_the_wait_before_the_first_token(
    meter: Meter, clock: FakeClock
):
    meter.begin("reading")
    meter.follow(Prefill(10, 10))
    clock.now += 30
    decode(meter, clock, 4, 40, Thought)
    status = meter.status
    assert status.phase == "thinking"
    assert len(status.history_of_speed) == WINDOWS
    assert status.tokens_per_s == pytest.approx(40, rel=0.15)
    decode(meter, clock, 3, 20)
    assert status.phase == "answering"
    assert status.tokens_per_s == pytest.approx(20, rel=0.25)
    assert (status.thought_tokens, status.answer_tokens) == (160, 60)
    assert status.context_tokens == 10 + 220


def test_an_engine_that_stalls_slows_down_on_the_screen(meter: Meter, clock: FakeClock):
    """The memory is told four times a second, so the speed falls though no token comes."""
    meter.begin("reading")
    decode(meter, clock, 2, 40)
    for _ in range(WINDOWS + 1):
        clock.now += 0.3
        meter.follow(MEMORY)
    assert meter.status.tokens_per_s == 0
    assert meter.status.history_of_speed == [0] * WINDOWS


def test_the_share_of_the_bandwidth_is_what_the_weights_take_of_it(meter: Meter, clock: FakeClock):
    meter.bytes_per_token = 10_000_000
    meter.begin("reading")
    decode(meter, clock, 1, 40)
    assert meter.status.bandwidth_share is None
    meter.follow(MEMORY)
    decode(meter, clock, 2, 40)
    assert meter.status.bandwidth_share == pytest.approx(0.4, rel=0.15)
    assert (meter.status.active_nbytes, meter.status.limit_nbytes) == (5, 24)


def test_a_new_task_begins_without_the_figures_of_the_one_before(meter: Meter, clock: FakeClock):
    meter.begin("reading")
    decode(meter, clock, 2, 40)
    performance = Performance(decode_tokens_per_s=39.5, drafts_accepted=0.8, draft_gain=2.5, draft_cost=1.25)
    meter.follow(Done("stop", generated_tokens=80, performance=performance))
    meter.end("idle")
    assert meter.status.tokens_per_s == 39.5
    assert meter.status.drafts_accepted == 0.8
    assert (meter.status.draft_gain, meter.status.draft_cost) == (2.5, 1.25)
    assert meter.status.last is not None
    assert meter.status.last.generated_tokens == 80
    meter.begin("reading")
    status = meter.status
    assert (status.tokens_per_s, status.answer_tokens, status.history_of_speed) == (0, 0, [])
    assert status.last is not None
    assert status.last.generated_tokens == 80


def test_the_course_of_a_reply_is_kept_until_the_next_one(meter: Meter, clock: FakeClock):
    meter.begin("reading")
    clock.now += 0.5
    meter.follow(Prefill(80, 100, 80))
    assert meter.status.reply.seconds_to_first_token is None
    clock.now += 1.5
    decode(meter, clock, 4, 40, Thought)
    decode(meter, clock, 4, 20)
    meter.end("idle")
    reply = meter.status.reply
    assert (reply.prompt_tokens, reply.cached_tokens) == (100, 80)
    assert reply.seconds_to_first_token == pytest.approx(2.0, abs=0.1)
    assert reply.seconds_thinking == pytest.approx(4.0, abs=0.1)
    assert 8 / 0.3 < len(reply.speeds) <= 8 / 0.25
    assert reply.speeds[5] > 1.5 * reply.speeds[-5]
    meter.begin("reading")
    assert meter.status.reply == ReplyFigures()
