"""Webhooks over HTTP: who may register, what is shown once, what the log and a replay tell."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from chaos.receiver import Receiver, answer, receiving
from conftest import Caller, loopback
from test_delivery import LOOPBACK

from app.db import Database
from tasks.delivery import Deliverer
from tasks.outbound import Outbound

Drain = Callable[..., Awaitable[None]]


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def deliverer(database: Database) -> Deliverer:
    return Deliverer(database, Outbound(LOOPBACK))


async def made(caller: Caller, url: str, **more: Any) -> tuple[dict[str, Any], str]:
    """Register; answers the webhook and its secret."""
    body = {"project_id": caller.project_id, "url": url, **more}
    response = await caller.http.post("/webhooks", json=body)
    assert response.status_code == 201, response.text
    return response.json()["webhook"], response.json()["secret"]


async def deliveries(caller: Caller, **of: str) -> list[dict[str, Any]]:
    response = await caller.http.get("/webhooks/deliveries", params=of)
    assert response.status_code == 200, response.text
    return list(response.json()["deliveries"])


async def test_a_job_tells_the_url_that_its_request_named_and_the_registered_one(
    caller: Caller, drain: Drain, deliverer: Deliverer, receiver: Receiver
) -> None:
    webhook, secret = await made(caller, receiver.url("/registered"))
    own = (await caller.http.get(f"/projects/{caller.project_id}/webhook_secret")).json()["secret"]
    await caller.ingest({"title": "feat: a cache"})
    options = {"webhook_url": receiver.url("/own?token=t0k"), "metadata": {"ticket": "A-12"}}
    job_id = await caller.submit(job=options)
    await drain()
    await deliverer.drain()

    bodies = [
        next(got for got in receiver.got if got.target == target).verified(key)
        for target, key in (("/registered", secret), ("/own?token=t0k", own))
    ]
    job = (await caller.job(job_id))["job"]
    for body in bodies:
        told = body["data"]["job"]
        assert set(told) == set(job) and told["metadata"] == {"ticket": "A-12"}
        assert {k: v for k, v in told.items() if not k.endswith("_at")} == {
            k: v for k, v in job.items() if not k.endswith("_at")
        }
    log = await deliveries(caller, job_id=job_id)
    assert {d["webhook_id"] for d in log} == {webhook["id"], None}
    assert {d["state"] for d in log} == {"delivered"}
    assert [[a["status"] for a in d["attempts"]] for d in log] == [[204], [204]]
    assert {d["id"] for d in log} == {got.headers["webhook-id"] for got in receiver.got}


async def test_a_request_does_not_join_a_job_that_would_tell_somebody_else(caller: Caller) -> None:
    first, second = "https://a.example/", "https://b.example/"
    asked = [{"webhook_url": first}, {"webhook_url": first}, {}, {"webhook_url": second}]
    ids = [await caller.submit(job={"dedupe": "in_flight", **options}) for options in asked]
    assert ids[0] == ids[1] == ids[2] != ids[3]


async def test_a_url_without_registration_is_told_of_a_cancelled_job(
    caller: Caller, deliverer: Deliverer, receiver: Receiver
) -> None:
    job_id = await caller.submit(job={"webhook_url": receiver.url()})
    await caller.http.post(f"/jobs/{job_id}/cancel")
    await deliverer.drain()
    [got] = receiver.got
    path = f"/projects/{caller.project_id}/webhook_secret"
    body = got.verified((await caller.http.get(path)).json()["secret"])
    assert body["type"] == "job.failed"
    assert body["data"]["job"]["error_code"] == body["data"]["job"]["outcome"] == "cancelled"


async def test_metadata_as_large_as_allowed_leaves_a_body_below_20_kilobytes(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    full = {f"{n:02}" + "k" * 62: "v" * 512 for n in range(16)}
    wide = {f"{n:02}" + "ä" * 62: "🦫" * 512 for n in range(16)}
    for metadata, kept in ((full, True), (wide, False)):
        job_id = await caller.submit(
            job={"metadata": metadata, "webhook_url": "https://hooks.example/"}
        )
        await caller.http.post(f"/jobs/{job_id}/cancel")
        row = "select payload from webhook_deliveries where job_id = $1"
        payload = await sql.fetchval(row, job_id)
        assert len(payload.encode()) < 20_000
        job = json.loads(payload)["data"]["job"]
        assert (job["id"], job["error_code"]) == (job_id, "cancelled")
        assert (job.get("metadata") == metadata) is kept


async def test_a_secret_is_shown_once_and_listed_nowhere(caller: Caller) -> None:
    webhook, secret = await made(caller, "https://hooks.example/?token=1", types=["job.failed"])
    assert secret.startswith("whsec_") and "secret" not in webhook
    rotated = (await caller.http.post(f"/webhooks/{webhook['id']}/rotate")).json()
    assert rotated["webhook"] == webhook and rotated["secret"] != secret
    path = f"/webhooks/{webhook['id']}"
    seen = [
        await caller.http.get("/webhooks"),
        await caller.http.get("/webhooks", params={"project_id": caller.project_id}),
        await caller.http.patch(path, json={"enabled": True}),
        await caller.http.get("/webhooks/deliveries", params={"webhook_id": webhook["id"]}),
    ]
    assert [answer.status_code for answer in seen] == [200] * 4
    assert not any("whsec_" in answer.text for answer in seen)
    assert seen[0].json() == seen[1].json() == {"webhooks": [webhook]}


async def test_the_secret_of_a_project_stays_until_it_is_rotated(caller: Caller) -> None:
    path = f"/projects/{caller.project_id}/webhook_secret"
    first = [(await caller.http.get(path)).json()["secret"] for _ in range(2)]
    assert first[0] == first[1]
    answered = await caller.http.post(f"{path}/rotate")
    assert answered.headers["cache-control"] == "no-store"
    assert (await caller.http.get(path)).json() == answered.json() != {"secret": first[0]}


async def test_what_is_changed_is_changed_and_the_rest_stays(caller: Caller) -> None:
    webhook, _ = await made(caller, "https://hooks.example/a")
    path = f"/webhooks/{webhook['id']}"

    async def change(**fields: Any) -> dict[str, Any]:
        response = await caller.http.patch(path, json=fields)
        assert response.status_code == 200, response.text
        return {k: v for k, v in response.json()["webhook"].items() if k != "updated_at"}

    expected = {k: v for k, v in webhook.items() if k != "updated_at"}
    for fields in (
        {"enabled": False},
        {"url": "https://hooks.example/b"},
        {"types": ["job.failed"]},
    ):
        expected |= fields
        assert await change(**fields) == expected
    assert await change() == expected
    assert (await caller.http.delete(path)).status_code == 204
    assert (await caller.http.delete(path)).status_code == 404
    assert (await caller.http.get("/webhooks")).json() == {"webhooks": []}


async def test_the_same_url_twice_or_too_many_urls_are_a_conflict(caller: Caller) -> None:
    webhooks = [(await made(caller, f"https://hooks.example/{n}"))[0] for n in range(20)]
    body = {"project_id": caller.project_id, "url": "https://hooks.example/21"}
    full = await caller.http.post("/webhooks", json=body)
    assert (full.status_code, full.json()["error"]) == (
        409,
        "A project has at most 20 webhooks; delete one first.",
    )
    await caller.http.delete(f"/webhooks/{webhooks[0]['id']}")
    same = [
        await caller.http.post("/webhooks", json=body | {"url": webhooks[1]["url"]}),
        await caller.http.patch(f"/webhooks/{webhooks[2]['id']}", json={"url": webhooks[1]["url"]}),
    ]
    for each in same:
        assert (each.status_code, each.json()["code"]) == (409, "conflict")
        assert each.json()["error"] == "url: the project already has a webhook with this URL."


SHAPE, HOST = "must be an http or https URL", "must be a URL with a valid host and port"
USER = "must not hold a user name or password"
WRONG_URLS = [
    ("ftp://a.example/", SHAPE),
    ("hooks.example/x", SHAPE),
    ("https://a.example/with space", SHAPE),
    ("https://a.example/\\@b.example", SHAPE),
    ("https://büro.example/", SHAPE),
    ("https://a.example/\n", SHAPE),
    ("https://u:p@a.example/", USER),
    ("https://u@a.example/", USER),
    ("https:///x", HOST),
    ("https://:80/", HOST),
    ("https://a.example:99999/", HOST),
    ("https://a.example:0/", HOST),
    ("https://[::1/", HOST),
    ("https://a.example/" + "x" * 2000, "must not be longer than 2000 characters"),
]


async def test_a_wrong_url_is_told_in_one_sentence(caller: Caller) -> None:
    mine = {"project_id": caller.project_id}
    for url, said in WRONG_URLS:
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("url", "/webhooks", {**mine, "url": url}),
            ("job.webhook_url", "/handoffs", {**mine, "job": {"webhook_url": url}}),
        ]
        for field, path, body in asked:
            response = await caller.http.post(path, json=body)
            assert response.status_code == 400, url
            assert response.json()["error"].startswith(f"{field}: {said}"), url


async def test_wrong_types_are_told_in_one_sentence(caller: Caller) -> None:
    body = {"project_id": caller.project_id, "url": "https://a.example/"}
    for types in ([], ["job.lost"], ["job.failed"] * 5, "job.failed"):
        response = await caller.http.post("/webhooks", json=body | {"types": types})
        assert response.status_code == 400 and response.json()["error"].startswith("types")


async def test_a_member_looks_and_only_owners_and_admins_change(
    caller: Caller, stranger: Caller, sql: asyncpg.Connection
) -> None:
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    for user, role in ((caller.user_id, "admin"), (stranger.user_id, "member")):
        await sql.execute("select ops.add_member($1, $2, $3)", organization, user, role)
    project_id = str(
        await sql.fetchval("select ops.create_project('web', $1, $2)", caller.user_id, organization)
    )
    body = {"project_id": project_id, "url": "https://hooks.example/"}
    webhook = (await caller.http.post("/webhooks", json=body)).json()["webhook"]
    job_id = await caller.submit(project_id=project_id)
    await caller.http.post(f"/jobs/{job_id}/cancel")
    [delivery] = await deliveries(stranger, webhook_id=webhook["id"])

    async def changes() -> list[httpx.Response]:
        path, own = f"/webhooks/{webhook['id']}", f"/projects/{project_id}/webhook_secret"
        return [
            await stranger.http.post("/webhooks", json=body | {"url": "https://hooks.example/2"}),
            await stranger.http.patch(path, json={"enabled": True}),
            await stranger.http.post(f"{path}/rotate"),
            await stranger.http.post(f"/webhooks/deliveries/{delivery['id']}/replay"),
            await stranger.http.get(own),
            await stranger.http.post(f"{own}/rotate"),
            await stranger.http.delete(path),
        ]

    assert (await stranger.http.get("/webhooks")).json() == {"webhooks": [webhook]}
    for refused in await changes():
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden"), refused.url
        assert refused.json()["error"].startswith("Only an owner or admin of the project")
    assert (await caller.http.get("/webhooks")).json() == {"webhooks": [webhook]}
    await sql.execute("select ops.add_member($1, $2, 'admin')", organization, stranger.user_id)
    assert {answer.status_code for answer in await changes()} == {201, 200, 202, 204}


async def test_a_replay_sends_a_delivered_message_again_under_its_id(
    caller: Caller, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(500), answer(204)]
    webhook, secret = await made(caller, receiver.url())
    job_id = await caller.submit()
    await caller.http.post(f"/jobs/{job_id}/cancel")
    await deliverer.drain()
    [delivery] = await deliveries(caller, job_id=job_id)
    for _ in range(2):  # while it waits, and when it has been delivered
        answered = await caller.http.post(f"/webhooks/deliveries/{delivery['id']}/replay")
        assert answered.status_code == 202
        assert answered.json()["delivery"]["state"] == "waiting"
        where = await caller.http.get(answered.headers["location"].removeprefix("/api/v1"))
        assert where.json()["deliveries"] == [answered.json()["delivery"]]
        await deliverer.drain()
    [delivery] = await deliveries(caller, project_id=caller.project_id)
    assert [a["status"] for a in delivery["attempts"]] == [500, 204, 204]
    assert {(got.headers["webhook-id"], got.body) for got in receiver.got} == {
        (delivery["id"], receiver.got[0].body)
    }
    for got in receiver.got:
        got.verified(secret)

    await caller.http.patch(f"/webhooks/{webhook['id']}", json={"enabled": False})
    refused = await caller.http.post(f"/webhooks/deliveries/{delivery['id']}/replay")
    assert refused.status_code == 409
    assert refused.json()["error"] == "The webhook is disabled; enable it first."


async def test_a_replay_goes_to_where_the_webhook_has_moved(
    caller: Caller, deliverer: Deliverer, receiver: Receiver
) -> None:
    receiver.answers = [answer(410)]
    webhook, _ = await made(caller, receiver.url("/old"))
    job_id = await caller.submit()
    await caller.http.post(f"/jobs/{job_id}/cancel")
    await deliverer.drain()
    [dead] = await deliveries(caller, job_id=job_id)
    assert dead["state"] == "dead"
    moved = {"url": receiver.url("/new"), "enabled": True}
    await caller.http.patch(f"/webhooks/{webhook['id']}", json=moved)
    await caller.http.post(f"/webhooks/deliveries/{dead['id']}/replay")
    await deliverer.drain()
    assert [got.target for got in receiver.got] == ["/old", "/new"]


async def test_deliveries_are_asked_for_by_one_thing_newest_first(caller: Caller) -> None:
    webhook, _ = await made(caller, "https://hooks.example/")
    job_ids = [await caller.submit(job={"webhook_url": "https://own.example/"}) for _ in range(3)]
    for job_id in job_ids:
        await caller.http.post(f"/jobs/{job_id}/cancel")
    found = await deliveries(caller, webhook_id=webhook["id"])
    assert [d["job_id"] for d in found] == job_ids[::-1]
    assert len(await deliveries(caller, project_id=caller.project_id)) == 6
    two = await deliveries(caller, project_id=caller.project_id, limit="2")
    assert {d["job_id"] for d in two} == {job_ids[-1]}
    for wrong in ({}, {"job_id": job_ids[0], "project_id": caller.project_id}):
        response = await caller.http.get("/webhooks/deliveries", params=wrong)
        assert response.status_code == 400 and "exactly one of" in response.json()["error"]


async def test_a_deleted_job_takes_its_messages_along(caller: Caller) -> None:
    await made(caller, "https://hooks.example/")
    job_id = await caller.submit()
    await caller.http.post(f"/jobs/{job_id}/cancel")
    assert (await caller.http.delete(f"/jobs/{job_id}")).status_code == 204
    assert await deliveries(caller, project_id=caller.project_id) == []


async def test_twenty_requests_for_the_first_secret_of_a_project_get_one(caller: Caller) -> None:
    path = f"/projects/{caller.project_id}/webhook_secret"
    answers = await asyncio.gather(*(caller.http.get(path) for _ in range(20)))
    assert len({answer.json()["secret"] for answer in answers}) == 1


async def test_the_receiver_in_the_documents_verifies_what_is_sent(
    caller: Caller, deliverer: Deliverer, root: Path
) -> None:
    section = (root / "docs" / "webhooks.md").read_text()
    code = section.partition("```python\n")[2].partition("```")[0]
    with loopback() as listener:
        port = listener.getsockname()[1]
    _, secret = await made(caller, f"http://127.0.0.1:{port}/")
    mine = code.replace("whsec_…", secret).replace("8080", str(port))
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "-c", mine,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(10):
            while True:  # until it listens
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.02)
            writer.close()
            job_id = await caller.submit()
            await caller.http.post(f"/jobs/{job_id}/cancel")
            await deliverer.drain()
            assert program.stdout
            said = (await program.stdout.readline()).decode().split()
    finally:
        program.kill()
        await program.wait()
    [delivery] = await deliveries(caller, job_id=job_id)
    assert said == [delivery["id"], "job.failed", job_id]
    assert [a["status"] for a in delivery["attempts"]] == [204]
