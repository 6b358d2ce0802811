"""How much one caller may ask for: requests a minute, and requests that wait at once.

It hides how the counts are kept: they are the database's, so that they are exact over any number of
processes. The one rule: a request is counted by the very statement that looks up its key, and only
when it is admitted.

    default   everything that needs a key                     a minute and key
    poll      reading a job that one knows the id of          a minute and key
    generate  asking for an artifact, beside `default`        a minute and user
    waits     requests held open, for as long as they are     at once and key

A fifth, `pending`, is for the jobs of a project that wait for a worker: assert_room of schema.sql.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

from app import metrics
from app.background import background
from app.db import Database, DatabaseError
from app.errors import RateLimited, TooManyWaits
from app.settings import Limits

log = logging.getLogger("baton.api")

Policy = Literal["default", "poll", "generate"]

WINDOW = 60  # seconds; schema.sql counts in it
SLOT_COUNTS = 60.0  # seconds that a slot counts when its process has died
KEEP_EVERY = 20.0  # seconds; two may fail before a slot of a living process is lost
QUIET = 0.02  # seconds between two statements that give slots back


async def admit(request: Request, digest: bytes, policies: Sequence[Policy]) -> str | None:
    """Who a live key acts for, counting the request in all the policies; None: no such key.

    Leaves the key's id in `request.state.key_id`, and what `headers` says.

    Raises:
        RateLimited: one of the policies refuses, so none has counted the request.
    """
    quotas = [getattr(request.app.state.limits, policy) for policy in policies]
    database: Database = request.app.state.database
    row = await database.row("admit", digest, policies, quotas)
    assert row is not None
    if row["user_id"] is None:
        return None
    request.state.key_id = row["key_id"]
    standings = zip(policies, row["quotas"], row["remaining"], row["resets"], strict=True)
    limited = [standing for standing in standings if standing[1]]
    for policy, quota, left, reset in limited:
        _tell(request, f'"{policy}";q={quota};w={WINDOW}', f'"{policy}";r={left};t={reset}')
    if row["refused"]:
        refusing = [each for each in limited if each[0] in row["refused"]]
        raise RateLimited(
            "; ".join(
                f"{quota} requests per {WINDOW} s for this {_counted_by(policy)}"
                for policy, quota, _, _ in refusing
            ),
            [policy for policy, _, _, _ in refusing],
            max(reset for _, _, _, reset in refusing),
        )
    return str(row["user_id"])


def _counted_by(policy: Policy) -> str:
    return "user" if policy == "generate" else "key"


def headers(scope: Scope) -> dict[str, str]:
    """What the answer to an authenticated request says about the limits that applied to it."""
    told = scope.get("state", {}).get("limits")
    if not told:
        return {}
    policies, standings = zip(*told, strict=True)
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(standings)}


def _tell(request: Request, policy: str, standing: str) -> None:
    if not hasattr(request.state, "limits"):
        request.state.limits = []
    request.state.limits.append((policy, standing))


@asynccontextmanager
async def wait_slot(request: Request) -> AsyncIterator[None]:
    """Hold one of the caller's slots for waiting while the body runs, however it ends.

    One statement before the body and none after it: a slot is given back in the background.

    Raises:
        TooManyWaits: all are taken.
    """
    slots: WaitSlots = request.app.state.wait_slots
    slot, quota, left = await slots.take(request.state.user_id, request.state.key_id)
    if quota:
        standing = f'"waits";r={left or 0}'
        _tell(request, f'"waits";q={quota};qu="concurrent-requests"', standing)
        if slot is None:
            raise TooManyWaits(quota)
    request.state.held = True  # how long it takes says nothing about us
    metrics.requests_held.inc()
    try:
        yield
    finally:
        metrics.requests_held.dec()
        if slot is not None:
            slots.release(slot)


class WaitSlots:
    """The slots of one process: kept while they are held, given back in batches."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._quota = limits.waits
        self._held: set[str] = set()
        self._released: set[str] = set()
        self._wanted = asyncio.Event()

    async def take(self, user_id: str, key_id: str) -> tuple[str | None, int, int | None]:
        """A slot, the quota (0: none is needed), and how many are left; no slot: all are taken."""
        row = await self._database.row(
            "take_wait_slot", user_id, key_id, self._quota, SLOT_COUNTS, list(self._released)
        )
        assert row is not None
        slot, quota, left = row
        if slot is not None:
            self._held.add(slot)
        return slot, quota, left

    def release(self, slot: str) -> None:
        """Give a slot back; returns at once. For this process it is free from now on."""
        self._held.discard(slot)
        self._released.add(slot)
        self._wanted.set()

    async def run(self) -> None:
        """Keep and give back, for ever; what an outage prevents ends by itself in a minute."""
        while True:
            try:
                async with asyncio.timeout(KEEP_EVERY):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            await self._keep()
            await asyncio.sleep(QUIET)

    async def close(self) -> None:
        """Give back what is left, or the callers would miss it for a minute."""
        for slot in list(self._held):
            self.release(slot)
        await self._keep()

    async def _keep(self) -> None:
        held, released = list(self._held), list(self._released)
        if not held and not released:
            return
        try:
            await self._database.value("keep_wait_slots", held, released, SLOT_COUNTS)
            self._released.difference_update(released)
        except DatabaseError as error:
            log.warning("wait slots not kept", extra={"cause": str(error)})


@asynccontextmanager
async def wait_slots(database: Database, limits: Limits) -> AsyncIterator[WaitSlots]:
    """The slots of this process, for as long as the body runs."""
    slots = WaitSlots(database, limits)
    try:
        async with background(slots.run()):
            yield slots
    finally:
        await slots.close()
