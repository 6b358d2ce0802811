"""What an operator does by SQL: every call is checked, guarded, true everywhere, and audited."""

import json
from typing import Any

import asyncpg
import pytest

NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
async def ada(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_user('ada@example.com')")


@pytest.fixture
async def org(sql: asyncpg.Connection) -> Any:
    return await sql.fetchval("select ops.create_organization('Acme')")


async def audited(sql: asyncpg.Connection) -> list[tuple[str, dict[str, Any]]]:
    """What was done, with its details."""
    rows = await sql.fetch("select what, detail from ops.audit order by id")
    return [(row["what"], json.loads(row["detail"])) for row in rows]


# --- Arguments ------------------------------------------------------------------------------

WRONG = [  # call, SQLSTATE, how the sentence begins; $ada and $org are there, $nobody is not
    ("create_user('')", "BT400", "email: must be an address"),
    ("create_user(null)", "BT400", "email: must be an address"),
    ("create_user('no at sign')", "BT400", "email: must be an address"),
    ("create_user(repeat('a', 320) || '@b')", "BT400", "email: must be an address"),
    ("create_user('ADA@example.com')", "BT400", "email: there is already a user"),
    ("create_user('a@b', name => ' ')", "BT400", "name: must have 1 to 300"),
    ("create_user('a@b', plan => 'gold')", "BT400", 'plan: there is no plan named "gold"'),
    ("create_organization('')", "BT400", "name: must have 1 to 300"),
    ("create_organization('A', 'a b')", "BT400", "slug: must be lower case"),
    ("create_organization('acme')", "BT400", 'slug: there is already an organization "acme"'),
    ("add_member($nobody, $ada)", "BT404", "organization: there is no organization"),
    ("add_member($org, $nobody)", "BT404", "member: there is no user"),
    ("add_member($org, $ada, 'owner')", "BT400", "role: must be admin or member"),
    ("create_project('', $ada)", "BT400", "name: must have 1 to 300"),
    ("create_project('P', $nobody)", "BT404", "owner: there is no user"),
    ("create_project('P', null)", "BT404", "owner: there is no user"),
    ("create_project('P', $ada, $nobody)", "BT404", "organization: there is no organization"),
    ("create_project('P', $ada, $org)", "BT400", "owner: the user is no member"),
    ("create_api_key($nobody)", "BT404", "user_id: there is no user"),
    ("create_api_key($ada, repeat('x', 301))", "BT400", "label: must have at most 300"),
    ("revoke_api_key('fr_')", "BT400", "prefix: must be the first 11 characters"),
    ("revoke_api_key(null)", "BT400", "prefix: must be the first 11 characters"),
    ("revoke_user_keys($nobody)", "BT404", "user_id: there is no user"),
    ("create_plan('')", "BT400", "name: must have 1 to 300"),
    ("create_plan('x', -1)", "BT400", "monthly_credits: must be 0 or more"),
    ("create_plan('x', overage => null)", "BT400", "overage: must be true or false"),
    ("create_plan('x', flows => '{poem}')", "BT400", 'flows: there is no job kind named "poem"'),
    ("set_plan($ada, 'gold')", "BT400", 'plan: there is no plan named "gold"'),
    ("set_plan($nobody, 'self_hosted')", "BT404", "user_id: there is no user"),
    ("add_credits($nobody, 1, 'x')", "BT404", "user_id: there is no user"),
    ("add_credits($ada, 0, 'x')", "BT400", "credits: must be a number other than 0"),
    ("add_credits($ada, 1, '')", "BT400", "reason: must have 1 to 300"),
    ("set_price('', 1, 1)", "BT400", "model: must have 1 to 300"),
    ("set_price('m', -1, 1)", "BT400", "prompt: must be 0 or more"),
    ("set_price('m', 1, null)", "BT400", "completion: must be 0 or more"),
    ("set_limit($nobody, 'poll', 1)", "BT404", "user_id: there is no user"),
    ("set_limit($ada, 'burst', 1)", "BT400", "policy: must be default, poll"),
    ("set_limit($ada, 'poll', -1)", "BT400", "quota: must be 0 to 1000000"),
]


async def test_a_wrong_argument_is_named_in_one_sentence_and_changes_nothing(
    sql: asyncpg.Connection, ada: Any, org: Any
) -> None:
    before = await audited(sql)
    for call, sqlstate, begins in WRONG:
        for name, value in (("ada", ada), ("org", org), ("nobody", NOBODY)):
            call = call.replace(f"${name}", f"'{value}'")
        with pytest.raises(asyncpg.PostgresError) as caught:
            await sql.execute(f"select ops.{call}")
        error = caught.value
        assert (error.sqlstate, error.detail) == (sqlstate, None), (call, error)
        assert str(error).startswith(begins) and str(error).endswith("."), call
    assert await audited(sql) == before


async def test_every_change_is_in_the_audit_and_no_key_is(
    sql: asyncpg.Connection, ada: Any, org: Any
) -> None:
    await sql.execute("delete from ops.audit")
    await sql.execute("set application_name = 'the night shift'")
    await sql.execute("select ops.add_member($1, $2, 'admin')", org, ada)
    await sql.execute("select ops.create_project('P', $1, $2)", ada, org)
    key = await sql.fetchval("select ops.create_api_key($1, 'ci')", ada)
    await sql.execute("select ops.create_plan('small', 5)")
    await sql.execute("select ops.set_plan($1, 'small')", ada)
    await sql.execute("select ops.add_credits($1, 3, 'sorry')", ada)
    await sql.execute("select ops.set_price('m', 1, 2)")
    await sql.execute("select ops.set_limit($1, 'poll', 9)", ada)
    await sql.execute("select ops.revoke_api_key($1)", key[:11])
    done = await audited(sql)
    assert [what for what, _ in done] == [
        *("add_member", "create_project", "create_api_key", "create_plan", "set_plan"),
        *("add_credits", "set_price", "set_limit", "revoke_api_key"),
    ]
    details = dict(done)
    assert details["create_api_key"] == {"user_id": str(ada), "label": "ci", "prefix": key[:11]}
    assert details["set_limit"] == {"user_id": str(ada), "policy": "poll", "quota": 9}
    assert key[11:] not in str(done)
    whole = await sql.fetch("select distinct who = session_user, application from ops.audit")
    assert [tuple(row) for row in whole] == [(True, "the night shift")]


async def test_all_keys_of_a_user_are_revoked_at_once(sql: asyncpg.Connection, ada: Any) -> None:
    bob = await sql.fetchval("select ops.create_user('bob@example.com')")
    for user in (ada, ada, bob):
        await sql.execute("select ops.create_api_key($1)", user)
    revoke = "select ops.revoke_user_keys($1)"
    assert [await sql.fetchval(revoke, ada) for _ in range(2)] == [2, 0]
    live = "select array_agg(user_id) from api_keys where revoked_at is null"
    assert await sql.fetchval(live) == [bob]


async def test_whatever_changes_something_is_safe_to_call_from_any_session(
    sql: asyncpg.Connection,
) -> None:
    rows = await sql.fetch(
        "select proname, prosecdef, proconfig from pg_proc "
        "where pronamespace = 'ops'::regnamespace and prosrc ~ '\\maudit\\('"
    )
    assert len(rows) >= 12
    wrong = [
        row["proname"]
        for row in rows
        if not row["prosecdef"]
        or set(row["proconfig"] or []) < {"search_path=public, pg_temp", "lock_timeout=2s"}
    ]
    assert wrong == []
