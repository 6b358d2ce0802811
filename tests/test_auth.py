"""Who is calling: one answer for every key that is not good, and nothing known about it."""

import base64
import hashlib
import secrets

import asyncpg
import httpx
import pytest
from conftest import Caller
from test_error_shape import Gate, send, serving

from app.main import OPERATIONS

PRIVATE = [o for o in OPERATIONS if not o.public]


def new_key() -> str:
    """A key of the right shape that nobody has."""
    return "fr_" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def malformed(key: str) -> list[str | None]:
    """What is not the header of a key, though some of it comes close."""
    return [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer null",
        key,
        f"Basic {key}",
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        f"Bearer {key[:-1]}=",
        f"Bearer {key[:-1]}+",
        f"Bearer  {key} {key}",
        f"Bearer {key},{key}",
        f"Bearer {key.upper()}",
        f"Bearer sk_{key[3:]}",
        f"Bearer {key[3:]}",
        f'Bearer "{key}"',
        "Bearer " + "x" * 5_000,
        "Bearer fr_" + "\xb2" * 43,
    ]


async def test_missing_malformed_unknown_and_revoked_keys_look_alike(
    caller: Caller, base_url: str, sql: asyncpg.Connection
) -> None:
    revoked = await sql.fetchval("select ops.create_api_key($1)", caller.user_id)
    assert await sql.fetchval("select ops.revoke_api_key($1)", revoked[:11])
    given = [*malformed(caller.key), f"Bearer {new_key()}", f"Bearer {revoked}"]
    seen = set()
    for authorization in given:
        head = ["GET /api/v1/projects HTTP/1.1", "X-Request-Id: same"]  # so that bodies compare
        if authorization is not None:
            head.append(f"Authorization: {authorization}")
        answer = await send(base_url, head)
        fields = tuple((k, v) for k, v in answer.headers.items() if k != "date")
        seen.add((answer.status, answer.body, fields))
    [(status, _, _)] = seen
    assert status == 401


async def test_the_scheme_is_read_in_any_case(caller: Caller) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await caller.http.get(
            "/projects", headers={"Authorization": f"{scheme}  {caller.key}"}
        )
        assert answer.status_code == 200


async def test_no_operation_but_the_health_checks_goes_without_a_key(base_url: str) -> None:
    assert {o.path for o in OPERATIONS if o.public} == {"/healthz", "/readyz"}
    async with httpx.AsyncClient(base_url=base_url, trust_env=False) as http:
        for operation in PRIVATE:
            path = operation.path.replace("{", "").replace("}", "")  # no id either
            answer = await http.request(operation.method, path)
            assert answer.status_code == 401, operation.name


async def test_a_revoked_key_is_refused_at_once_and_the_users_other_keys_are_not(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    second = await sql.fetchval("select ops.create_api_key($1)", caller.user_id)
    assert (await caller.http.get("/projects")).status_code == 200
    assert await sql.fetchval("select ops.revoke_api_key($1)", caller.key[:11])
    assert (await caller.http.get("/projects")).status_code == 401
    with_second = {"Authorization": f"Bearer {second}"}
    assert (await caller.http.get("/projects", headers=with_second)).status_code == 200
    assert not await sql.fetchval("select ops.revoke_api_key($1)", caller.key[:11])


async def test_a_key_acts_as_its_user_and_no_other(caller: Caller, stranger: Caller) -> None:
    for one, other in ((caller, stranger), (stranger, caller)):
        listed = (await one.http.get("/projects")).json()["projects"]
        assert [p["id"] for p in listed] == [one.project_id]
        answer = await one.http.post("/handoffs", json={"project_id": other.project_id})
        assert answer.status_code == 404


async def test_a_key_has_32_random_bytes_and_only_its_digest_is_stored(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    assert len(base64.urlsafe_b64decode(caller.key[3:] + "=")) == 32
    [row] = await sql.fetch("select * from api_keys")
    assert row["digest"] == hashlib.sha256(caller.key.encode()).digest()
    assert caller.key[11:] not in repr(row)


async def test_what_cannot_be_a_key_never_reaches_the_database(dsn: str, caller: Caller) -> None:
    gate = Gate(dsn)
    await gate.open()
    async with serving(gate.dsn) as (base_url, _):
        gate.shut()
        for authorization in malformed(caller.key):
            head = ["GET /api/v1/projects HTTP/1.1", f"Authorization: {authorization}"]
            assert (await send(base_url, head)).status == 401, authorization
        for key in (caller.key, new_key()):
            head = ["GET /api/v1/projects HTTP/1.1", f"Authorization: Bearer {key}"]
            assert (await send(base_url, head)).status == 503


@pytest.mark.parametrize("place", ["query", "cookie", "x-api-key"])
async def test_a_key_is_read_from_its_header_only(
    place: str, caller: Caller, base_url: str
) -> None:
    given = {"cookie": f"key={caller.key}", "x-api-key": caller.key}
    sent = {place: given[place]} if place in given else {}
    query = f"?api_key={caller.key}&authorization={caller.key}" if place == "query" else ""
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(f"{base_url}/api/v1/projects{query}", headers=sent)
    assert answer.status_code == 401
