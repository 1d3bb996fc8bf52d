"""What is special to the engine of Redis: its scripts, and what it makes of what is in the server, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any
from uuid import uuid4

import pytest

pytest.importorskip("redis")

import redis

from processes import PATIENCE, eventually
from servers import VALKEY, Server, also_by_default
from stigmergy import DamagedValue, Op, RevisionConflict, Unavailable
from stigmergy.flow import Scan, Sleep, run
from stigmergy.model import Change, Ttl
from stigmergy.providers._engine import Done, Encoded, Found, Page, Place, Stored, Value
from stigmergy.providers._redis_wire import Wait
from stigmergy.providers.redis import RedisEngine

NOWHERE = Place("", 0, 0.0)
TTL = 0.001


def put(key: str, data: bytes = b"1", if_revision: int | None = None, ttl: Ttl = None) -> Encoded:
    return Encoded(Op.SET, key, Value("json", data), if_revision, ttl, None, None)


def remove(key: str, if_revision: int | None = None) -> Encoded:
    return Encoded(Op.DELETE, key, None, if_revision, None, None, None)


def check(key: str, revision: int) -> Encoded:
    return Encoded(None, key, None, revision, None, None, None)


class Bench:
    """An engine, on a namespace of its own, that is asked one flow after the other."""

    def __init__(self, url: str, namespace: str | None = None, **options: Any) -> None:
        self.namespace = namespace or uuid4().hex
        options = {"history": 10_000, "history_seconds": None, "timeout": PATIENCE} | options
        self.engine = RedisEngine(url, namespace=self.namespace, **options)
        self.transport = self.engine.transport()
        self.client = redis.Redis.from_url(url, protocol=2)
        self.seen = NOWHERE

    def commit(self, *writes: Encoded) -> tuple[int | None, ...]:
        done: Done = run(self.engine.commit(writes, self.seen), self.transport.request)
        self.seen = done.place
        return done.revisions

    def read(self, key: str) -> Stored | None:
        return run(self.engine.read(key, NOWHERE), self.transport.request)

    def scan(self, prefix: str = "", **request: Any) -> Found:
        return run(self.engine.scan(Scan(prefix, **request), self.seen), self.transport.request)

    def log(self, after: int = 0, seen: Place | None = None) -> Page:
        return run(self.engine.log(after, seen or self.seen), self.transport.request)

    def wait(self, seconds: float, place: Place | None = None) -> None:
        run(self.engine.wait(place or self.seen, seconds), self.transport.request)

    def let_pass(self, seconds: float) -> None:
        """Wait until the server's clock is beyond so many seconds after the last commit."""

        def has_passed() -> bool:
            whole, millionths = self.client.time()
            return bool(whole + millionths / 1e6 > self.seen.time + seconds)

        eventually(has_passed)

    def make_older(self, seconds: float) -> None:
        """Let the log say that all was so many seconds earlier."""
        logged = self.client.xrange(self.name("s"))
        self.client.delete(self.name("s"))
        for name, fields in logged:
            revision, commit, time, rest = fields[b"n"].split(b" ", 3)
            earlier = b"%d" % (int(time) - seconds * 1e6)
            self.client.xadd(self.name("s"), fields | {b"n": b" ".join([revision, commit, earlier, rest])}, id=name)
        self.seen = NOWHERE

    def name(self, what: str) -> str:
        return f"{{{self.namespace}}}:{what}"

    def dump(self) -> dict[str, bytes]:
        """All that the server keeps for the namespace."""
        return {name: data for name in map(self.name, "vkdsm") if (data := self.client.dump(name)) is not None}

    def restore(self, dumped: dict[str, bytes]) -> None:
        self.client.delete(*map(self.name, "vkdsm"))
        for name, data in dumped.items():
            self.client.restore(name, 0, data)

    def close(self) -> None:
        self.transport.close()
        self.client.close()


NewBench = Callable[..., Bench]


@pytest.fixture
def new_bench(redis_url: str) -> Iterator[NewBench]:
    benches: list[Bench] = []

    def new(**options: Any) -> Bench:
        benches.append(Bench(redis_url, **options))
        return benches[-1]

    yield new
    for each in benches:
        each.client.delete(*map(each.name, "vkdsm"))
        each.close()


@pytest.fixture
def bench(new_bench: NewBench) -> Bench:
    return new_bench()


def told(changes: Sequence[Change]) -> list[tuple[int, str, str, bool]]:
    return [(each.revision, each.op.value, each.key, each.expired) for each in changes]


# -- commits -----------------------------------------------------------------------------------------------------------


def test_each_write_that_changes_something_takes_the_next_revision(bench: Bench) -> None:
    assert bench.commit(put("a"), remove("absent"), put("b"), check("c", 0), put("d")) == (1, None, 2, None, 3)
    assert bench.commit(remove("b"), remove("absent")) == (4, None)
    assert bench.seen.revision == 4
    assert [each.commit for each in bench.log().changes] == [3, 3, 3, 4]


def test_a_commit_that_changes_nothing_stays_where_it_was(bench: Bench) -> None:
    bench.commit(put("a"))
    before = bench.seen

    assert bench.commit(check("a", 1), remove("b")) == (None, None)

    assert bench.seen == before


@pytest.mark.parametrize(
    ("write", "actual"), [(put("a", if_revision=0), 1), (remove("a", 7), 1), (check("a", 2), 1), (check("b", 1), 0)]
)
def test_a_condition_that_does_not_hold_leaves_everything_as_it_was(bench: Bench, write: Encoded, actual: int) -> None:
    bench.commit(put("a"))
    before = bench.dump()

    with pytest.raises(RevisionConflict) as caught:
        bench.commit(put("c"), write, put("d"))

    assert (caught.value.key, caught.value.expected, caught.value.actual) == (write.key, write.if_revision, actual)
    assert bench.dump() == before


def test_conditions_are_judged_before_the_first_write(bench: Bench) -> None:
    assert bench.commit(put("a"), check("a", 0)) == (1, None)
    with pytest.raises(RevisionConflict):
        bench.commit(put("a"), check("a", 2))


def test_the_value_before_is_true_also_within_a_commit(bench: Bench) -> None:
    bench.commit(put("a", b"1"), put("b", b"2"))
    bench.commit(remove("a"), put("b", b"3"))
    *_, deleted, changed = bench.log().changes
    assert (deleted.value, deleted.old_value, deleted.old_revision) == (None, Value("json", b"1"), 1)
    assert (changed.value, changed.old_value, changed.old_revision) == (Value("json", b"3"), Value("json", b"2"), 2)


def test_who_wrote_and_what_was_stamped_comes_back(bench: Bench) -> None:
    bench.commit(Encoded(Op.SET, "a", Value("nút", b"\x00\n\xff"), None, None, "wrïter\n", '{"a":"b"}'))
    bench.commit(Encoded(Op.DELETE, "a", None, None, None, "other", '{"c":"d"}'))

    created, deleted = bench.log().changes

    assert (created.value, created.writer, created.meta) == (Value("nút", b"\x00\n\xff"), "wrïter\n", '{"a":"b"}')
    assert (deleted.value, deleted.writer, deleted.meta) == (None, "other", '{"c":"d"}')
    assert deleted.old_value == created.value


def test_a_script_that_the_server_forgot_is_sent_again_and_done_once(bench: Bench) -> None:
    bench.commit(put("a"))
    bench.client.script_flush()
    assert bench.commit(put("a")) == (2,)
    bench.client.script_flush()
    assert bench.log().head.revision == 2
    bench.client.script_flush()
    assert list(bench.scan().entries) == ["a"]
    assert bench.commit(put("a")) == (3,)


# -- deadlines ---------------------------------------------------------------------------------------------------------


def deadlines(bench: Bench) -> list[str]:
    return [key.decode() for key in bench.client.zrange(bench.name("d"), 0, -1)]


def test_a_ttl_is_set_kept_cleared_and_set_anew(bench: Bench) -> None:
    def expires() -> float:
        stored = bench.read("a")
        assert stored is not None
        return stored.expires or 0.0

    bench.commit(put("a", ttl=1000))
    first = expires()
    assert first - bench.seen.time == pytest.approx(1000, abs=1e-5)
    bench.commit(put("a", ttl="keep"))
    assert expires() == first
    bench.commit(put("a", ttl=2000))
    assert expires() - bench.seen.time == pytest.approx(2000, abs=1e-5)
    assert deadlines(bench) == ["a"]
    bench.commit(put("a"))
    assert expires() == 0
    assert deadlines(bench) == []
    bench.commit(put("a", ttl="keep"), put("new", ttl="keep"))
    assert expires() == 0
    assert deadlines(bench) == []
    bench.commit(put("a", ttl=1000))
    bench.commit(remove("a"))
    assert deadlines(bench) == []


@pytest.mark.parametrize("ttl", [1e-300, 1e-9])
def test_the_shortest_ttl_is_a_microsecond(bench: Bench, ttl: float) -> None:
    bench.commit(put("a", ttl=ttl))
    assert bench.read("a") is None


@pytest.mark.parametrize("ttl", [1e9, 1e12, 1e300])
def test_the_longest_ttl_is_longer_than_anybody_waits(bench: Bench, ttl: float) -> None:
    bench.commit(put("a", ttl=ttl))
    stored = bench.read("a")
    assert stored is not None
    assert stored.expires is not None
    assert stored.expires - stored.time > 9e8


def test_what_is_due_becomes_changes_in_the_order_of_deadlines_and_keys(bench: Bench) -> None:
    bench.commit(put("c", ttl=TTL), put("a", ttl=TTL), put("b", ttl=TTL / 2), put("stays", ttl=1000))
    bench.let_pass(TTL)

    page = bench.log(4)

    assert told(page.changes) == [(5, "delete", "b", True), (6, "delete", "a", True), (7, "delete", "c", True)]
    assert [each.commit for each in page.changes] == [5, 6, 7]
    assert [each.old_revision for each in page.changes] == [3, 2, 1]
    assert page.due is not None
    assert 500 < page.due < 1000
    assert list(bench.scan().entries) == ["stays"]


@pytest.mark.parametrize("name", ["read", "scan", "commit", "conflict", "log"])
def test_every_request_first_makes_due_deadlines_into_changes(bench: Bench, name: str) -> None:
    bench.commit(put("a", ttl=TTL))
    bench.let_pass(TTL)

    if name == "read":
        assert bench.read("a") is None
    elif name == "scan":
        assert bench.scan().entries == {}
    elif name == "commit":
        assert bench.commit(put("a", if_revision=0)) == (3,)
    elif name == "conflict":
        with pytest.raises(RevisionConflict, match="absent"):
            bench.commit(put("a", if_revision=1))

    assert told(bench.log(1).changes)[0] == (2, "delete", "a", True)


def test_thousands_that_are_due_at_once_are_worked_off_in_parts(bench: Bench) -> None:
    bench.commit(*(put(f"{number:04}", ttl=TTL) for number in range(2_500)))
    bench.let_pass(TTL)

    assert bench.commit(put("a", if_revision=0)) == (5_001,)

    expired: list[Change] = []
    while page := bench.log(2_500 + len(expired)).changes:
        expired += page
    assert told(expired[:-1]) == [(2_501 + n, "delete", f"{n:04}", True) for n in range(2_500)]
    assert list(bench.scan().entries) == ["a"]
    assert deadlines(bench) == []


def test_a_deadline_that_is_gone_from_its_record_does_not_strike(bench: Bench) -> None:
    bench.commit(put("a"))
    bench.client.zadd(bench.name("d"), {"a": 1, "gone": 1})
    assert list(bench.scan().entries) == ["a"]
    assert deadlines(bench) == []


# -- lives -------------------------------------------------------------------------------------------------------------


def test_the_first_life_begins_with_the_first_request(bench: Bench) -> None:
    page = bench.log()
    assert page.head.epoch
    assert page == Page([], Place(page.head.epoch, 0, 0.0), 1, None)
    assert bench.log().head == page.head


def test_a_restart_that_keeps_everything_continues(bench: Bench) -> None:
    bench.commit(put("a"))
    kept = bench.dump()
    bench.restore(kept)
    assert bench.log(1).head == bench.seen
    assert bench.log(1, NOWHERE).head == bench.seen


def is_another_life(bench: Bench, seen: Place) -> None:
    page = bench.log(seen.revision, seen)
    assert page.head.epoch != seen.epoch
    assert page.head.revision >= seen.revision
    assert (page.changes, page.oldest) == ([], page.head.revision + 1)
    assert bench.log(seen.revision, seen).head == page.head  # once
    assert bench.commit(put("later")) == (page.head.revision + 1,)


def test_a_server_that_was_emptied_begins_a_new_life_above_all_that_was_seen(bench: Bench) -> None:
    bench.commit(put("a"), put("b"))
    bench.restore({})
    is_another_life(bench, bench.seen)
    assert list(bench.scan().entries) == ["later"]


def test_a_server_that_was_set_back_begins_a_new_life_with_what_it_has(bench: Bench) -> None:
    bench.commit(put("a"), put("b"))
    kept = bench.dump()
    bench.commit(put("c"))
    bench.restore(kept)
    is_another_life(bench, bench.seen)
    assert list(bench.scan().entries) == ["a", "b", "later"]


def test_another_record_at_the_revision_seen_is_another_life(bench: Bench) -> None:
    bench.commit(put("a"))
    kept = bench.dump()
    bench.commit(put("b"))
    seen = bench.seen
    for others in ([put("c")], [put("c"), put("d")]):
        bench.restore(kept)
        bench.seen = NOWHERE
        bench.commit(*others)
        is_another_life(bench, seen)


def test_what_was_seen_long_ago_and_is_forgotten_is_no_other_life(new_bench: NewBench) -> None:
    bench = new_bench(history=100)
    bench.commit(put("a"))
    seen = bench.seen
    for _ in range(5):
        bench.commit(*(put(str(number)) for number in range(100)))
    assert bench.log(1).oldest > 1
    assert bench.log(1, seen).head == bench.seen


def test_who_saw_less_than_others_goes_on_with_them(new_bench: NewBench) -> None:
    one = new_bench()
    other = new_bench(namespace=one.namespace)
    one.commit(put("a"))
    other.commit(put("b"))
    one.commit(put("c"))
    assert other.commit(put("d")) == (4,)
    assert other.seen.epoch == one.seen.epoch


def test_revisions_do_not_come_back_when_only_the_meta_data_are_lost(bench: Bench) -> None:
    bench.commit(put("a"), put("b"))
    bench.client.delete(bench.name("m"))
    bench.seen = NOWHERE
    assert bench.commit(put("c")) == (3,)


@also_by_default  # the refusal to add to the log, and what it says of itself
@pytest.mark.parametrize("planted", ["90-0", f"{2**63}-0"])
def test_a_log_that_is_ahead_of_its_head_is_given_up_for_a_new_life(bench: Bench, planted: str) -> None:
    bench.commit(put("a"))
    epoch = bench.seen.epoch
    bench.client.xadd(bench.name("s"), {"o": "s"}, id=planted)

    (revision,) = bench.commit(put("b"))

    assert bench.seen.epoch != epoch
    assert revision is not None
    assert revision > (90 if planted == "90-0" else 1)
    assert told(bench.log(revision - 1).changes) == [(revision, "set", "b", False)]


@pytest.mark.parametrize("revision", ["x", "-1", "nan", "inf", "1.5", "1e300", ""])
def test_meta_data_that_make_no_sense_are_a_new_life(bench: Bench, revision: str) -> None:
    bench.commit(put("a"), put("b"))
    bench.client.hset(bench.name("m"), "revision", revision)
    assert bench.commit(put("c")) == (3,)


def test_another_layout_is_left_alone(bench: Bench) -> None:
    bench.commit(put("a"))
    bench.client.hset(bench.name("m"), "layout", "2")
    before = bench.dump()
    for ask in (lambda: bench.commit(put("b")), bench.scan, bench.log):
        with pytest.raises(Unavailable, match="LAYOUT"):
            ask()
    assert bench.dump() == before


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_the_log_remembers_at_least_as_much_as_was_asked_for_and_knows_what(new_bench: NewBench) -> None:
    bench = new_bench(history=100)
    longest = 0
    for number in range(1_000):
        bench.commit(put("a", b"x" * (number % 300)))
        if number % 50 == 49:
            page = bench.log()
            ((first, _),) = bench.client.xrange(bench.name("s"), count=1)
            assert page.oldest == int(first.partition(b"-")[0])
            remembered = [each.revision for each in bench.log(page.oldest - 1).changes]
            assert remembered == [*range(page.oldest, number + 2)]
            longest = max(longest, len(remembered))
            assert len(remembered) >= min(100, number + 1)
    assert longest < 300


def test_of_what_is_forgotten_nothing_is_told(new_bench: NewBench) -> None:
    bench = new_bench(history=100)
    bench.commit(*(put(str(number)) for number in range(1_000)))
    page = bench.log(3)
    assert page.oldest > 4
    assert page.changes == []


@also_by_default  # trimming by what is oldest
def test_what_is_too_old_is_forgotten(new_bench: NewBench) -> None:
    bench = new_bench(history_seconds=1000)
    for number in range(40):
        bench.commit(put(str(number)))
    assert bench.log().oldest == 1
    bench.make_older(1001)
    for number in range(32):
        bench.commit(put(str(number)))
    page = bench.log(72)
    assert 40 < page.oldest <= 72
    assert bench.log(page.oldest - 1).changes[0].revision == page.oldest


def test_a_page_of_the_log_has_an_end(bench: Bench) -> None:
    bench.commit(*(put(str(number)) for number in range(1_500)))
    page = bench.log()
    assert 100 <= len(page.changes) < 1_500
    bench.commit(*(put("big", bytes(1 << 18)) if number else put("x") for number in range(2)))
    for _ in range(39):
        bench.commit(put("big", bytes(1 << 18)))
    assert 1 < len(bench.log(1_500).changes) < 40


def test_a_revision_beyond_all_is_no_error(bench: Bench) -> None:
    bench.commit(put("a"))
    assert bench.log(10**30).changes == []


# -- scans -------------------------------------------------------------------------------------------------------------

ODD = ["!", "a", "a:", "a:b", "a:é", "aa", "b", "[", "(", "+", "-", "é", "ﬀ", "\U0001f600", "￿", "\U0010ffff", "a￿x"]


def test_a_scan_finds_what_begins_with_the_prefix_sorted_by_code_points(bench: Bench) -> None:
    bench.commit(*map(put, ODD))
    for prefix, after, limit in product(["", *ODD, "a:b:"], [None, "", "a:", "a￿", "￿"], [None, 1, 3]):
        expected = [key for key in sorted(ODD) if key.startswith(prefix) and (after is None or key > after)]
        assert list(bench.scan(prefix, after=after, limit=limit).entries) == expected[:limit]


def test_a_scan_of_keys_finds_those_that_are_there(bench: Bench) -> None:
    bench.commit(*map(put, ODD))
    for after, limit in product([None, "a", "é"], [None, 1, 100]):
        expected = [key for key in sorted(ODD) if after is None or key > after]
        assert list(bench.scan(keys=[*reversed(ODD), "absent"], after=after, limit=limit).entries) == expected[:limit]


@pytest.mark.parametrize("size", [2_345, pytest.param(12_345, marks=pytest.mark.slow)])
def test_a_scan_has_no_end_but_its_own(bench: Bench, size: int) -> None:
    keys = [f"{number:05}" for number in range(size)]
    bench.commit(*map(put, keys))
    assert list(bench.scan().entries) == keys
    assert list(bench.scan(keys=keys).entries) == keys
    assert bench.scan().place == bench.seen


# -- what others left there --------------------------------------------------------------------------------------------

GOOD = b'5 5 1700000000000000 - ["json", null, null]\n1'
DAMAGED_FROM_THE_START = [
    b"",
    b"\xff",
    b"1",
    b"x" + GOOD,
    b"-" + GOOD,
    b"99999999999999999999 " + GOOD,
    GOOD.replace(b" - ", b" nan "),
    GOOD.replace(b" - ", b" "),
]
DAMAGED_LATER = [
    GOOD.replace(b"[", b""),
    GOOD.replace(b'"json"', b"5"),
    GOOD.replace(b'"json"', b'""'),
    GOOD.replace(b'"json"', b"null"),
    GOOD.replace(b'"json"', b'"\\ud800"'),
    GOOD.replace(b"null", b"[]"),
    GOOD.replace(b"null", b"{}", 1),
    GOOD.replace(b"null]", b"null, null]"),
    GOOD.replace(b"[", b"\xff"),
    GOOD.replace(b"[", b"[" * 100_000),
    GOOD.replace(b'"json"', b"9" * 10_000),
    GOOD.partition(b"[")[0],
]


@pytest.mark.parametrize("record", DAMAGED_FROM_THE_START)
def test_a_record_that_is_damaged_from_the_start_harms_its_key_only(bench: Bench, record: bytes) -> None:
    bench.commit(put("a"), put("b"))
    bench.client.hset(bench.name("v"), "a", record)

    with pytest.raises(DamagedValue, match="'a'"):
        bench.read("a")
    found = bench.scan().entries
    assert (found["a"].value.codec, found["a"].revision, found["b"].value.codec) == ("", 0, "json")
    assert bench.read("b") == found["b"]


@pytest.mark.parametrize("record", DAMAGED_LATER, ids=range(len(DAMAGED_LATER)))
def test_a_record_whose_body_is_damaged_has_a_value_that_no_codec_reads(bench: Bench, record: bytes) -> None:
    bench.commit(put("a"))
    bench.client.hset(bench.name("v"), "a", record)

    stored = bench.read("a")

    assert stored is not None
    assert (stored.value.codec, stored.revision, stored.writer, stored.meta) == ("", 5, None, None)
    assert bench.scan().entries == {"a": stored}


@pytest.mark.parametrize("record", [b"", b"\xff", b"0 " + GOOD, b"x" + GOOD])
def test_a_condition_on_a_damaged_record_cannot_be_judged(bench: Bench, record: bytes) -> None:
    bench.commit(put("a"))
    bench.client.hset(bench.name("v"), "a", record)

    for revision in (0, 1):
        with pytest.raises(DamagedValue, match="'a'"):
            bench.commit(put("b"), put("a", if_revision=revision))

    assert bench.commit(put("b", if_revision=0)) == (2,)


DAMAGED_WITH_DEADLINE = [record.replace(b" - ", b" 9000000000000000 ") for record in DAMAGED_LATER]


@pytest.mark.parametrize("record", [*DAMAGED_FROM_THE_START, *DAMAGED_WITH_DEADLINE], ids=range(20))
@pytest.mark.parametrize("ttl", [None, "keep", 1000])
def test_a_damaged_record_is_mended_by_writing_or_deleting_it(bench: Bench, record: bytes, ttl: Ttl) -> None:
    bench.commit(put("a", ttl=1000))
    bench.client.hset(bench.name("v"), "a", record)

    bench.commit(put("a", b"2", ttl=ttl))

    stored = bench.read("a")
    assert stored is not None
    assert stored.value == Value("json", b"2")
    assert deadlines(bench) == (["a"] if stored.expires else [])
    (_, change) = bench.log().changes
    assert change.value == Value("json", b"2")
    bench.client.hset(bench.name("v"), "a", record)
    assert bench.commit(remove("a")) == (3,)
    assert bench.scan().entries == {}
    assert deadlines(bench) == []


def test_a_damaged_record_expires_like_any_other(bench: Bench) -> None:
    bench.commit(put("a", ttl=TTL))
    bench.client.hset(bench.name("v"), "a", b"\xff")
    bench.let_pass(TTL)
    assert bench.scan().entries == {}
    assert told(bench.log(1).changes) == [(2, "delete", "a", True)]


ALIEN: list[dict[bytes | str, bytes | str]] = [
    {"x": "y"},
    {"o": "s"},
    {"o": "?", "k": "a", "n": GOOD, "p": ""},
    {"o": b"\xff", "k": b"\xff", "n": b"\xff", "p": b"\xff"},
    {"k": "a", "o": "s", "p": "", "n": GOOD},
    *({"o": "s", "k": "a", "n": record, "p": record} for record in [*DAMAGED_FROM_THE_START, *DAMAGED_LATER]),
]


@pytest.mark.parametrize("fields", ALIEN, ids=range(len(ALIEN)))
def test_an_alien_entry_of_the_log_is_a_change_that_harms_no_other(
    bench: Bench, fields: dict[bytes | str, bytes | str]
) -> None:
    bench.commit(put("a"))
    bench.client.xadd(bench.name("s"), fields, id="2-0")  # type: ignore[arg-type]
    bench.client.hset(bench.name("m"), "revision", 2)
    bench.client.hset(bench.name("m"), "time", 1700000000000000)
    bench.seen = NOWHERE
    bench.commit(put("b"))

    changes = bench.log().changes

    assert [each.revision for each in changes] == [1, 2, 3]
    assert all(isinstance(each.key, str) and each.commit >= each.revision for each in changes)
    assert all(each.value is None or isinstance(each.value, Value) for each in changes)
    assert told(changes[::2]) == [(1, "set", "a", False), (3, "set", "b", False)]


def test_entries_beside_the_log_are_passed_over(bench: Bench) -> None:
    bench.commit(put("a"))
    bench.client.xadd(bench.name("s"), {"x": "y"}, id="1-7")
    bench.commit(put("b"))
    assert [each.revision for each in bench.log().changes] == [1, 2]


def test_a_key_of_another_type_is_a_refusal(bench: Bench) -> None:
    bench.client.set(bench.name("v"), "text")
    with pytest.raises(Unavailable, match="WRONGTYPE"):
        bench.read("a")


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_waiting_ends_at_once_if_there_is_more(new_bench: NewBench) -> None:
    bench = new_bench(timeout=10_000)
    bench.commit(put("a"))
    bench.wait(1000, NOWHERE)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-9, 0.05, 0.11])
def test_waiting_ends_in_time_if_there_is_nothing(bench: Bench, seconds: float) -> None:
    bench.commit(put("a"))
    bench.wait(seconds)


@pytest.mark.parametrize("timeout", [0.5, 4.0])
def test_waiting_asks_for_less_than_the_timeout(new_bench: NewBench, timeout: float) -> None:
    asked = next(new_bench(timeout=timeout).engine.wait(NOWHERE, 30))
    assert isinstance(asked, Wait)
    words = asked.command.split(b"\r\n")
    assert 0 < int(words[words.index(b"BLOCK") + 2]) <= timeout * 1000 / 2


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.05, 0.11, 0.5, 2.0])
def test_waiting_asks_for_no_more_than_the_seconds_that_it_is_told(bench: Bench, seconds: float) -> None:
    asked = next(bench.engine.wait(NOWHERE, seconds))
    if isinstance(asked, Wait):
        words = asked.command.split(b"\r\n")
        assert 0 < int(words[words.index(b"BLOCK") + 2]) < seconds * 1000
    else:
        assert isinstance(asked, Sleep)
        assert 0 <= asked.seconds <= max(seconds, 0)


@pytest.mark.slow
def test_waiting_stays_below_the_timeout(new_bench: NewBench) -> None:
    bench = new_bench(timeout=4)
    bench.commit(put("a"))
    bench.wait(30)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "word"), [("maxmemory", "1", "OOM"), ("min-replicas-to-write", "1", "NOREPLICAS")]
)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_server_that_refuses_to_write_has_written_nothing(
    new_server: Callable[..., Server], option: str, value: str, word: str, fresh: bool
) -> None:
    bench = Bench(new_server(VALKEY).url)
    if not fresh:
        bench.commit(put("a", ttl=TTL), put("b"))
        bench.let_pass(TTL)
    before = bench.dump()
    bench.client.config_set(option, value)

    with pytest.raises(Unavailable, match=word):
        bench.commit(put("c"))

    assert bench.dump() == before
    bench.close()
