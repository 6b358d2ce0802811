"""Names for what Slack counts: channels and people, which its events call by ids.

Every worker runs this loop. It asks Slack's Web API with the integration's token, a few ids a
round; what artifacts say is then `#backend` and `Ada`. The one rule: names are a courtesy, so
nothing waits for them, and an integration whose token does not do is left alone for a day.
"""

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING, Any

import asyncpg

from app.cipher import Cipher, CipherError
from app.db import Database, DatabaseError
from tasks.sources.body import words

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger("baton.worker")

SLACK = "https://slack.com/api/"
EVERY = 30.0  # seconds between rounds
IDS = 20  # asked for in a round: Slack lets an app ask for 50 channels a minute
TIMEOUT = 10.0  # seconds for one answer
AGAIN = 60.0  # seconds until what got no answer is asked for again
AGAIN_MAX = 3_600.0
CODE = re.compile(r"[a-z_]{1,60}")


class NoAnswer(Exception):
    """Slack did not say; ask again in so many seconds."""

    def __init__(self, again: float) -> None:
        super().__init__(f"ask again in {again:.0f} s")
        self.again = again


class Namer:
    """Asks for the names that integrations lack.

    Args:
        slack: the address of Slack's Web API, with a slash at its end.
    """

    def __init__(self, database: Database, cipher: Cipher, *, slack: str = SLACK) -> None:
        self._database = database
        self._cipher = cipher
        self._slack = slack

    async def run(self) -> None:
        """Name for ever; an outage of the database, or of its schema, is waited out."""
        while True:
            try:
                await self.name_round()
            except DatabaseError as error:
                log.warning("naming paused", extra={"cause": type(error).__name__})
            await asyncio.sleep(EVERY)

    async def name_round(self) -> int:
        """Ask for a few names; answers how many were wanted.

        Raises:
            DatabaseError: the database is away, or has another schema.
        """
        wanted = await self._database.rows("take_nameless", IDS)
        if not wanted:
            return 0
        import httpx2  # costs memory, and most installations have no Slack

        rest: dict[str, float] = {}  # integrations that are not to be asked now, and until when
        async with httpx2.AsyncClient(base_url=self._slack, timeout=TIMEOUT) as client:
            for row in wanted:
                await self._name(client, row, rest)
        return len(wanted)

    async def _name(
        self, client: "httpx2.AsyncClient", row: asyncpg.Record, rest: dict[str, float]
    ) -> None:
        integration_id, kind, known_as = row["integration_id"], row["type"], row["id"]
        name, again = None, None
        try:
            if integration_id in rest:
                raise NoAnswer(max(1.0, rest[integration_id] - time.monotonic()))
            name = await ask(client, self._cipher.decrypt(row["token"]), kind, known_as)
        except NoAnswer as error:
            again = error.again
            rest.setdefault(integration_id, time.monotonic() + again)
        except CipherError as error:
            log.warning(
                "token unreadable", extra={"integration_id": integration_id, "cause": str(error)}
            )
        if name or again:
            await self._database.value("name_it", integration_id, kind, known_as, name, again)


async def ask(client: "httpx2.AsyncClient", token: str, kind: str, known_as: str) -> str | None:
    """The name that Slack has for an id; None when it has none for this token.

    Raises:
        NoAnswer: it is away, or has been asked enough for now.
    """
    import httpx2

    method, field = (
        ("users.info", "user") if kind == "person" else ("conversations.info", "channel")
    )
    try:
        answer = await client.get(
            method, params={field: known_as}, headers={"Authorization": f"Bearer {token}"}
        )
        body: Any = answer.json() if answer.status_code == 200 else None
    except (httpx2.HTTPError, ValueError):
        raise NoAnswer(AGAIN) from None
    if not isinstance(body, dict) or words(body, "error") == "ratelimited":
        wait = answer.headers.get("retry-after", "")
        raise NoAnswer(min(AGAIN_MAX, float(wait)) if wait.isdigit() else AGAIN)
    if body.get("ok") is not True:
        code = words(body, "error")
        log.info("no name", extra={"cause": code if CODE.fullmatch(code) else "unknown"})
        return None
    if kind == "channel":
        name = words(body, "channel", "name")
        return f"#{name}" if name else None
    names = (
        words(body, "user", "profile", "display_name"),
        words(body, "user", "profile", "real_name"),
        words(body, "user", "real_name"),
        words(body, "user", "name"),
    )
    return next((name for name in names if name), None)
