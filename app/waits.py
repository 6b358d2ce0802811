"""Waiting for a job to change: without polling, and without a database connection meanwhile.

It hides how a process hears of changes, and what ends a wait: the change, the time, the client that
goes away, its key that is revoked, the process that stops. The one rule: register, then read, then
wait. What changes after the registration is found, whatever the read saw, and an answer is always a
fresh read.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request

from app.auth import unauthorized
from app.connector import WAKE_UP, listen
from app.db import Database, DatabaseError
from app.limits import wait_slot
from app.queue import CHANGES

log = logging.getLogger("baton.api")
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

WAIT_MAX = 25  # seconds; clients that have been around for long give up at 30
# Seconds between looks at all that is waited for: finds what was changed by hand or announced to
# nobody. One statement, however many wait.
LOOK_EVERY = 2.0
KEYS_EVERY = 1.0  # seconds between looks whether the keys of those who wait are still good
READERS = 5  # answers that are read at once after a wake-up; half of the pool is for the others
TOGETHER = 100  # answers in one statement; with their artifacts they are a few MB

_GONE = 2**63 - 1  # the rev of a job that is not there any more


class _Job:
    """What is known of a job that somebody waits for; only from the looks of the hub."""

    __slots__ = ("ended", "rev", "watches")

    def __init__(self) -> None:
        self.rev = 0
        self.ended = False
        self.watches: set[Watch] = set()


class Watch:
    """The jobs that one request waits for; made by `Hub.watching`."""

    __slots__ = (
        *("_ended", "_gone", "_hub", "_jobs", "_request", "_seen", "_woken"),
        *("key_id", "revoked"),
    )

    def __init__(self, hub: "Hub", request: Request, jobs: Mapping[str, _Job]) -> None:
        self.key_id: str | None = getattr(request.state, "key_id", None)
        self.revoked = False
        self._hub = hub
        self._request = request
        self._jobs = jobs
        self._seen: Mapping[str, int] = {}
        self._ended = False
        self._woken = asyncio.Event()
        self._gone: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> bool:
        """Has it been registered *and* the job been read?"""
        return bool(self._seen)

    @property
    def gone(self) -> bool:
        """Has the client gone away?"""
        return self._gone is not None and self._gone.done()

    @property
    def alive(self) -> bool:
        """May it wait on? Not once the client has gone, its key is revoked or the process stops."""
        return not (self._hub.stopping or self.gone or self.revoked)

    async def changed(
        self, seen: Mapping[str, int], seconds: float, *, ended: bool = False
    ) -> bool:
        """Wait until one of the jobs has a higher rev than was seen, and with `ended` is over.

        False: nothing like that for so many seconds, or nobody is left to wait (see `alive`).
        """
        if self._gone is None:
            self._gone = asyncio.create_task(_disconnected(self._request))
            self._gone.add_done_callback(lambda _: self._woken.set())
        self._seen, self._ended = seen, ended
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.alive:
                    self._woken.clear()
                    if self._due():
                        return True
                    await self._woken.wait()
        return False

    def look(self) -> None:
        """Something is known anew: wake the request if it is what it waits for."""
        if self._hub.stopping or self._due():
            self._woken.set()

    def revoke(self) -> None:
        """Its key is good no more."""
        self.revoked = True
        self._woken.set()

    def close(self) -> None:
        """The request waits no more."""
        if self._gone:
            self._gone.cancel()

    def _due(self) -> bool:
        return any(
            self._jobs[job_id].rev > rev and (self._jobs[job_id].ended or not self._ended)
            for job_id, rev in self._seen.items()
        )


class Hub:
    """Everything that the requests of this process wait for.

    One connection listens, one statement reads whatever was announced, and only those are woken
    whose job has another rev than they know.
    """

    def __init__(self, database: Database) -> None:
        self.stopping = False
        # Held while a woken request reads its answer: when two thousand wake at once, the pool
        # must still have a connection for a request that comes then.
        self.turn = asyncio.Semaphore(READERS)
        self.jobs: dict[str, _Job] = {}
        self._database = database
        self._announced: set[str] = set()
        self._wanted = asyncio.Event()

    def __len__(self) -> int:
        """How many requests wait, having read what they know."""
        watches = set().union(*(job.watches for job in self.jobs.values()))
        return sum(watch.waiting for watch in watches)

    @contextmanager
    def watching(self, request: Request, job_ids: Collection[str]) -> Iterator[Watch]:
        """Register, so that no change is missed from here on; then read, then `Watch.changed`."""
        jobs = {job_id: self.jobs.setdefault(job_id, _Job()) for job_id in job_ids}
        watch = Watch(self, request, jobs)
        for job in jobs.values():
            job.watches.add(watch)
        try:
            yield watch
        finally:
            watch.close()
            for job_id, job in jobs.items():
                job.watches.remove(watch)
                if not job.watches:
                    del self.jobs[job_id]

    def stop(self) -> None:
        """The process is to stop: whoever waits is answered now, and nobody waits any more."""
        self.stopping = True
        self._wake(self.jobs.values())

    async def run(self) -> None:
        """Listen and look, for ever."""
        async with asyncio.TaskGroup() as tasks:
            database = self._database
            tasks.create_task(listen(database.dsn, [CHANGES], self._heard, role=database.role))
            tasks.create_task(self._look_forever())
            tasks.create_task(self._look_at_keys())

    async def _heard(self, *, channel: str, payload: str) -> None:
        # After a reconnection nobody knows what was announced meanwhile.
        announced = self.jobs if payload == WAKE_UP else payload.split(" ")
        if hits := self.jobs.keys() & announced:
            self._announced |= hits
            self._wanted.set()

    async def _look_forever(self) -> None:
        loop = asyncio.get_running_loop()
        next_of_all = loop.time() + LOOK_EVERY
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_of_all):
                    await self._wanted.wait()
            self._wanted.clear()
            if loop.time() >= next_of_all:
                next_of_all = loop.time() + LOOK_EVERY
                self._announced.update(self.jobs)
            announced, self._announced = self._announced, set()
            try:
                await self._look(announced)
            except DatabaseError as error:  # found by a later look, or the waits run out
                log.warning("waited jobs not read", extra={"cause": str(error)})

    async def _look_at_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_EVERY)
            watches = {watch for job in self.jobs.values() for watch in job.watches}
            keys = {watch.key_id for watch in watches} - {None}
            if not keys:
                continue
            try:
                revoked = {row[0] for row in await self._database.rows("revoked_keys", list(keys))}
            except DatabaseError as error:
                log.warning("keys not looked at", extra={"cause": str(error)})
                continue
            for watch in watches:
                if watch.key_id in revoked:
                    watch.revoke()

    async def _look(self, announced: Iterable[str]) -> None:
        """Read these jobs in one statement, however many there are, and wake whom it concerns."""
        known = {job_id: self.jobs[job_id] for job_id in announced if job_id in self.jobs}
        if not known:
            return
        revs = [job.rev for job in known.values()]
        changed = []
        for row in await self._database.rows("changed_jobs", list(known), revs):
            job = known[row["id"]]
            job.rev = _GONE if row["rev"] is None else row["rev"]
            job.ended = row["ended"]
            changed.append(job)
        self._wake(changed)

    def _wake(self, jobs: Iterable[_Job]) -> None:
        for job in jobs:
            for watch in job.watches:
                watch.look()


async def read_when(
    request: Request,
    job_ids: Collection[str],
    seconds: float | None,
    *,
    read: Callable[[], Awaitable[T]],
    unmet: Callable[[T], Mapping[str, int]],
    ended: bool,
    held: bool = False,
) -> T:
    """What `read` answers, as soon as it is what the client waits for or the time is over.

    Args:
        seconds: None or 0: read once, whatever it is.
        unmet: of an answer, the revs of the jobs that should change; empty when it will do.
        ended: only the end of a job is a change.
        held: the caller of this has a slot of the client's already.

    Raises:
        TooManyWaits: it would have to wait, and the caller has no slot left for that.
        Unauthorized: the caller's key was revoked while it waited.
    """
    if not seconds:
        return await read()
    hub: Hub = request.app.state.hub
    clock = asyncio.get_running_loop().time
    until = clock() + seconds
    with hub.watching(request, job_ids) as watch:
        answer = await read()
        if not (seen := unmet(answer)):
            return answer
        async with nullcontext() if held else wait_slot(request):
            woken = True
            while woken and seen:
                woken = await watch.changed(seen, until - clock(), ended=ended)
                if watch.revoked:
                    raise unauthorized()
                if watch.gone:
                    break  # nobody will read it
                answer = await read()
                seen = unmet(answer)
        return answer


class Together(Generic[K, V]):
    """Reads that are wanted at the same time, as one statement: when two thousand are woken at
    once, each would else wait for a connection of its own.

    A read joins the next statement and never the one that is on its way, which may have missed the
    very change that the reader was woken for.

    Args:
        read: the values of keys; those that are not there are left out.
    """

    def __init__(self, read: Callable[[Collection[K]], Awaitable[Mapping[K, V]]]) -> None:
        self._read = read
        self._wanted: dict[K, asyncio.Future[V | None]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def get(self, key: K) -> V | None:
        """The value, as it is from now on."""
        future = self._wanted.setdefault(key, asyncio.get_running_loop().create_future())
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_all())
        return await asyncio.shield(future)  # others wait for it as well

    async def _read_all(self) -> None:
        while self._wanted:
            keys = list(islice(self._wanted, TOGETHER))
            futures = {key: self._wanted.pop(key) for key in keys}
            try:
                found = await self._read(keys)
            except Exception as error:
                for future in futures.values():
                    future.set_exception(error)
                    future.exception()  # nobody may be left to take it
            else:
                for key, future in futures.items():
                    future.set_result(found.get(key))


async def _disconnected(request: Request) -> None:
    """Return when the client has gone away; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- Prefer (RFC 7240) ----------------------------------------------------------------------

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A quote that is never closed reaches to the end, so that no text is looked at twice.
_ELEMENT = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*(?:"|\\?$))+', re.DOTALL)
# So are spaces, of which nothing is ever given back.
_PREFERENCE = re.compile(
    rf"\s*+({_TOKEN})\s*+(?:=\s*+({_TOKEN}|{_QUOTED})?\s*+)?(?:;.*)?", re.DOTALL
)


def preferences(headers: Headers) -> dict[str, str]:
    """What the client would like, by name in lower case; what cannot be read is left out.

    Of a name that comes twice the first counts; parameters after `;` are of no use to anybody here.
    """
    found: dict[str, str] = {}
    for element in _ELEMENT.findall(",".join(headers.getlist("prefer"))):
        if preference := _PREFERENCE.fullmatch(element):
            value = preference[2] or ""
            if value.startswith('"'):
                value = re.sub(r"\\(.)", r"\1", value[1:-1])
            found.setdefault(preference[1].lower(), value)
    return found


@dataclass(frozen=True, slots=True)
class Preferred:
    """What a client would like of a request about jobs."""

    wait: int | None  # seconds, at most WAIT_MAX; None: the client does not want to wait
    respond_async: bool

    def applied(self, *, waited: bool = True, asynchronous: bool = False) -> dict[str, str]:
        """The header that says which of it was done."""
        met = ["respond-async"] if self.respond_async and asynchronous else []
        if self.wait is not None and waited:
            met.append(f"wait={self.wait}")
        return {"Preference-Applied": ", ".join(met)} if met else {}


def preferred(request: Request) -> Preferred:
    """What the client would like; what cannot be read or met is left out."""
    given = preferences(request.headers)
    return Preferred(_seconds(given.get("wait", "")), "respond-async" in given)


def _seconds(value: str) -> int | None:
    if not re.fullmatch("[0-9]+", value, re.ASCII):
        return None
    significant = value.lstrip("0")
    return min(int(significant or 0), WAIT_MAX) if len(significant) < 3 else WAIT_MAX
