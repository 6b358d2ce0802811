"""Posts digests into channels of Discord and Slack, and notes what came of it.

It runs beside the attempts of a worker. The one rule: a message ends only by a note in the
database; until then it is due again when its lease has run out. So a channel gets it at least once
within a day, or the note says why not; twice only if a worker dies between the post and the note,
or an answer is lost, and in Discord, which knows it again for some minutes, seldom even then.
"""

import asyncio
import logging
import random
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from app.chat import Account, Busy, Chat, ChatError, Post, Rejected
from app.cipher import Cipher, CipherError
from app.db import Database, DatabaseError, Unavailable
from app.logs import trace
from tasks.lines import line

log = logging.getLogger("baton.posting")

POLL_EVERY = (
    2.0  # seconds between looks for what is due; the end of a job here is looked at at once
)
AT_ONCE = 8  # posts on their way
ATTEMPT = 30.0  # seconds for one attempt, with its own retries of single calls
LEASE = ATTEMPT + 30.0  # seconds that a claim counts: the attempt, and time to note its outcome
DELAYS = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0)  # seconds after each attempt, then each hour
JITTER = 0.1  # of a delay, up or down
KEEP_DELAY = (0.1, 2.0)  # seconds between tries to note an outcome, first and longest
DRAIN = 3.0  # seconds that posts on their way get when the worker stops
TITLE_MAX, SUMMARY_MAX = 300, 1_500  # characters beside the file; Discord takes 2,000

_NOT_ITS_OWN = "The channel is not, or no longer, one of this integration's server or workspace."


@dataclass(frozen=True, slots=True)
class Message:
    """A digest that is ours to post into one channel until `leased_until`."""

    id: str
    project_id: str
    source: str
    workspace_id: str | None
    token: bytes | None = field(repr=False)
    channel_id: str
    title: str = field(repr=False)
    summary: str = field(repr=False)
    markdown: str = field(repr=False)
    attempt: int
    leased_until: datetime

    def post(self) -> Post:
        """What to post: the gist as a text, all of it as a file. Texts of artifacts are inert."""
        return Post(
            text=f"{line(self.title, TITLE_MAX)}\n{line(self.summary, SUMMARY_MAX)}",
            title=self.title,
            markdown=self.markdown,
            nonce=self.id.replace("-", "")[:24],
        )


class Poster:
    """Posts for one worker."""

    def __init__(self, database: Database, chat: Chat, cipher: Cipher) -> None:
        self._database = database
        self._chat = chat
        self._cipher = cipher
        self._wanted = asyncio.Event()
        self._posting: dict[asyncio.Task[None], Message] = {}

    def wake(self) -> None:
        """Look for what is due now; returns at once."""
        self._wanted.set()

    async def run(self) -> None:
        """Post for ever; an outage of the database, or of its schema, is waited out. When it is
        cancelled, posts on their way get `DRAIN` seconds, and the rest is given back."""
        try:
            while True:
                self._wanted.clear()
                try:
                    await self.start_due()
                except DatabaseError as error:
                    log.warning("messages not claimed", extra={"cause": type(error).__name__})
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_EVERY):
                        await self._wanted.wait()
        finally:
            await self._stop()

    async def start_due(self) -> int:
        """Claim what is due and start posting it; answers how many."""
        free = AT_ONCE - len(self._posting)
        if free <= 0:
            return 0
        rows = await self._database.rows("claim_chat_messages", free, LEASE)
        for row in rows:
            message = Message(**row)
            task = asyncio.create_task(self._attempt(message))
            self._posting[task] = message
            task.add_done_callback(self._attempted)
        return len(rows)

    async def drain(self) -> None:
        """Until nothing is due and nothing on its way."""
        while await self.start_due() or self._posting:
            await asyncio.wait(list(self._posting))

    def _attempted(self, task: "asyncio.Task[None]") -> None:
        del self._posting[task]
        self._wanted.set()  # its place is free
        if not task.cancelled() and (error := task.exception()):
            log.error("posting failed", extra={"trace": trace(error)})

    async def _attempt(self, message: Message) -> None:
        message_id: str | None = None
        error: str | None = None
        retry: float | None = None
        try:
            async with asyncio.timeout(ATTEMPT):
                message_id = await self._post(message)
        except Rejected as refused:
            error = str(refused)
        except (ChatError, CipherError, TimeoutError) as failure:
            error = str(failure) or "It took too long."
            delay = DELAYS[min(message.attempt, len(DELAYS)) - 1]
            asked = failure.retry_after if isinstance(failure, Busy) else 0.0
            retry = max(delay * random.uniform(1 - JITTER, 1 + JITTER), asked)
        except Exception as broken:  # else it would be due again and again
            log.error("posting broken", extra={"message_id": message.id, "trace": trace(broken)})
            error = "The message could not be posted."
        await self._note(message, message_id, error, retry)

    async def _post(self, message: Message) -> str:
        if message.token is None:
            raise ChatError("The integration is disabled, or has no token to post with.")
        account = Account(self._cipher.decrypt(message.token), message.workspace_id)
        service = self._chat[message.source]
        # Asked each time: a channel can move, and a bot can be in the servers of several tenants.
        if not await service.has(account, message.channel_id):
            raise ChatError(_NOT_ITS_OWN)
        return await service.post(account, message.channel_id, message.post())

    async def _note(
        self, message: Message, message_id: str | None, error: str | None, retry: float | None
    ) -> None:
        """Write the outcome; while the database is away again and again, as long as the lease
        counts. After that somebody posts it again anyway."""
        delay = KEEP_DELAY[0]
        state = None
        with suppress(TimeoutError):
            async with asyncio.timeout(LEASE):
                while True:
                    try:
                        state = await self._database.value(
                            "chat_attempted",
                            message.id,
                            message.leased_until,
                            message_id,
                            error,
                            retry,
                        )
                        break
                    except Unavailable as away:
                        log.warning("outcome kept", extra={"cause": str(away)})
                    await asyncio.sleep(delay * random.uniform(0.5, 1.5))
                    delay = min(delay * 2, KEEP_DELAY[1])
        log.log(
            logging.INFO if error is None else logging.WARNING,
            "post",
            extra={
                "message_id": message.id,
                "project_id": message.project_id,
                "source": message.source,
                "attempt": message.attempt,
                "state": state,
                "cause": error,
            },
        )

    async def _stop(self) -> None:
        if self._posting:
            await asyncio.wait(list(self._posting), timeout=DRAIN)
        left = dict(self._posting)
        for task in left:
            task.cancel()
        for message in left.values():
            with suppress(DatabaseError):
                await self._database.value("release_chat_message", message.id, message.leased_until)
