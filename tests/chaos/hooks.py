"""A scenario of deliveries: whatever dies, each becomes an event, and none becomes two."""

import asyncio
import hashlib
import hmac
import json
import time
from collections import Counter
from contextlib import suppress

from app.cipher import Cipher, new_key

from .client import Connection, NoAnswer
from .lab import Lab, scenario
from .stack import Process

SENDERS = 8
DELIVERIES = 400
SECRET = "whsec_of-the-scenario"
PATIENCE = 60.0  # seconds


class Source:
    """Sends like GitHub, but again and again what was not answered."""

    def __init__(self, lab: Lab, integration_id: str) -> None:
        self._lab = lab
        self._path = f"/hooks/{integration_id}"
        self._numbers = iter(range(DELIVERIES))
        self.answers: Counter[int | None] = Counter()
        self.taken = 0

    async def send(self) -> None:
        """One sender: the next delivery, until it is taken, and the next."""
        port, connection = None, None
        for number in self._numbers:
            body = {
                "ref": "refs/heads/main",
                "repository": {"full_name": "acme/web", "default_branch": "main"},
                "commits": [{"id": f"{number:040x}", "message": f"Change {number}"}],
            }
            raw = json.dumps(body).encode()
            signature = hmac.new(SECRET.encode(), raw, hashlib.sha256).hexdigest()
            headers = {
                "X-GitHub-Event": "push",
                "X-GitHub-Delivery": f"delivery-{number}",
                "X-Hub-Signature-256": f"sha256={signature}",
            }
            status = None
            while status not in (200, 202):
                apis = self._lab.stack.apis
                if apis and apis[-1].port != port:
                    port = apis[-1].port
                    assert port
                    if connection:
                        connection.close()
                    connection = Connection(port, "")
                status = None
                if connection:
                    with suppress(NoAnswer):
                        answer = await connection.ask("POST", self._path, body, headers=headers)
                        status = answer.status
                self.answers[status] += 1
                if status not in (200, 202):
                    await asyncio.sleep(0.05)
            self.taken += 1
        if connection:
            connection.close()

    async def took(self, count: int) -> None:
        """Until so many have been taken."""
        while self.taken < count:
            await asyncio.sleep(0.005)


@scenario("54", "deliveries of a source: kill -9 of the API, then of the worker", short=True)
async def deliveries(lab: Lab) -> None:
    key = new_key()
    settings = {"BATON_SECRET_KEYS": key}
    [api], [worker] = await lab.start(settings, workers=1)
    sql = await lab.stack.sql()
    integration_id = await sql.fetchval(
        "insert into integrations (source, user_id, project_id, workspace_name) "
        "values ('github', $1, $2, 'acme') returning id::text",
        lab.stack.user_id,
        lab.stack.project_id,
    )
    await sql.execute(
        "insert into integration_secrets (integration_id, name, value) values ($1, 'signing', $2)",
        integration_id,
        Cipher((key,)).encrypt(SECRET),
    )
    source = Source(lab, integration_id)
    sending = asyncio.gather(*(source.send() for _ in range(SENDERS)))
    await source.took(DELIVERIES // 4)
    await _replaced(lab, api, settings)
    await source.took(DELIVERIES // 2)
    worker.kill()
    await lab.stack.worker(settings)
    await sending
    took = await _mapped(lab)
    stored = await sql.fetchval("select count(*) from hook_deliveries where error is null")
    lab.expect(stored == DELIVERIES, f"{stored} of {DELIVERIES} deliveries are known")
    titles = await sql.fetch("select title from events where event_type = 'commit'")
    made = Counter(row["title"] for row in titles)
    lab.expect(
        made == {f"Change {number}": 1 for number in range(DELIVERIES)},
        f"{len(made)} of {DELIVERIES} deliveries became events, {max(made.values())} at most",
    )
    lab.expect(source.answers[None], "nothing was on its way when the API died")
    jobs = await lab.submit("sleep=0.1")
    await lab.ended()
    lab.completed(jobs)
    lab.note(f"answers {dict(source.answers)}; all mapped {took:.1f} s after the last")


async def _replaced(lab: Lab, api: Process, settings: dict[str, str]) -> None:
    """Another API takes the place of one that dies."""
    api.kill()
    await api.exited(5)
    await lab.stack.serve(settings)


async def _mapped(lab: Lab) -> float:
    """Wait until nothing waits; answers how long."""
    started = time.monotonic()
    sql = await lab.stack.sql()
    while await sql.fetchval("select count(*) from waiting_deliveries"):
        if time.monotonic() > started + PATIENCE:
            lab.expect(False, "deliveries still wait")
            break
        await asyncio.sleep(0.05)
    return time.monotonic() - started
