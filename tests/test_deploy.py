"""What is under deploy/ fits Kubernetes, the operators that it asks for, and Baton itself."""

import asyncio
import copy
import re
import shlex
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import manifests
import pytest
import yaml
from click.testing import CliRunner
from conftest import new_folder, served, with_database

from app import embedded, guard, main, supervisor
from app.__main__ import cli
from app.db import open_database
from app.embedded import EmbeddedPostgres
from app.migration import migrate
from app.queue import hung_bell
from app.settings import NO_LIMITS, Settings
from app.sweeper import LEASE
from tasks import worker
from tasks.providers import Extractive

KUBERNETES = manifests.resources()
COMPOSE = manifests.compose()["services"]
PODS = {  # the template of each workload of ours
    name: KUBERNETES[name]["spec"]["template"]
    for name in ("Deployment baton-api", "Deployment baton-worker", "Job baton-migrate")
}
CLUSTER = KUBERNETES["Cluster baton-db"]["spec"]
MANAGED = CLUSTER["managed"]["roles"]
COUNTS = KUBERNETES["TriggerAuthentication baton-queue"]
SCALED = KUBERNETES["ScaledObject baton-worker"]["spec"]


def container(pod: str) -> dict[str, Any]:
    """The one container of a workload."""
    [only] = PODS[pod]["spec"]["containers"]
    return dict(only)


def seconds(text: str) -> int:
    """Of compose's durations those that we use."""
    assert re.fullmatch("[0-9]+s", text), text
    return int(text[:-1])


# --- Valid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUBERNETES)
def test_every_manifest_is_valid(name: str) -> None:
    assert manifests.faults(KUBERNETES[name]) == []


def test_the_compose_file_has_only_fields_that_compose_has() -> None:
    assert manifests.misfits(manifests.compose(), manifests.COMPOSE) == []


def test_the_manifests_in_the_guide_are_valid(root: Path) -> None:
    guide = (root / "docs" / "deploy.md").read_text()
    [shown] = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    resources = list(yaml.safe_load_all(shown))
    assert [resource["kind"] for resource in resources] == ["Cluster", "ScheduledBackup"]
    assert [manifests.faults(resource) for resource in resources] == [[], []]


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("Deployment baton-api", "spec.template.spec.terminationGracePeriodSecond", 60),
        ("Deployment baton-api", "spec.replicas", "2"),
        ("Job baton-migrate", "spec.backoffLimits", 3),
        ("PodDisruptionBudget baton-api", "spec.minAvailible", 1),
        ("ScaledObject baton-worker", "spec.maxReplicas", 10),
        ("ScaledObject baton-worker", "spec.minReplicaCount", "1"),
        ("ScaledObject baton-worker", "spec.triggers.0.metadata.targetQueryValue", 100),
        ("TriggerAuthentication baton-queue", "spec.secretTargetRefs", []),
        ("Cluster baton-db", "spec.postgresql.synchronous.durability", "required"),
        ("Cluster baton-db", "spec.postgresql.synchronous.method", "quorum"),
        ("Cluster baton-db", "spec.postgresql.parameters.max_connections", 250),
        ("Cluster baton-db", "spec.instances", None),
    ],
)
def test_a_wrong_field_or_value_is_found(name: str, path: str, value: Any) -> None:
    resource = copy.deepcopy(KUBERNETES[name])
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = resource
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    assert manifests.faults(resource)


def test_the_kustomization_applies_every_manifest_and_names_the_one_image() -> None:
    kustomization = KUBERNETES["Kustomization kustomization"]
    files = {file.name for file in manifests.FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(files)
    images = {container(pod)["image"] for pod in PODS}
    assert images == {image["name"] for image in kustomization["images"]} == {"baton"}
    assert kustomization["namespace"] == KUBERNETES["Namespace baton"]["metadata"]["name"]


# --- Restricted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", PODS)
def test_every_pod_meets_the_restricted_security_standard_and_more(pod: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, rule by rule."""
    spec = PODS[pod]["spec"]
    own = container(pod)["securityContext"]
    context = {**spec["securityContext"], **own}
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers", "hostUsers"}
    assert not context.keys() & {"privileged", "seLinuxOptions", "procMount", "sysctls"}
    assert not any("hostPort" in port for port in container(pod).get("ports", []))
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
        "projected", "secret",
    }  # fmt: skip
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] != 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    # And beyond it.
    assert own["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False


def test_the_namespace_enforces_the_restricted_security_standard() -> None:
    labels = KUBERNETES["Namespace baton"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_everything_runs_as_the_user_of_the_image_and_may_write_where_it_does(root: Path) -> None:
    dockerfile = (root / "Dockerfile").read_text()
    [uid, gid] = re.findall(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)[0]
    written = {"/tmp", re.findall(r"^VOLUME (.+)$", dockerfile, re.MULTILINE)[0]}
    for pod in PODS:
        context = PODS[pod]["spec"]["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == (int(uid), int(gid)), pod
        mounted = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
        assert written <= mounted, pod
    assert COMPOSE["baton"]["user"] == f"{uid}:{gid}"
    assert {mount.partition(":")[0] for mount in COMPOSE["baton"]["tmpfs"]} == written


@pytest.mark.parametrize("service", COMPOSE)
def test_every_compose_service_has_no_more_rights_than_it_needs(service: str) -> None:
    spec = COMPOSE[service]
    assert spec["read_only"] is True
    assert spec["cap_drop"] == ["ALL"] and "cap_add" not in spec
    assert spec["security_opt"] == ["no-new-privileges:true"]
    assert spec["user"] not in ("0", "root")
    assert {"mem_limit", "pids_limit", "restart", "logging"} <= spec.keys()


def test_no_secret_is_in_the_files_and_compose_asks_for_its_password() -> None:
    for service in COMPOSE.values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|KEY|DATABASE_URL", name):
                secret = re.sub(r"\$\{[A-Z_]+(:\?[^}]+|:-)\}", "", value)
                assert secret in ("", "postgresql://baton:@postgres:5432/baton"), name
    assert COMPOSE["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith(
        "${BATON_DB_PASSWORD:?"
    )
    assert not any(name.startswith("Secret ") for name in KUBERNETES)


# --- They fit together --------------------------------------------------------------------------


def selected(selector: Mapping[str, Any]) -> set[str]:
    """The workloads whose pods a selector takes."""
    wanted = {key: {value} for key, value in selector.get("matchLabels", {}).items()}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        wanted[expression["key"]] = set(expression["values"])
    return {
        pod
        for pod, template in PODS.items()
        if all(template["metadata"]["labels"].get(key) in values for key, values in wanted.items())
    }


def test_every_selector_takes_the_pods_that_it_is_for() -> None:
    for part in ("api", "worker"):
        own = {f"Deployment baton-{part}"}
        deployment = KUBERNETES[f"Deployment baton-{part}"]["spec"]
        budget = KUBERNETES[f"PodDisruptionBudget baton-{part}"]["spec"]
        policy = KUBERNETES[f"NetworkPolicy baton-{part}"]["spec"]
        [spread] = PODS[f"Deployment baton-{part}"]["spec"]["topologySpreadConstraints"]
        assert selected(deployment["selector"]) == own
        assert selected(budget["selector"]) == own
        assert selected(policy["podSelector"]) == own
        assert selected(spread["labelSelector"]) == own
    service = KUBERNETES["Service baton-api"]["spec"]
    assert selected({"matchLabels": service["selector"]}) == {"Deployment baton-api"}
    assert selected(KUBERNETES["NetworkPolicy baton"]["spec"]["podSelector"]) == set(PODS)
    assert SCALED["scaleTargetRef"]["name"] == "baton-worker"
    assert "replicas" not in KUBERNETES["Deployment baton-worker"]["spec"]  # KEDA's to say
    [trigger] = SCALED["triggers"]
    authentication = KUBERNETES[f"TriggerAuthentication {trigger['authenticationRef']['name']}"]
    assert {each["parameter"] for each in authentication["spec"]["secretTargetRef"]} == {
        "userName",
        "password",
    }


def test_ports_and_probes_are_those_of_the_api(root: Path) -> None:
    port = Settings().port
    assert f"EXPOSE {port}" in (root / "Dockerfile").read_text()
    api = container("Deployment baton-api")
    metrics = {"name": "metrics", "containerPort": 9000}
    assert api["ports"] == [{"name": "http", "containerPort": port}, metrics]
    assert container("Deployment baton-worker")["ports"] == [metrics]
    for pod, variable in (("api", "BATON_METRICS"), ("worker", "BATON_WORKER_METRICS")):
        assert environment(f"Deployment baton-{pod}")[variable] == "0.0.0.0:9000"
        annotations = PODS[f"Deployment baton-{pod}"]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == "9000"
    alive = container("Deployment baton-worker")["livenessProbe"]
    assert alive["httpGet"] == {"path": "/metrics", "port": "metrics"}
    # Slow is not dead: leases are lost, and jobs run elsewhere, long before.
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 2 * LEASE
    assert KUBERNETES["Service baton-api"]["spec"]["ports"][0]["targetPort"] == "http"
    [rule] = KUBERNETES["NetworkPolicy baton-api"]["spec"]["ingress"]
    assert rule == {"ports": [{"port": "http"}]}
    assert COMPOSE["baton"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    public = {operation.path for operation in main.OPERATIONS if operation.public}
    probes = {name: api[name]["httpGet"] for name in api if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/healthz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    assert {probe["path"] for probe in probes.values()} <= public
    assert {probe["port"] for probe in probes.values()} == {"http"}


def test_every_command_is_one_of_baton() -> None:
    commands = {pod: container(pod)["command"] for pod in PODS}
    assert commands == {
        "Deployment baton-api": ["baton", "serve"],
        "Deployment baton-worker": ["baton", "worker"],
        "Job baton-migrate": ["baton", "migrate"],
    }
    for command in [*commands.values(), COMPOSE["baton"]["command"]]:
        assert command[1] in cli.commands


class Recorder(dict[str, str]):
    """An environment that notes which variables are looked up."""

    asked: set[str]

    def get(self, name: str, default: Any = None) -> Any:
        """As a dictionary does."""
        self.asked.add(name)
        return super().get(name, default)


def environment(pod: str) -> dict[str, str]:
    """What a container of ours finds in its environment, with stand-ins for secrets."""
    found = dict(KUBERNETES["ConfigMap baton"]["data"]) if "envFrom" in container(pod) else {}
    for variable in container(pod)["env"]:
        value = variable.get("value", "secret")
        for name in re.findall(r"\$\(([A-Z_]+)\)", value):
            assert name in found, f"{pod}: {name} is not set before {variable['name']}"
            value = value.replace(f"$({name})", found[name])
        found[variable["name"]] = value
    return found


def test_every_variable_is_one_that_baton_reads_and_every_value_one_that_it_takes() -> None:
    ours = {pod: environment(pod) for pod in PODS}
    ours["compose"] = {
        name: re.sub(r"\$\{[A-Z_]+(:\?[^}]+|:-([^}]*))\}", r"\2", value)
        for name, value in COMPOSE["baton"]["environment"].items()
    }
    for where, variables in ours.items():
        recorder = Recorder(variables)
        recorder.asked = set()
        Settings.from_env(recorder)
        parts = {"DATABASE_USER", "DATABASE_PASSWORD"}  # of DATABASE_URL
        assert set(variables) - recorder.asked <= parts, where
        assert variables["DATABASE_URL"].startswith("postgresql://"), where


def test_every_setting_of_the_file_that_the_guide_names_gets_into_the_container(root: Path) -> None:
    assert "> deploy/.env" in (root / "docs" / "deploy.md").read_text()
    assert COMPOSE["baton"]["env_file"] == [{"path": ".env", "required": False}]
    assert set(COMPOSE["baton"]["environment"]) == {
        "DATABASE_URL",
        "BATON_LOG",
    }  # what it overrules


def test_every_process_gets_more_time_to_stop_than_it_takes() -> None:
    api, working = (PODS[f"Deployment baton-{part}"]["spec"] for part in ("api", "worker"))
    config = guard.Server(main.create_app(Settings(database_url="postgresql://-/-"))).config
    requests = config.timeout_graceful_shutdown
    assert requests
    pause = container("Deployment baton-api")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert api["terminationGracePeriodSeconds"] >= pause + requests + 10
    assert working["terminationGracePeriodSeconds"] >= worker.GRACE + worker.UNREGISTER + 10
    assert seconds(COMPOSE["baton"]["stop_grace_period"]) >= supervisor.DRAIN + 10
    assert COMPOSE["baton"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


def test_every_secret_is_made_by_the_guide_or_by_the_operator(root: Path) -> None:
    used = set(re.findall(r"name: (baton-[a-z]+)\n +key:", "".join(texts())))
    used |= set(re.findall(r"secretName: (\S+)", "".join(texts())))
    used |= {role["passwordSecret"]["name"] for role in MANAGED}
    used.add(CLUSTER["bootstrap"]["initdb"]["secret"]["name"])
    guide = (root / "docs" / "deploy.md").read_text()
    [names] = re.findall(r"for name in ([a-z ]+); do\n +kubectl -n baton create secret", guide)
    assert used == {f"baton-{name}" for name in names.split()} | {"baton-db-ca"}
    # The user name in a Secret is the role's: the guide makes it of the Secret's name.
    assert "username=baton_$name" in guide
    for role in MANAGED:
        assert role["passwordSecret"]["name"] == role["name"].replace("_", "-")
        assert not role.keys() & {"superuser", "createrole", "createdb", "bypassrls", "replication"}
    initdb = CLUSTER["bootstrap"]["initdb"]
    assert initdb["secret"]["name"] == initdb["owner"].replace("_", "-")


def texts() -> Iterator[str]:
    """The manifests as they are written."""
    for file in sorted(manifests.FOLDER.glob("*.yaml")):
        yield file.read_text()


def test_all_processes_together_find_room_in_the_database(root: Path) -> None:
    """Each at its most, with one more of each during a rollout."""
    api = main.POOL_SIZE + 1  # the one that listens
    working = worker.POOL_SIZE + worker.ATTEMPTS_POOL_SIZE + 2  # for tickets, and for deliveries
    replicas = KUBERNETES["Deployment baton-api"]["spec"]["replicas"]
    limited = sum(role.get("connectionLimit", 0) for role in MANAGED)
    reserved = 3 + 5  # for superusers, and what the operator itself opens
    rule = f"{api} × (API processes + 1) + {working} × (workers + 1) + {limited + reserved}:"
    assert rule in (root / "docs" / "sizing.md").read_text()
    needed = (replicas + 1) * api + (SCALED["maxReplicaCount"] + 1) * working + limited + reserved
    assert int(CLUSTER["postgresql"]["parameters"]["max_connections"]) >= needed


def test_a_commit_waits_for_a_standby_on_another_node() -> None:
    assert CLUSTER["instances"] == 3
    assert CLUSTER["postgresql"]["synchronous"] == {
        "method": "any",
        "number": 1,
        "dataDurability": "required",
        "failoverQuorum": True,
    }
    assert "synchronous_commit" not in CLUSTER["postgresql"]["parameters"]
    assert CLUSTER["affinity"]["podAntiAffinityType"] == "required"


def test_a_worker_is_added_for_as_many_jobs_as_one_takes() -> None:
    [trigger] = SCALED["triggers"]
    target = int(trigger["metadata"]["targetQueryValue"])
    assert target == int(KUBERNETES["ConfigMap baton"]["data"]["BATON_CONCURRENCY"])
    host = trigger["metadata"]["host"]
    assert host == "baton-db-rw.baton.svc.cluster.local"


# --- The first steps ----------------------------------------------------------------------------


async def test_the_first_steps_of_the_guide_lead_to_a_key_that_works(
    root: Path, dsn: str, sql: asyncpg.Connection, base_url: str
) -> None:
    """Those in compose, run here: what is after `exec baton`, with the same database."""
    guide = (root / "docs" / "deploy.md").read_text()
    commands = re.findall(r"exec baton \\?\n? *(baton .*)$", guide, re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["psql", "project", "key"]
    shown = (root / "deploy" / "compose.yaml").read_text()
    assert commands[0] in shown and commands[2] in shown
    runner = CliRunner(env={"DATABASE_URL": dsn})
    [_, _, option, statement], *others = (shlex.split(command) for command in commands)
    assert option == "-c"
    await sql.execute(statement)  # psql itself would be one more program to wait for
    for _, *args in others:
        done = await asyncio.to_thread(runner.invoke, cli, args)
        assert done.exit_code == 0, done.output
    assert await works(base_url, done.output.strip())


async def test_the_statements_of_the_guide_lead_to_a_key_that_works(
    root: Path, sql: asyncpg.Connection, base_url: str
) -> None:
    """Those for Kubernetes, which go to the database's own pod."""
    guide = (root / "docs" / "deploy.md").read_text()
    [statements] = re.findall(r'psql baton -c "\n(.*?)"\n', guide, re.DOTALL)
    for statement in statements.split(";"):
        made = await sql.fetchval(statement)
    assert await works(base_url, made)


async def works(base_url: str, key: str) -> bool:
    """Does a key open the one project?"""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        answer = await http.get(
            f"{base_url}/api/v1/projects", headers={"Authorization": f"Bearer {key}"}
        )
    return [project["name"] for project in answer.json()["projects"]] == ["demo"]


# --- The database that CloudNativePG makes of it ------------------------------------------------


def login(dsn: str, role: str) -> str:
    """The same database for another login; the embedded server trusts all of its own machine."""
    assert "//postgres@" in dsn
    return dsn.replace("//postgres@", f"//{role}@")


@pytest.fixture(scope="module")
def bootstrapped() -> Iterator[str]:
    """A server on which CloudNativePG's steps were taken as the manifest says: the superuser's DSN
    of the database, which is empty."""
    initdb = CLUSTER["bootstrap"]["initdb"]
    with new_folder("baton-deploy-") as folder:
        server = EmbeddedPostgres(folder)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "full_page_writes"):
                patch.setitem(embedded.SETTINGS, name, "off")
            superuser = server.start()
        try:
            asyncio.run(bootstrap(superuser, initdb))
            yield with_database(superuser, initdb["database"] + "_made")
        finally:
            server.stop()


async def bootstrap(superuser: str, initdb: Mapping[str, Any]) -> None:
    """https://cloudnative-pg.io/docs/1.30/bootstrap and .../declarative_role_management."""
    sql = await asyncpg.connect(superuser)
    owner = initdb["owner"]
    await sql.execute(f"create role {owner} login")
    # The embedded server has made a database of this name already.
    await sql.execute(f"create database {initdb['database']}_made owner {owner} template template0")
    for statement in initdb["postInitSQL"]:
        await sql.execute(statement)
    for role in MANAGED:
        name, limit = role["name"], role.get("connectionLimit", -1)
        await sql.execute(
            f"alter role {name} login nosuperuser nocreatedb nocreaterole inherit noreplication "
            f"nobypassrls connection limit {limit}"
        )
        for other in role.get("inRoles", []):
            await sql.execute(f"grant {other} to {name}")
    await sql.close()


async def test_one_login_each_migrates_serves_works_and_counts(
    bootstrapped: str,
) -> None:
    """All of it with the logins of the manifests: none is a superuser or may make roles."""
    await migrate(login(bootstrapped, "baton_migrate"))
    settings = Settings(database_url=login(bootstrapped, "baton_api"), limits=NO_LIMITS)
    sql = await asyncpg.connect(login(bootstrapped, "baton_ops"))
    user = await sql.fetchval("select ops.create_user('ada@example.com', 'Ada')")
    project = await sql.fetchval("select ops.create_project('demo', $1)", user)
    key = await sql.fetchval("select ops.create_api_key($1)", user)
    [trigger] = SCALED["triggers"]
    query = trigger["metadata"]["query"]
    by_secret = {role["passwordSecret"]["name"]: role["name"] for role in MANAGED}
    [secret] = {source["name"] for source in COUNTS["spec"]["secretTargetRef"]}
    scaler = await asyncpg.connect(login(bootstrapped, by_secret[secret]))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await scaler.fetchval("select ops.create_api_key($1)", user)
    assert await scaler.fetchval(query) == 0
    async with (
        served(main.create_app(settings)) as url,
        httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False
        ) as http,
    ):
        assert (await http.get("/readyz")).status_code == 200
        event = {"source": "github", "event_type": "commit", "title": "feat: an LRU cache"}
        told = await http.post(
            "/api/v1/events", json={"project_id": str(project), "events": [event]}
        )
        assert told.status_code == 200, told.text
        ids = []
        for _ in range(3):
            answer = await http.post("/api/v1/handoffs", json={"project_id": str(project)})
            assert answer.status_code == 202, answer.text
            ids.append(answer.json()["jobId"])
        assert await scaler.fetchval(query) == 3
        await hold(bootstrapped, ids[0])
        assert await scaler.fetchval(query) == 2
        await work(login(bootstrapped, "baton_worker"))
        done = (await http.get(f"/api/v1/jobs/{ids[1]}")).json()
        assert done["job"]["status"] == "completed", done
        assert await scaler.fetchval(query) == 0
    await scaler.close()
    await sql.close()


async def hold(superuser: str, job_id: str) -> None:
    """Hold a pending job back, as a pause does."""
    sql = await asyncpg.connect(superuser)
    await sql.execute(
        "insert into job_due (job_id, not_before, reason) values ($1, 'infinity', 'paused')",
        uuid.UUID(job_id),
    )
    await sql.execute("delete from procrastinate_jobs where args ->> 'job_id' = $1", job_id)
    await sql.close()


async def work(dsn: str) -> None:
    """Work until no ticket is left."""
    async with (
        open_database(
            dsn, application_name="baton worker", role="baton_worker", size=worker.POOL_SIZE
        ) as database,
        hung_bell(database) as bell,
    ):
        working, _ = worker.make_worker(
            database, Extractive(), bell, concurrency=10, attempt_timeout=30, retry_for=0
        )
        working.install_signal_handlers = False
        working.wait = False
        await working.run()  # type: ignore[no-untyped-call]  # unannotated upstream
