"""Integrations: who has them, what they may reach, their secrets, and `baton integration`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner, Result
from conftest import SECRET_KEYS, Caller, served

from app.__main__ import cli
from app.cipher import Cipher, new_key
from app.main import create_app
from app.settings import Settings

SLACK = "8f742231b10e8888abcd99yyyzzz85a5"  # a signing secret, as Slack shows it
TOKEN = "xoxb-17653672481-19874698323"
NewCaller = Callable[[str], Awaitable[Caller]]


async def secrets_of(
    sql: asyncpg.Connection, integration_id: str, name: str = "signing"
) -> list[str]:
    """What is good now, decrypted, the newest first."""
    values = await sql.fetchval("select live_secrets($1, $2)", integration_id, name)
    return [Cipher(SECRET_KEYS).decrypt(value) for value in values]


async def connect(caller: Caller, **body: Any) -> dict[str, Any]:
    """Connect a source over HTTP; the whole answer."""
    answer = await caller.http.post("/integrations", json={"source": "github", **body})
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return dict(answer.json())


async def listed(caller: Caller, query: str = "") -> list[dict[str, Any]]:
    """GET /integrations."""
    answer = await caller.http.get(f"/integrations{query}")
    assert answer.status_code == 200
    return list(answer.json()["integrations"])


async def refused(answer: Any) -> tuple[int, str]:
    """Status and sentence of an answer."""
    return answer.status_code, answer.json()["error"]


@pytest.fixture
async def team(sql: asyncpg.Connection, caller: Caller, stranger: Caller) -> Any:
    """An organization: the caller is its admin, the stranger a member; it has a project."""
    organization = await sql.fetchval("select ops.create_organization('Acme')")
    await sql.execute("select ops.add_member($1, $2, 'admin')", organization, caller.user_id)
    await sql.execute("select ops.add_member($1, $2)", organization, stranger.user_id)
    project = await sql.fetchval(
        "select ops.create_project('web', $1, $2)", caller.user_id, organization
    )
    return str(organization), str(project)


# --- GET /integrations ----------------------------------------------------------------------


async def test_get_integrations_tells_what_is_connected(
    caller: Caller, sql: asyncpg.Connection, base_url: str
) -> None:
    made = await connect(
        caller, project_id=caller.project_id, workspace_id="T1", workspace_name="acme"
    )
    [one] = await listed(caller)
    assert one == made["integration"]
    contract = {
        "source": "github", "workspace_id": "T1", "workspace_name": "acme", "scope": "personal",
        "resource_type": None, "connection_status": "awaiting_first_delivery",
        "providers_connected": ["github"], "last_validated_at": None,
    }  # fmt: skip
    assert contract.items() <= one.items()
    assert one["connected_at"].endswith("Z") and one["project_id"] == caller.project_id
    assert one["url"] == f"http://127.0.0.1:8000/hooks/{one['id']}"

    await sql.execute(
        "insert into resources (integration_id, id, name, type) values "
        "($1, 'acme/web', 'acme/web', 'repository'), ($1, 'acme/api', 'acme/api', 'repository'),"
        "($1, 'acme', 'acme', 'organization')", one["id"],
    )  # fmt: skip
    [one] = await listed(caller)
    assert one["resource_type"] == "repository"


async def test_get_integrations_of_a_project_are_those_that_reach_it(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    by_default = await connect(caller, project_id=caller.project_id)
    by_resource = await connect(caller, source="sentry")
    await connect(caller, source="grafana")
    await sql.execute(
        "insert into resources (integration_id, id, name, type, project_id) "
        "values ($1, 'web', 'web', 'project', $2)",
        by_resource["integration"]["id"], caller.project_id,
    )  # fmt: skip
    assert len(await listed(caller)) == 3
    found = await listed(caller, f"?project_id={caller.project_id}")
    assert [each["id"] for each in found] == [
        by_default["integration"]["id"],
        by_resource["integration"]["id"],
    ]


# --- POST /integrations ---------------------------------------------------------------------


async def test_post_integrations_shows_the_secret_once_and_stores_it_encrypted(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    made = await connect(caller)
    integration_id = made["integration"]["id"]
    assert made["secret"].startswith("whsec_") and "secret" in made["advice"].lower()
    assert await secrets_of(sql, integration_id) == [made["secret"]]
    stored = await sql.fetchval("select string_agg(value::text, '') from integration_secrets")
    assert made["secret"] not in bytes.fromhex(stored.removeprefix("\\x")).decode("latin-1")
    assert made["secret"] not in str(await listed(caller))


async def test_a_source_that_makes_its_own_secret_waits_until_it_is_told(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    made = await connect(caller, source="slack")
    path = f"/integrations/{made['integration']['id']}"
    assert made["secret"] is None
    assert made["integration"]["connection_status"] == "awaiting_secret"
    status, sentence = await refused(await caller.http.post(f"{path}/rotate", json={}))
    assert (status, sentence[:13]) == (400, "secret: slack")
    told = await caller.http.post(f"{path}/rotate", json={"secret": SLACK})
    assert told.json()["integration"]["connection_status"] == "awaiting_first_delivery"
    assert await secrets_of(sql, made["integration"]["id"]) == [SLACK]
    given = await connect(caller, source="slack", secret=SLACK)
    assert given["secret"] == SLACK


async def test_a_token_is_kept_and_never_shown(caller: Caller, sql: asyncpg.Connection) -> None:
    made = await connect(caller, source="discord", token=TOKEN)
    one = made["integration"]
    assert one["has_token"] and TOKEN not in str(made)
    assert await secrets_of(sql, one["id"], "token") == [TOKEN]
    for token in ("another-token", None):
        changed = await caller.http.patch(f"/integrations/{one['id']}", json={"token": token})
        assert changed.json()["integration"]["has_token"] is (token is not None)
        assert await secrets_of(sql, one["id"], "token") == ([token] if token else [])


@pytest.mark.parametrize(
    ("body", "begins"),
    [
        ({"source": "githup"}, 'source: there is no source named "githup"'),
        ({"source": "github", "secret": "short"}, "secret: must have at least 8 characters"),
        ({"source": "github", "secret": "with a space"}, "secret: must match pattern"),
        ({"source": "github", "workspace_name": ""}, "workspace_name: must have at least 1"),
        ({"source": "github", "name": "x"}, "name: is not a known field"),
    ],
)
async def test_post_integrations_names_what_is_wrong(
    caller: Caller, sql: asyncpg.Connection, body: Any, begins: str
) -> None:
    status, sentence = await refused(await caller.http.post("/integrations", json=body))
    assert status == 400 and sentence.startswith(begins)
    assert await sql.fetchval("select count(*) from integrations") == 0


async def test_a_server_without_a_key_says_that_it_keeps_no_secrets(
    dsn: str, caller: Caller
) -> None:
    async with served(create_app(Settings(database_url=dsn))) as url:
        for body in ({"source": "github"}, {"source": "slack", "token": TOKEN}):
            answer = await caller.http.post(f"{url}/api/v1/integrations", json=body)
            assert await refused(answer) == (
                503,
                "The server cannot keep secrets; an operator has to look at its log.",
            )
        assert (await caller.http.get(f"{url}/api/v1/integrations")).json() == {"integrations": []}


async def test_nobody_has_more_than_200(caller: Caller, sql: asyncpg.Connection) -> None:
    await sql.execute(
        "insert into integrations (source, user_id, workspace_name) "
        "select 'github', $1, 'x' from generate_series(1, 199)", caller.user_id,
    )  # fmt: skip
    answers = await asyncio.gather(
        *(caller.http.post("/integrations", json={"source": "github"}) for _ in range(3))
    )
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409]


# --- PATCH, rotate and DELETE /integrations/{id} --------------------------------------------


async def test_patch_integration_changes_what_is_named_and_nothing_else(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    before = (await connect(caller, workspace_name="acme"))["integration"]
    path = f"/integrations/{before['id']}"
    for change, differs in (
        ({"workspace_name": "Acme Inc"}, {"workspace_name": "Acme Inc"}),
        ({"project_id": caller.project_id}, {"project_id": caller.project_id}),
        ({"enabled": False}, {"enabled": False, "connection_status": "disabled"}),
        ({"project_id": None}, {"project_id": None}),
        ({"enabled": True}, {"enabled": True, "connection_status": "awaiting_first_delivery"}),
        ({}, {}),
    ):
        answer = await caller.http.patch(path, json=change)
        after = answer.json()["integration"]
        assert after == {**before, **differs, "updated_at": after["updated_at"]}
        before = after


async def test_rotating_keeps_the_old_secret_for_a_day(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    made = await connect(caller)
    path = f"/integrations/{made['integration']['id']}/rotate"
    second = (await caller.http.post(path, json={})).json()["secret"]
    third = (await caller.http.post(path, json={"secret": SLACK})).json()["secret"]
    good = await secrets_of(sql, made["integration"]["id"])
    assert good == [third, second, made["secret"]] and third == SLACK
    await sql.execute("set baton.clock_offset = '23 hours'")
    assert len(await secrets_of(sql, made["integration"]["id"])) == 3
    await sql.execute("set baton.clock_offset = '25 hours'")
    assert await secrets_of(sql, made["integration"]["id"]) == [third]


async def test_a_secret_that_the_source_brings_is_brought_again_after_a_rotation(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    made = await connect(caller, source="asana")
    one = made["integration"]
    assert made["secret"] is None and one["connection_status"] == "awaiting_secret"
    kept = "select keep_first_secret($1, $2)"
    encrypted = [Cipher(SECRET_KEYS).encrypt(secret) for secret in ("theirs-1", "mallory's")]
    assert [await sql.fetchval(kept, one["id"], e) for e in encrypted] == [True, False]
    assert await secrets_of(sql, one["id"]) == ["theirs-1"]
    rotated = (await caller.http.post(f"/integrations/{one['id']}/rotate", json={})).json()
    assert rotated["secret"] is None
    assert rotated["integration"]["connection_status"] == "awaiting_secret"
    assert await sql.fetchval(kept, one["id"], encrypted[1])


async def test_delete_integration_takes_all_of_it_but_the_events_of_projects(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    one = (await connect(caller, token=TOKEN))["integration"]
    kept = (await connect(caller))["integration"]
    await caller.ingest({"title": "stays", "resource": "acme/web"})
    for integration_id in (one["id"], kept["id"]):
        await sql.execute(
            "insert into resources (integration_id, id, name, type) values ($1, 'r', 'r', 't')",
            integration_id,
        )
        await sql.execute(
            "insert into untracked_events (integration_id, resource_id, event) "
            "select $1, 'r', '{}' from generate_series(1, 12000)",
            integration_id,
        )
    assert (await caller.http.delete(f"/integrations/{one['id']}")).status_code == 204
    assert (await caller.http.delete(f"/integrations/{one['id']}")).status_code == 404
    assert [each["id"] for each in await listed(caller)] == [kept["id"]]
    for table in ("integration_secrets", "resources", "untracked_events"):
        found = await sql.fetchval(f"select array_agg(distinct integration_id::text) from {table}")
        assert found == [kept["id"]], table
    assert await sql.fetchval("select count(*) from events") == 1


# --- Whose they are -------------------------------------------------------------------------


async def test_an_organization_s_integrations_are_changed_by_admins_and_seen_by_members(
    caller: Caller, stranger: Caller, team: Any
) -> None:
    organization, project = team
    one = (await connect(caller, project_id=project))["integration"]
    assert (one["organization_id"], one["scope"]) == (organization, "organization")
    path = f"/integrations/{one['id']}"
    assert await listed(stranger) == [one]
    told = "Only an admin of the organization may do this to its integrations."
    for method, where, body in (
        ("PATCH", path, {"enabled": False}),
        ("POST", f"{path}/rotate", {}),
        ("DELETE", path, None),
        ("POST", "/integrations", {"source": "slack", "organization_id": organization}),
    ):
        answer = await stranger.http.request(method, where, json=body)
        assert await refused(answer) == (403, told), where
    answer = await stranger.http.post(
        "/integrations", json={"source": "slack", "project_id": project}
    )
    assert (await refused(answer))[0] == 403
    assert await listed(caller) == [one]
    answer = await caller.http.patch(path, json={"enabled": False})
    assert answer.status_code == 200


async def test_who_is_not_in_the_organization_cannot_tell_that_it_is_there(
    caller: Caller, team: Any, new_caller: NewCaller
) -> None:
    organization, project = team
    one = (await connect(caller, project_id=project))["integration"]
    outsider = await new_caller("eve")
    unknown = "019ab3f2-6f2e-7c1a-9d0e-5b7c8a1e2f30"
    for body in ({"organization_id": organization}, {"project_id": project}):
        [(name, _)] = body.items()
        answers = [
            await outsider.http.post("/integrations", json={"source": "slack", name: value})
            for value in (*body.values(), unknown, "x", "")
        ]
        assert len({(await refused(answer)) for answer in answers}) == 1
        assert answers[0].status_code == 404
    assert await listed(outsider) == []
    assert (await outsider.http.get(f"/integrations?project_id={project}")).status_code == 404
    assert (await outsider.http.delete(f"/integrations/{one['id']}")).status_code == 404


async def test_an_integration_reaches_projects_of_its_owner_only(
    caller: Caller, stranger: Caller, team: Any, sql: asyncpg.Connection
) -> None:
    organization, project = team
    ours = (await connect(caller, organization_id=organization))["integration"]
    mine = (await connect(caller))["integration"]
    answer = await caller.http.patch(
        f"/integrations/{ours['id']}", json={"project_id": caller.project_id}
    )
    assert await refused(answer) == (
        400,
        "project_id: an integration of an organization reaches projects of that organization only.",
    )
    owned = await caller.http.patch(f"/integrations/{mine['id']}", json={"project_id": project})
    assert owned.status_code == 200  # of the organization, but its owner is the caller
    await sql.execute("update projects set owner_id = $1 where id = $2", stranger.user_id, project)
    answer = await caller.http.patch(f"/integrations/{mine['id']}", json={"project_id": project})
    assert await refused(answer) == (
        400,
        "project_id: an integration of a user reaches projects that this user owns only.",
    )
    answer = await caller.http.patch(
        f"/integrations/{mine['id']}", json={"project_id": stranger.project_id}
    )
    assert (await refused(answer))[0] == 404


async def test_the_owner_of_an_organization_s_project_connects_what_is_their_own(
    caller: Caller, stranger: Caller, team: Any, sql: asyncpg.Connection
) -> None:
    _, project = team
    await sql.execute("update projects set owner_id = $1 where id = $2", stranger.user_id, project)
    one = (await connect(stranger, project_id=project))["integration"]
    assert (one["scope"], one["project_id"]) == ("personal", project)
    assert await listed(caller) == []


# --- baton integration ----------------------------------------------------------------------


@pytest.fixture
def baton(dsn: str) -> Callable[..., Awaitable[Result]]:
    """Runs a command of the operator on the test's database."""

    async def run(*args: str, keys: str = SECRET_KEYS[0], url: str = "") -> Result:
        env = {"DATABASE_URL": dsn, "BATON_SECRET_KEYS": keys, "BATON_PUBLIC_URL": url}
        command = ["integration", *args]
        return await asyncio.to_thread(CliRunner().invoke, cli, command, env=env)

    return run


Baton = Callable[..., Awaitable[Result]]


async def test_a_source_is_connected_by_one_command(
    baton: Baton, caller: Caller, sql: asyncpg.Connection
) -> None:
    done = await baton(
        "create", "github", "--project", "ada", "--name", "acme", url="https://b.example/x"
    )
    assert done.exit_code == 0, done.output
    url, secret = (line.split()[1] for line in done.stdout.splitlines())
    [one] = await listed(caller)
    assert url == f"https://b.example/x/hooks/{one['id']}"
    assert await secrets_of(sql, one["id"]) == [secret]
    assert (one["workspace_name"], one["project_id"]) == ("acme", caller.project_id)
    assert "Webhooks" in done.stderr  # where to paste it
    assert secret not in str(await sql.fetch("select * from ops.audit"))
    assert await sql.fetchval("select what from ops.audit order by id desc limit 1") == (
        "create_integration"
    )


async def test_the_project_says_whose_an_integration_is_unless_somebody_does(
    baton: Baton, caller: Caller, team: Any, sql: asyncpg.Connection
) -> None:
    organization, project = team
    assert (await baton("create", "github", "--project", project)).exit_code == 0
    done = await baton(
        "create", "slack", "--org", "acme", "--user", "ada@example.com", "--secret", SLACK
    )
    assert done.exit_code == 0 and SLACK in done.output
    assert [each["organization_id"] for each in await listed(caller)] == [organization] * 2
    done = await baton("create", "github", "--org", "acme", "--project", caller.project_id)
    assert (done.exit_code, done.output) == (
        1,
        "Error: project: an integration of an organization reaches projects of that organization"
        " only.\n",
    )


async def test_integrations_are_listed_disabled_enabled_and_deleted(
    baton: Baton, caller: Caller
) -> None:
    one = (await connect(caller, workspace_name="acme inc"))["integration"]
    for command, told, status in (
        ("disable", "Disabled.", "disabled"),
        ("disable", "It was already.", "disabled"),
        ("enable", "Enabled.", "awaiting_first_delivery"),
    ):
        assert (await baton(command, one["id"])).output.strip() == told
        line = (await baton("list")).output.split()
        assert line[:4] == [one["id"], "github", status, "ada@example.com"]
    assert (await baton("delete", one["id"])).output == "Deleted.\n"
    assert (await baton("list")).output == ""
    for wanted in (one["id"], "github"):
        done = await baton("rotate", wanted)
        assert done.exit_code == 1 and done.output.startswith("Error: There is no integration")


async def test_a_rotation_on_the_command_line_keeps_the_old_secret_or_ends_it(
    baton: Baton, caller: Caller, sql: asyncpg.Connection
) -> None:
    made = await connect(caller)
    integration_id = made["integration"]["id"]
    second = (await baton("rotate", integration_id)).stdout.split()[-1]
    assert await secrets_of(sql, integration_id) == [second, made["secret"]]
    third = (await baton("rotate", integration_id, "--now")).stdout.split()[-1]
    assert await secrets_of(sql, integration_id) == [third]
    slack = (await connect(caller, source="slack"))["integration"]["id"]
    done = await baton("rotate", slack)
    assert done.exit_code == 1 and "--secret: slack makes it" in done.output


async def test_without_a_key_a_command_says_how_to_make_one(
    baton: Baton, caller: Caller, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = await baton("create", "github", "--project", "ada", keys="")
    assert done.exit_code == 1
    assert "make a key with: baton integration new-key" in done.output
    assert await listed(caller) == []
    assert len((await baton("new-key", keys="")).output.strip()) == 44


async def test_rekeying_makes_the_old_key_needless_and_can_be_repeated(
    baton: Baton, caller: Caller, sql: asyncpg.Connection
) -> None:
    made = [await connect(caller, token=TOKEN) for _ in range(3)]
    new = new_key()
    assert (await baton("rekey", keys=f"{new},{SECRET_KEYS[0]}")).output == (
        "6 of 6 secrets encrypted anew.\n"
    )
    values = await sql.fetch("select value from integration_secrets")
    opened = {Cipher((new,)).decrypt(value) for (value,) in values}
    assert opened == {TOKEN, *(each["secret"] for each in made)}
    again = await baton("rekey", keys=new)
    assert again.output == "0 of 6 secrets encrypted anew.\n"
    lost = await baton("rekey", keys=SECRET_KEYS[0])
    assert lost.exit_code == 1 and "has not the key" in lost.output
    assert new not in lost.output and SECRET_KEYS[0] not in lost.output


async def test_a_secret_that_was_rotated_during_a_rekeying_stays_as_it_is(
    caller: Caller, sql: asyncpg.Connection
) -> None:
    one = (await connect(caller))["integration"]["id"]
    [(row_id, value)] = await sql.fetch("select id, value from stored_secrets(uuid_at('epoch'), 9)")
    await sql.execute("update integration_secrets set value = 'newer'")
    rekeyed = "select rekey_secrets($1, $2, $3)"
    assert await sql.fetchval(rekeyed, [row_id], [value], [b"mine"]) == 0
    assert await sql.fetchval("select live_secrets($1, 'signing')", one) == [b"newer"]


async def test_the_views_of_an_operator_show_whose_they_are_and_no_secret(
    caller: Caller, team: Any, ops: asyncpg.Connection
) -> None:
    made = [await connect(caller, token=TOKEN, project_id=p) for p in (caller.project_id, team[1])]
    rows = await ops.fetch("select * from ops.integrations")
    assert {(row["owner"], row["organization"]) for row in rows} == {
        ("ada@example.com", None),
        ("ada@example.com", "acme"),
    }
    seen = str([tuple(row) for row in rows])
    assert not any(each["secret"] in seen for each in made) and TOKEN not in seen


async def test_what_a_source_has_brought_is_shown_and_no_other_secret(
    caller: Caller, sql: asyncpg.Connection, baton: Baton
) -> None:
    notion = (await connect(caller, source="notion"))["integration"]["id"]
    github = (await connect(caller))["integration"]["id"]
    early = await baton("secret", notion)
    assert early.exit_code == 1 and "not brought one yet" in early.output
    brought = Cipher(SECRET_KEYS).encrypt("secret_tMrlL1qK5vuQAh1b")
    await sql.fetchval("select keep_first_secret($1, $2)", notion, brought)
    assert (await baton("secret", notion)).output == "secret_tMrlL1qK5vuQAh1b\n"
    refusal = await baton("secret", github)
    assert refusal.exit_code == 1 and "shown once only" in refusal.output
