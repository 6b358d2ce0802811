"""The worker process: Procrastinate takes tickets, the executor runs their jobs.

It hides Procrastinate's worker and what has to be different about it. The one rule: a ticket ends
in the transaction that ends its job, so the worker itself never decides about one that is owed.

Procrastinate's version is pinned to what is overridden here; the tests of this file are the gate
for raising it.
"""

import asyncio
import logging
import os
import platform
from collections.abc import Callable, Collection, Iterable
from contextlib import AsyncExitStack, suppress
from typing import Any

import asyncpg
from procrastinate import JobContext, exceptions, jobs, manager, utils
from procrastinate.worker import Worker

from app import __version__, metrics
from app.background import background, watch_loop
from app.chat import Chat
from app.cipher import Cipher
from app.connector import AsyncpgConnector
from app.db import Database, DatabaseError, Unavailable, open_database
from app.exporter import Exporter, listening
from app.queue import DIGESTS, GENERATE, NEWER, QUEUE, Bell, hung_bell, make_queue
from app.retention import apply_retention
from app.settings import Settings
from app.sweeper import Sweeper
from tasks.breaker import Breaker
from tasks.delivery import Deliverer
from tasks.entering import enter_events
from tasks.executor import Executor
from tasks.intake import Mapper
from tasks.naming import Namer
from tasks.outbound import Outbound
from tasks.posting import Poster
from tasks.providers import Provider, open_provider

log = logging.getLogger("baton.worker")

POOL_SIZE = 8  # connections for fetchers, heartbeats, leases and what else has to be in time
ATTEMPTS_POOL_SIZE = 6  # for the attempts; one is held only while an attempt reads or writes
FETCHERS = 4  # that take tickets at once when there are many: each waits for the database mostly
BACKLOG_AFTER = 0.05  # seconds of taking one after the other, from which on there are many
POLL_EVERY = 1.0  # seconds between looks for tickets; a notification is usually faster
BEAT_EVERY = 5.0  # seconds; six may fail before a worker is taken for dead (app/sweeper.py)
AUDIT_EVERY = 15.0  # seconds between comparing the tickets in the table with those in hand
GRACE = 30.0  # seconds that running attempts get to finish when the worker is told to stop
RETURN_AFTER = 2.0  # seconds until a ticket whose job could not be claimed is tried again
OUTAGE = 600.0  # seconds of an outage that a worker waits out; a supervisor may do better then
MINUTE_PRIORITY = 1000  # of what is due each minute: before all jobs, as it takes milliseconds
UNREGISTER = 5.0  # seconds; a row left behind is pruned by the sweepers


class WorkerBroken(Exception):
    """The worker stopped without being told to."""


class _Wake(asyncio.Event):
    """Keeps a notification that arrives during a fetch.

    Procrastinate clears its event after the fetch, so a ticket that is announced while an empty
    fetch is on its way would wait for the next poll. Here `clear` forgets only what had been
    announced before the fetch began.
    """

    announced = 0
    seen = 0

    def set(self) -> None:
        """A ticket was announced."""
        self.announced += 1
        super().set()

    def clear(self) -> None:
        """A fetch that began at `seen` has ended."""
        if self.announced == self.seen:
            super().clear()


class _Tickets(manager.JobManager):
    """Hands out no ticket while the provider is down; a worker that can reach it may have them.
    Nor in a database that is held, where no job could be claimed for it. What is due each minute is
    deferred by whichever worker is first, and may fail: the next minute makes up for it."""

    def __init__(
        self,
        connector: AsyncpgConnector,
        breaker: Breaker,
        held: Callable[[], Collection[int]],
        on_hold: Callable[[], bool],
    ) -> None:
        super().__init__(connector)
        self._breaker = breaker
        self._held = held
        self._on_hold = on_hold

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> jobs.Job | None:
        """The next ticket, or None."""
        if self._on_hold() or not self._breaker.admits(self._held()):
            return None
        try:
            ticket = await super().fetch_job(queues, worker_id)
        except exceptions.ConnectorException as error:
            if isinstance(error.__cause__, asyncpg.ForeignKeyViolationError):
                return None  # our row is gone, as the next beat finds out
            raise
        if ticket is not None and ticket.id is not None:
            self._breaker.take(ticket.id)
        return ticket

    async def defer_periodic_job(self, *args: Any, **options: Any) -> int | None:
        """The ticket of this minute, or None: there is one, or there can be none now."""
        if self._on_hold():
            return None
        try:
            return await super().defer_periodic_job(*args, **options)
        except exceptions.ConnectorException as error:
            log.warning("minute missed", extra={"cause": repr(error.__cause__)})
            return None


class TicketWorker(Worker):
    """Procrastinate's worker, except where it would lose something.

    - A ticket's end is not written after the fact and unfenced; the executor has ended it.
    - No wake-up is lost (`_Wake`).
    - The heart beats until the last attempt has drained, survives a failed beat, and stops the
      worker when its row is gone: others have taken it for dead and run its jobs.
    - A side task that dies stops the worker; upstream only watches until the first one has ended.
    - Tickets that the table gives to this worker, but that it does not have, are given back.
    - While the provider is down, or the database is held, it takes none (`_Tickets`).
    - It has a row in `workers`, and drains when that says so.

    Args:
        row: what `workers` says of it.
    """

    def __init__(
        self,
        database: Database,
        connector: AsyncpgConnector,
        breaker: Breaker,
        row: dict[str, Any],
        on_hold: Callable[[], bool],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.app.job_manager = _Tickets(connector, breaker, self._held, on_hold)
        self._database = database
        self._connector = connector
        self._breaker = breaker
        self._row = row
        self._new_job_event = self._wake = _Wake()
        self.stopping = False
        self.broken: str | None = None  # why the worker stopped by itself

    def stop(self) -> None:
        """Take no more tickets, drain, and end."""
        self.stopping = True
        self._connector.stop_retrying()
        super().stop()  # type: ignore[no-untyped-call]  # unannotated upstream

    def _break(self, reason: str) -> None:
        log.critical("worker broken", extra={"reason": reason})
        self.broken = self.broken or reason
        self.stop()

    async def _fetch_and_process_jobs(self) -> None:
        # Everything announced up to here is covered by the fetches that follow; upstream clears
        # the event after each of them.
        self._wake.seen = self._wake.announced
        fetching = [asyncio.create_task(self._fetch_all())]
        try:
            if not (await asyncio.wait(fetching, timeout=BACKLOG_AFTER))[0]:
                fetching += [asyncio.create_task(self._fetch_all()) for _ in range(FETCHERS - 1)]
            await asyncio.wait(fetching)
        except asyncio.CancelledError:
            for task in fetching:
                task.cancel()
            await asyncio.wait(fetching)
            raise
        for task in fetching:
            task.result()

    async def _fetch_all(self) -> None:
        """Take tickets, one after the other, until there is none or no room for one."""
        await super()._fetch_and_process_jobs()  # type: ignore[no-untyped-call]

    async def _persist_job_status(
        self, job: jobs.Job, status: jobs.Status, *_: Any, **__: Any
    ) -> None:
        assert job.id is not None
        try:
            if status is jobs.Status.FAILED:
                await self._database.value("return_ticket", job.id, self.worker_id, RETURN_AFTER)
            else:
                await self._database.value("end_ticket", job.id, self.worker_id)
        except Unavailable as error:  # the audit or the sweepers find it
            log.warning("ticket left", extra={"ticket_id": job.id, "cause": str(error)})
        self._job_ids_to_abort.pop(job.id, None)

    def _start_side_tasks(self) -> list[asyncio.Task[Any]]:
        side_tasks = super()._start_side_tasks()
        side_tasks.append(asyncio.create_task(self._audit(), name="audit"))
        return side_tasks

    async def _monitor_side_tasks(self, side_tasks: list[asyncio.Task[Any]]) -> None:
        done, _ = await asyncio.wait(side_tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                self._break(f"{task.get_name()} ended: {task.exception()!r}")

    async def _update_heartbeat(self) -> None:
        while True:
            try:
                state = await self._database.value(
                    "beat", self.worker_id, self._row, self._breaker.rest
                )
            except Unavailable as error:
                log.warning("heartbeat failed", extra={"cause": str(error)})
            else:
                if state is None:
                    self._break("its row is gone; others have taken it for dead")
                    return
                if state == "draining" and not self.stopping:
                    log.info("drain", extra={"worker": self.worker_id})
                    self.stop()
            await asyncio.sleep(BEAT_EVERY)

    async def _audit(self) -> None:
        """A claim whose answer got lost leaves a ticket that is ours in the table only."""
        suspects: set[int] = set()
        while True:
            await asyncio.sleep(AUDIT_EVERY)
            try:
                suspects = await self.audit_once(suspects)
            except Unavailable as error:
                log.warning("audit failed", extra={"cause": str(error)})

    async def audit_once(self, suspects: set[int]) -> set[int]:
        """Give back the tickets that were unknown last time and still are; answers the unknown."""
        rows = await self._database.rows("unknown_tickets", self.worker_id, self._held())
        unknown = {row[0] for row in rows}
        for ticket_id in unknown & suspects:
            log.warning("ticket unknown", extra={"ticket_id": ticket_id})
            await self._database.value("return_ticket", ticket_id, self.worker_id, 0.0)
        return unknown

    def _held(self) -> list[int]:
        return [c.job.id for c in self._running_jobs.values() if c.job.id is not None]

    async def _shutdown(self, side_tasks: list[asyncio.Task[Any]]) -> None:
        worker_id = self.worker_id
        beating = [task for task in side_tasks if task.get_name() == "update_heartbeats"]
        await utils.cancel_and_capture_errors([t for t in side_tasks if t not in beating])
        try:
            async with asyncio.timeout(GRACE + UNREGISTER):
                await super()._shutdown(side_tasks=[])
        except (exceptions.ConnectorException, TimeoutError) as error:
            log.warning("worker not unregistered", extra={"cause": repr(error)})
        finally:
            await utils.cancel_and_capture_errors(beating)
        with suppress(Unavailable):  # then the sweepers call it lost
            await self._database.value("stop_worker", worker_id)


def make_worker(
    database: Database,
    provider: Provider,
    bell: Bell,
    *,
    concurrency: int,
    attempt_timeout: float,
    retry_for: float = OUTAGE,
    ended: Callable[[], None] = lambda: None,
    breaker: Breaker | None = None,
    attempts: Database | None = None,
    provider_name: str = "extractive",
    on_hold: Callable[[], bool] = lambda: False,
) -> tuple[TicketWorker, Executor]:
    """A worker over a pool, not yet running, and the executor that it gives tickets to.

    Args:
        ended: called after each attempt.
        breaker: says whether the provider is there; one of the worker's own by default.
        attempts: the pool of the attempts, so that many of them are not in the way of their leases.
        provider_name: what BATON_PROVIDER calls the provider.
        on_hold: is the database held, as far as this process knows? The database itself refuses
            claims then; to know it spares taking tickets for nothing.
    """
    breaker = breaker or Breaker()
    row = {
        "name": f"{platform.node()}:{os.getpid()}",
        "host": platform.node(),
        "version": __version__,
        "concurrency": concurrency,
        "provider": provider_name,
    }
    metrics.concurrency.set(concurrency)
    executor = Executor(
        database,
        provider,
        name=str(row["name"]),
        attempt_timeout=attempt_timeout,
        bell=bell,
        breaker=breaker,
        attempts=attempts,
    )
    queue = make_queue(database, retry_for=retry_for)

    @queue.task(name=GENERATE, queue=QUEUE, pass_context=True)
    async def generate(context: JobContext, job_id: str) -> None:
        assert context.job.id is not None
        await executor.run(job_id, context.job.id)
        ended()

    @queue.periodic(cron="* * * * *")
    @queue.task(name=DIGESTS, queue=NEWER, queueing_lock=DIGESTS, priority=MINUTE_PRIORITY)
    async def digests(timestamp: int) -> None:
        while project_id := await database.value("submit_digest"):
            log.info("digest", extra={"project_id": project_id})
            bell.ring()

    assert isinstance(queue.connector, AsyncpgConnector)
    worker = TicketWorker(
        database,
        queue.connector,
        breaker,
        row,
        on_hold,
        app=queue,
        queues=[QUEUE, NEWER],
        concurrency=concurrency,
        fetch_job_polling_interval=POLL_EVERY,
        shutdown_graceful_timeout=GRACE,
        delete_jobs=jobs.DeleteJobCondition.ALWAYS,
    )
    return worker, executor


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then let running attempts finish within `GRACE` and give the
    rest back. A second signal ends the process at once; the sweepers bring its jobs back.

    Raises:
        WorkerBroken: the worker stopped for another reason and should be started again.
    """
    assert settings.database_url
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(open_provider(settings))
        database = await stack.enter_async_context(
            open_database(
                settings.database_url,
                application_name="baton worker",
                role="baton_worker",
                size=POOL_SIZE,
            )
        )
        attempts = await stack.enter_async_context(
            open_database(
                settings.database_url,
                application_name="baton worker",
                role="baton_worker",
                size=ATTEMPTS_POOL_SIZE,
                patient=True,
            )
        )
        bell = await stack.enter_async_context(hung_bell(database))
        deliverer = Deliverer(database, Outbound(settings.webhook_allow))
        chat = Chat(settings)
        stack.push_async_callback(chat.close)
        poster = Poster(database, chat, Cipher.from_settings(settings))
        sweeper = Sweeper(database, bell)

        def wake() -> None:
            deliverer.wake()
            poster.wake()

        worker, executor = make_worker(
            database,
            provider,
            bell,
            concurrency=settings.concurrency,
            attempt_timeout=settings.attempt_timeout,
            ended=wake,
            attempts=attempts,
            provider_name=settings.provider,
            on_hold=lambda: sweeper.hold_reason is not None,
        )
        await stack.enter_async_context(background(sweeper.run()))
        await stack.enter_async_context(background(apply_retention(database)))
        await stack.enter_async_context(background(enter_events(database)))
        await stack.enter_async_context(background(executor.renew_forever()))
        await stack.enter_async_context(background(deliverer.run()))
        await stack.enter_async_context(background(poster.run()))
        await stack.enter_async_context(background(Mapper(database).run()))
        namer = Namer(database, Cipher.from_settings(settings))
        await stack.enter_async_context(background(namer.run()))
        await stack.enter_async_context(background(executor.report_forever()))
        await stack.enter_async_context(background(watch_loop()))
        if settings.worker_metrics:
            pools = {"worker": database, "attempts": attempts}
            exporter = Exporter(metrics.WORKER, pools)
            await stack.enter_async_context(
                listening(settings.worker_metrics, "BATON_WORKER_METRICS", exporter)
            )
        with suppress(DatabaseError):  # the sweeper finds out
            await sweeper.held()
        log.info("start", extra={"concurrency": settings.concurrency})
        try:
            await worker.run()  # type: ignore[no-untyped-call]  # unannotated upstream
            with suppress(Unavailable):
                await executor.record_once()
        except exceptions.ConnectorException as error:
            if not worker.stopping:
                raise WorkerBroken(f"the database is away: {error.__cause__!r}") from error
        log.info("stop")
    if worker.broken:
        raise WorkerBroken(worker.broken)
