"""The command line, as real processes: what an operator types, and what they see."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import new_folder

from app.db import current_version

ROOT = Path(__file__).parent.parent
KEY = re.compile(r"fr_[A-Za-z0-9_-]{43}")


def environment(**changes: str) -> dict[str, str]:
    """An environment in which only what a test says is configured."""
    foreign = ("BATON_", "DATABASE_URL", "HOST", "PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def baton(*args: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, here."""
    return baton_in(Path.cwd(), *args, **changes)


def baton_in(cwd: Path, *args: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in another directory."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "app", *args],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for what other processes do; they send no signal."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@dataclass
class Running:
    """A `baton run` of its own."""

    process: subprocess.Popen[bytes]
    data_dir: Path
    port: int
    log: Path

    @property
    def env(self) -> dict[str, str]:
        return {"BATON_DATA_DIR": str(self.data_dir), "PORT": str(self.port)}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        found = KEY.search(self.log.read_text())
        assert found
        return found[0]

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz", trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def children(self, title: str) -> list[psutil.Process]:
        """The processes of that name in the process list."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it may end, or be a zombie, by now
                if " ".join(child.cmdline()).startswith(title):
                    found.append(child)
        return found


def start(data_dir: Path, port: int, **changes: str) -> Running:
    log = data_dir.with_suffix(".log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app", "run"],
            env=environment(BATON_DATA_DIR=str(data_dir), PORT=str(port), **changes),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
        )
    return Running(process, data_dir, port, log)


def stop(running: Running) -> int:
    running.process.send_signal(signal.SIGTERM)
    return running.process.wait(50)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A place where servers can live."""
    with new_folder("test-cli-") as folder:
        yield folder


@pytest.fixture(scope="module")
def worker_metrics(unused_port: Callable[[], int]) -> str:
    """Where the worker of `running` tells what it does."""
    return f"127.0.0.1:{unused_port()}"


@pytest.fixture(scope="module")
def running(unused_port: Callable[[], int], worker_metrics: str) -> Iterator[Running]:
    """One installation for the tests that only use it."""
    with new_folder("test-cli-") as folder:
        started = start(folder / "data", unused_port(), BATON_WORKER_METRICS=worker_metrics)
        until(started.ready)
        yield started
        assert stop(started) == 0


@pytest.fixture(scope="module")
def unused_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small git history."""
    path = tmp_path / "shop"
    git = ["git", "-C", str(path), "-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
    subprocess.run(["git", "init", "-qb", "main", str(path)], check=True)
    for subject in ("Add a cart", "Fix the total of an empty cart"):
        (path / "cart.py").write_text(subject)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", subject], check=True)
    return path


def test_all_faults_of_the_configuration_are_told_together_and_the_exit_is_2() -> None:
    done = baton(
        "doctor", PORT="http", BATON_CONCURRENCY="0", DATABASE_URL="mysql://x", BATON_PROVIDER="?"
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    named = {line.partition(":")[0] for line in lines}
    assert named == {"PORT", "BATON_CONCURRENCY", "DATABASE_URL", "BATON_PROVIDER"}


def test_without_a_database_a_command_says_what_to_do(tmp_path: Path) -> None:
    for command in (["migrate"], ["serve"], ["worker"], ["key", "list"], ["psql"], ["pg_dump"]):
        done = baton(*command, BATON_DATA_DIR=str(tmp_path))
        assert done.returncode == 1, command
        assert "set DATABASE_URL, or start `baton run`" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_database_that_cannot_be_reached_is_one_clear_line() -> None:
    done = baton("migrate", DATABASE_URL="postgresql://u@127.0.0.1:9/nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The database cannot be reached")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_processes_have_names_and_the_first_start_prints_a_key(running: Running) -> None:
    until(lambda: len(running.children("baton serve")) == 1)
    until(lambda: len(running.children("baton worker")) == 1)
    assert running.log.read_text().count("fr_") >= 1
    answer = httpx.get(
        f"{running.url}/api/v1/projects",
        headers={"Authorization": f"Bearer {running.key}"},
        trust_env=False,
    )
    assert [p["name"] for p in answer.json()["projects"]] == ["demo"]


def test_each_process_tells_prometheus_of_itself(running: Running, worker_metrics: str) -> None:
    api = httpx.get(f"{running.url}/metrics", trust_env=False).text
    assert "\nbaton_database_up 1.0\n" in api and "baton_worker_concurrency" not in api

    def page() -> str:
        try:
            return httpx.get(f"http://{worker_metrics}/metrics", trust_env=False).text
        except httpx.ConnectError:  # it starts more slowly than the API
            return ""

    until(page)
    assert "\nbaton_worker_concurrency 100.0\n" in page() and "baton_database_up" not in page()


def test_an_address_for_metrics_that_is_taken_is_one_line(
    running: Running, unused_port: Callable[[], int], tmp_path: Path
) -> None:
    changes = {"BATON_DATA_DIR": str(tmp_path), "PORT": str(unused_port())}
    for name in ("BATON_METRICS", "BATON_WORKER_METRICS"):
        done = baton("run", **changes, **{name: f"127.0.0.1:{running.port}"})
        assert done.returncode == 1
        assert done.stderr.startswith(f"Error: {name}: 127.0.0.1:{running.port}: Address already")
        assert len(done.stderr.splitlines()) == 1


def test_a_second_run_on_the_same_data_or_port_stops_itself_and_not_the_first(
    running: Running, unused_port: Callable[[], int], tmp_path: Path
) -> None:
    same_data = baton("run", **running.env | {"PORT": str(unused_port())})
    assert same_data.returncode == 1 and "already runs on" in same_data.stderr
    same_port = baton("run", **running.env | {"BATON_DATA_DIR": str(tmp_path)})
    assert same_port.returncode == 1 and same_port.stderr.startswith("Error: PORT:")
    assert running.ready()


def test_a_history_is_imported_once_and_a_handoff_of_it_and_an_answer_are_printed(
    running: Running, repository: Path
) -> None:
    args = ("import", "git", str(repository), "--project", "demo", "--repo", "acme/shop")
    assert "2 events imported, 0 already there" in baton(*args, **running.env).stderr
    assert "0 events imported, 2 already there" in baton(*args, **running.env).stderr

    done = baton("handoff", "--project", "demo", **running.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# demo") and "Add a cart" in done.stdout
    done = baton("ask", "--project", "demo", "Who added a cart?", **running.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Who added a cart?") and "- Add a cart" in done.stdout
    assert re.fullmatch(r"ev:[0-9a-f-]{36}", done.stdout.splitlines()[-1])
    live = [
        line for line in baton("key", "list", **running.env).stdout.splitlines() if "live" in line
    ]
    assert all("baton handoff" not in line for line in live)  # the key made for it is revoked


def test_a_question_that_is_refused_is_one_clear_line(running: Running) -> None:
    done = baton("ask", "--project", "demo", " ", **running.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "Error: question: must have at least 1 character."


def test_a_failed_job_is_its_own_sentence_and_exit_1(running: Running) -> None:
    assert baton("project", "create", "Empty", **running.env).returncode == 0
    done = baton("handoff", "--project", "empty", **running.env)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: no_result: There were no events")


def test_a_wrong_key_is_the_sentence_of_the_api(running: Running) -> None:
    done = baton("handoff", "--project", "demo", "--key", "fr_wrong", **running.env)
    assert done.returncode == 1
    assert "Send a valid API key" in done.stderr


def test_a_path_that_is_no_repository_is_one_clear_line(running: Running, tmp_path: Path) -> None:
    done = baton("import", "git", str(tmp_path), "--project", "demo", **running.env)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert str(tmp_path) in line and "not" in line


def test_keys_are_made_listed_and_revoked(running: Running) -> None:
    made = baton("key", "create", "--user", "owner@localhost", "--label", "ci", **running.env)
    raw = made.stdout.strip()
    assert KEY.fullmatch(raw)
    headers = {"Authorization": f"Bearer {raw}"}
    assert httpx.get(f"{running.url}/api/v1/projects", headers=headers, trust_env=False).is_success

    listed = baton("key", "list", **running.env).stdout
    [line] = [line for line in listed.splitlines() if line.endswith("ci")]
    assert line.startswith(raw[:11]) and "live" in line and raw not in listed

    assert baton("key", "revoke", raw[:11], **running.env).returncode == 0
    answer = httpx.get(f"{running.url}/api/v1/projects", headers=headers, trust_env=False)
    assert answer.status_code == 401
    assert baton("key", "revoke", raw[:11], **running.env).returncode == 1
    unknown = baton("key", "create", "--user", "nobody@example.com", **running.env)
    assert unknown.returncode == 1 and "nobody@example.com" in unknown.stderr


def test_projects_are_made_and_listed(running: Running) -> None:
    made = baton("project", "create", "Web Shop", **running.env).stdout.strip()
    listed = baton("project", "list", **running.env).stdout
    assert re.search(rf"^{made}  web-shop +owner@localhost +Web Shop$", listed, re.MULTILINE)


def test_the_embedded_database_has_a_key_for_secrets_beside_it(running: Running) -> None:
    made = (running.data_dir / "secret_keys").read_text().strip()
    printed = baton("integration", "new-key").stdout.strip()
    assert len(made) == len(printed) == 44 and made != printed


def test_the_doctor_finds_a_healthy_installation_healthy(running: Running) -> None:
    done = baton("doctor", **running.env)
    assert done.returncode == 0, done.stdout
    names = [line.split()[1] for line in done.stdout.splitlines()]
    assert names == ["configuration", "database", "schema", "worker", "provider"]
    assert all(line.startswith("ok") for line in done.stdout.splitlines())


def test_psql_opens_on_the_embedded_database(running: Running) -> None:
    done = baton("psql", "-Atc", "select count(*) from schema_version", **running.env)
    assert (done.returncode, done.stdout.strip()) == (0, "1")
    assert f"version {current_version()}" in baton("migrate", **running.env).stdout


def test_a_dump_of_the_embedded_database_restores_beside_it_and_knows_that_it_is_a_copy(
    running: Running, tmp_path: Path
) -> None:
    dump = str(tmp_path / "baton.sql")
    dumped = baton("pg_dump", f"--file={dump}", **running.env)
    assert (dumped.returncode, dumped.stderr) == (0, "")
    steps = ["create database restored", r"\connect restored", None, "select public.hold_reason()"]
    options = [arg for step in steps for arg in (("-f", dump) if step is None else ("-c", step))]
    done = baton("psql", "-v", "ON_ERROR_STOP=1", "-qAt", *options, **running.env)
    baton("psql", "-qc", "drop database restored", **running.env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "This database is a restored copy of another one."


def test_the_death_of_the_worker_leaves_http_up_and_a_new_one_comes(running: Running) -> None:
    [worker] = running.children("baton worker")
    [serve] = running.children("baton serve")
    worker.kill()
    assert running.ready()
    until(lambda: [p.pid for p in running.children("baton worker")] not in ([], [worker.pid]))
    assert running.ready()
    assert [p.pid for p in running.children("baton serve")] == [serve.pid]


def test_the_death_of_the_embedded_server_is_mended_and_loses_nothing(running: Running) -> None:
    pid_file = running.data_dir / "pg" / "postmaster.pid"
    killed = int(pid_file.read_text().split()[0])
    os.kill(killed, signal.SIGKILL)
    until(lambda: running.ready() and pid_file.read_text().split()[0] != str(killed))
    assert running.children("baton serve") and running.children("baton worker")
    assert "database started again" in running.log.read_text()
    assert baton("project", "list", **running.env).stdout.count(" demo ")


def test_a_stop_leaves_nothing_behind_and_a_second_start_prints_no_key(
    tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    first = start(tmp_path / "data", unused_port())
    until(first.ready)
    pid_file = first.data_dir / "pg" / "postmaster.pid"
    family = psutil.Process(first.process.pid).children(recursive=True)
    family.append(psutil.Process(int(pid_file.read_text().split()[0])))
    assert stop(first) == 0
    assert not [process for process in family if process.is_running()]
    assert not pid_file.exists()

    printed = first.log.read_text()
    second = start(tmp_path / "data", unused_port())
    until(second.ready)
    assert "fr_" not in second.log.read_text().removeprefix(printed)
    assert stop(second) == 0


def test_children_do_not_outlive_a_killed_parent(
    tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    orphaned = start(tmp_path / "data", unused_port())
    until(orphaned.ready)
    until(lambda: orphaned.children("baton serve") and orphaned.children("baton worker"))
    children = orphaned.children("baton serve") + orphaned.children("baton worker")
    orphaned.process.kill()
    orphaned.process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []

    again = start(tmp_path / "data", orphaned.port)  # adopts the server that was left
    until(again.ready)
    assert stop(again) == 0


def test_a_demo_runs_beside_a_foreign_app_package_and_a_taken_port(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "app").mkdir()
    (repository / "app" / "__init__.py").write_text("raise SystemExit('the wrong app')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = baton_in(
            repository,
            "demo",
            PORT=str(taken.getsockname()[1]),
            BATON_DATA_DIR=str(tmp_path / "demo"),
        )
    assert done.returncode == 0, done.stderr
    assert "Fix the total of an empty cart" in done.stdout
    assert not (tmp_path / "demo" / "pg" / "postmaster.pid").exists()


def test_a_demo_that_is_told_to_stop_leaves_nothing_behind(
    repository: Path, tmp_path: Path, unused_port: Callable[[], int]
) -> None:
    told = {"PORT": str(unused_port()), "BATON_DATA_DIR": str(tmp_path / "demo")}
    demo = subprocess.Popen(
        [sys.executable, "-P", "-m", "app", "demo"],
        env=environment(**told),
        cwd=repository,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pid_file = tmp_path / "demo" / "pg" / "postmaster.pid"
    until(pid_file.exists)
    family = psutil.Process(demo.pid).children(recursive=True)
    demo.terminate()
    assert demo.wait(50) == 128 + signal.SIGTERM
    assert not [process for process in family if process.is_running()]
    assert not pid_file.exists()
