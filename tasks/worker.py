"""The worker process: Procrastinate takes tickets, the executor runs their jobs.

It hides Procrastinate's worker. The one rule: a ticket ends in the transaction that ends its job,
so the worker itself never decides about one that is still owed.
"""

import asyncio
import contextlib
import logging
import os
import platform
from typing import Any

from procrastinate import JobContext, jobs
from procrastinate.worker import Worker

from app.db import Database, Unavailable, open_database
from app.queue import GENERATE, QUEUE, make_queue
from app.settings import Settings
from tasks.executor import RENEW_EVERY, Executor
from tasks.providers import Provider, make_provider

log = logging.getLogger("baton.worker")

POOL_SIZE = 6  # connections; an attempt holds one only while it reads or writes
POLL_EVERY = 1.0  # seconds between looks for tickets; a notification is usually faster
GRACE = 30.0  # seconds that running attempts get to finish when the worker is told to stop
RETURN_AFTER = 5.0  # seconds until a ticket whose attempt broke is tried again


class TicketWorker(Worker):
    """Procrastinate's worker, except for how a ticket ends.

    Stock Procrastinate writes the end of a ticket in a statement of its own, after the fact, and
    unfenced. Here the executor has already ended it together with the job.
    """

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(**options)
        self._database = database

    async def _persist_job_status(
        self, job: jobs.Job, status: jobs.Status, *_: Any, **__: Any
    ) -> None:
        assert job.id is not None
        if status is jobs.Status.FAILED:
            await self._database.value("return_ticket", job.id, self.worker_id, RETURN_AFTER)
        else:
            await self._database.value("end_ticket", job.id, self.worker_id)
        self._job_ids_to_abort.pop(job.id, None)

    async def _monitor_side_tasks(self, side_tasks: list[asyncio.Task[Any]]) -> None:
        """Stop when a side task dies. Stock Procrastinate watches until the first one has ended,
        and the deferrer of periodic tasks ends at once where there are none."""
        waiting = set(side_tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and (error := task.exception()):
                    log.error("side task died", extra={"task": task.get_name()}, exc_info=error)
                    self.stop()  # type: ignore[no-untyped-call]  # unannotated upstream
                    return


def make_worker(
    database: Database, provider: Provider, *, concurrency: int, attempt_timeout: float
) -> tuple[TicketWorker, Executor]:
    """A worker over a pool, not yet running, and the executor that it gives tickets to."""
    executor = Executor(
        database,
        provider,
        name=f"{platform.node()}:{os.getpid()}",
        attempt_timeout=attempt_timeout,
    )
    queue = make_queue(database)

    @queue.task(name=GENERATE, queue=QUEUE, pass_context=True)
    async def generate(context: JobContext, job_id: str) -> None:
        assert context.job.id is not None
        await executor.run(job_id, context.job.id)

    worker = TicketWorker(
        database,
        app=queue,
        queues=[QUEUE],
        concurrency=concurrency,
        fetch_job_polling_interval=POLL_EVERY,
        shutdown_graceful_timeout=GRACE,
        delete_jobs=jobs.DeleteJobCondition.ALWAYS,
    )
    return worker, executor


async def run_worker(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then let running attempts finish within `GRACE`.

    Raises:
        Unavailable, procrastinate.exceptions.ConnectorException: the database is away.
    """
    assert settings.database_url
    provider = make_provider(settings)
    async with open_database(
        settings.database_url, application_name="baton worker", size=POOL_SIZE
    ) as database:
        worker, executor = make_worker(
            database,
            provider,
            concurrency=settings.concurrency,
            attempt_timeout=settings.attempt_timeout,
        )
        renewing = asyncio.create_task(renew_forever(executor))
        try:
            log.info("start", extra={"concurrency": settings.concurrency})
            await worker.run()  # type: ignore[no-untyped-call]  # unannotated upstream
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
            log.info("stop")


async def renew_forever(executor: Executor) -> None:
    """Keep the leases of running attempts; one failed renewal is made up by the next."""
    while True:
        await asyncio.sleep(RENEW_EVERY)
        try:
            await executor.renew_once()
        except Unavailable as error:
            log.warning("leases not renewed", extra={"cause": str(error)})
