"""A git history becomes events: real small repositories, made with git itself."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app import history
from app.history import GitFailed, NotARepository, UnknownTime, open_history, read_events
from app.schemas import CONTENT_MAX, NAME_MAX, TITLE_MAX, URL_MAX, EventInput

NOON = 1_767_268_800  # 2026-01-01 12:00 UTC
EMPTY_TREE = b"4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git knows it without being told
GENERATOR = Path(__file__).parent.parent / "bench" / "make_history.py"


class Repo:
    """A repository and the few git commands that these tests need."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main", "--template=")

    def git(
        self, *arguments: str, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.path,
            input=stdin,
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, **(environment or {})},
        )
        return done.stdout.decode("utf-8", "replace").strip()

    def commit(self, message: str, *files: str, at: int = NOON, author: str = "Ada") -> str:
        """Write the files, commit everything, return the id."""
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (self.path / file).write_text(f"{message}\n")
        self.git("add", "-A")
        who = {"GIT_AUTHOR_NAME": author, "GIT_COMMITTER_DATE": f"{at} +0200"}
        self.git(
            "commit", "-q", "--allow-empty", "--allow-empty-message", "-m", message, environment=who
        )
        return self.git("rev-parse", "HEAD")

    def raw(
        self,
        message: bytes,
        *,
        parents: tuple[str, ...] = (),
        author: bytes = b"Ada <ada@example.com>",
        date: bytes = b"1767268800 +0000",
        header: bytes = b"",
    ) -> str:
        """Put main on a commit object that the porcelain might refuse to make."""
        lines = [b"tree " + EMPTY_TREE, *(b"parent " + parent.encode() for parent in parents)]
        lines += [b"author %b %b" % (author, date), b"committer %b %b" % (author, date)]
        data = b"\n".join([*lines, *([header] if header else []), b"", message])
        made = self.git("hash-object", "-t", "commit", "-w", "--literally", "--stdin", stdin=data)
        (self.path / ".git/refs/heads/main").write_text(f"{made}\n")
        return made


@pytest.fixture(autouse=True)
def own_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No configuration of the machine, and a person to commit as; returns the global config."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    config = tmp_path / "gitconfig"
    config.write_text(
        '[protocol "file"]\nallow = always\n[advice]\ndetachedHead = false\n'
        "[gc]\nauto = 0\n[maintenance]\nauto = false\n[core]\nfsync = none\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Ada")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "ada@example.com")
        monkeypatch.setenv(f"GIT_{role}_DATE", f"{NOON} +0000")
    return config


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return Repo(tmp_path / "shop")


def events(repo: Repo | Path, **options: Any) -> list[dict[str, Any]]:
    """Everything that is read; each event must be one that the API accepts, counted right."""
    opened = open_history(repo if isinstance(repo, Path) else repo.path, **options)
    found = list(read_events(opened))
    assert len(found) == opened.commits + opened.tags
    for event in found:
        EventInput.model_validate(event)
        assert str(event).encode()  # would fail on a lone surrogate
    return found


def only(repo: Repo) -> dict[str, Any]:
    [event] = events(repo)
    return event


# --- Commits -------------------------------------------------------------------------------


def test_a_commit_becomes_an_event(repo: Repo) -> None:
    first = repo.commit("Start", "a.py")
    message = "Add search\n\nBecause of #3.\n\nReviewed-by: Bo"
    sha = repo.commit(message, "b.py", "c/d.py", at=NOON + 60)  # written at noon, committed later
    assert events(repo)[0] == {
        "source": "github",
        "event_type": "commit",
        "title": "Add search",
        "content": "Because of #3.\n\nReviewed-by: Bo",
        "external_id": sha,
        "resource": "shop",
        "branch": "main",
        "author": "Ada",
        "url": None,
        "occurred_at": datetime(2026, 1, 1, 12, 1, tzinfo=UTC),
        "metadata": {
            "sha": sha,
            "parents": [first],
            "files": ["b.py", "c/d.py"],
            "files_changed": 2,
        },
    }


def test_the_root_commit_lists_its_files_and_no_content(repo: Repo) -> None:
    repo.commit("Start", "a.py")
    event = only(repo)
    assert event["content"] is None
    assert event["metadata"]["files"] == ["a.py"]
    assert event["metadata"]["parents"] == []


def test_tags_come_first_then_commits_from_new_to_old(repo: Repo) -> None:
    for number in range(3):
        repo.commit(f"c{number}", at=NOON + number)
        repo.git("tag", f"t{number}")
    assert [event["title"] for event in events(repo)[3:]] == ["c2", "c1", "c0"]
    assert {event["event_type"] for event in events(repo)[:3]} == {"tag"}


def test_the_source_is_the_callers(repo: Repo) -> None:
    repo.commit("Start")
    repo.git("tag", "v1")
    found = read_events(open_history(repo.path), source="gitlab")
    assert {event["source"] for event in found} == {"gitlab"}


def test_no_mail_address_leaves_the_repository(repo: Repo) -> None:
    repo.commit("Start", "a.py")
    repo.git("tag", "-a", "v1", "-m", "One")
    assert "ada@example.com" not in str(events(repo))


def test_mailmap_makes_two_names_one_person(repo: Repo) -> None:
    (repo.path / ".mailmap").write_text("Ada Lovelace <ada@example.com>\n")
    repo.commit("Start", author="ada_l")
    assert only(repo)["author"] == "Ada Lovelace"


def test_commits_made_after_opening_are_not_read(repo: Repo) -> None:
    repo.commit("Start")
    opened = open_history(repo.path)
    repo.commit("Later")
    assert [event["title"] for event in read_events(opened)] == ["Start"]


def test_a_squashed_pull_request_is_recognised(repo: Repo) -> None:
    repo.commit("Fix #3 in the cart (#12)")
    event = only(repo)
    assert (event["title"], event["metadata"]["pull_request"]) == ("Fix #3 in the cart (#12)", 12)


# --- Merges --------------------------------------------------------------------------------

MERGES: dict[str, tuple[str, tuple[str, str | None, dict[str, Any]]]] = {
    "github": (
        "Merge pull request #12 from ada/fix-cart\n\nFix the cart\n\nIt lost items.",
        ("Fix the cart", "It lost items.", {"pull_request": 12, "merged_branch": "ada/fix-cart"}),
    ),
    "github without a body": (
        "Merge pull request #12 from ada/x",
        (
            "Merge pull request #12 from ada/x",
            None,
            {"pull_request": 12, "merged_branch": "ada/x"},
        ),
    ),
    "bitbucket": (
        "Merged in fix/cart (pull request #7)\n\nFix the cart\n\nApproved-by: Bo",
        ("Fix the cart", "Approved-by: Bo", {"pull_request": 7, "merged_branch": "fix/cart"}),
    ),
    "gitlab": (
        "Merge branch 'fix' into 'main'\n\nFix the cart\n\nSee merge request group/proj!34",
        (
            "Fix the cart",
            "See merge request group/proj!34",
            {"merge_request": 34, "merged_branch": "fix"},
        ),
    ),
    "gitlab without a title": (
        "Merge branch 'fix' into 'main'\n\nSee merge request group/proj!34",
        (
            "Merge branch 'fix' into 'main'",
            "See merge request group/proj!34",
            {"merge_request": 34, "merged_branch": "fix"},
        ),
    ),
    "git": (
        "Merge branch 'x/y' into z",
        ("Merge branch 'x/y' into z", None, {"merged_branch": "x/y"}),
    ),
    "git with a remote": (
        "Merge branch 'x' of host:o/r",
        ("Merge branch 'x' of host:o/r", None, {"merged_branch": "x"}),
    ),
    "git with a tracking branch": (
        "Merge remote-tracking branch 'origin/x'",
        ("Merge remote-tracking branch 'origin/x'", None, {"merged_branch": "origin/x"}),
    ),
    "git with several": (
        "Merge branches 'a', 'b' and 'c' into 'main'",
        ("Merge branches 'a', 'b' and 'c' into 'main'", None, {"merged_branch": "a, b, c"}),
    ),
    "by hand": ("Bring both together", ("Bring both together", None, {})),
    "number too long to be one": (
        "Merge pull request #99999999999 from a/b",
        ("Merge pull request #99999999999 from a/b", None, {}),
    ),
}


def test_a_merge_says_what_was_merged(repo: Repo) -> None:
    one, two = repo.commit("one", "a"), repo.commit("two", "b")
    for message, (title, content, facts) in MERGES.values():
        sha = repo.raw(message.encode(), parents=(one, two))
        event = events(repo)[0]
        assert (event["event_type"], event["title"], event["content"]) == ("merge", title, content)
        # No files: they are on the commits that were merged.
        assert event["metadata"] == {"sha": sha, "parents": [one, two], **facts}


def test_an_octopus_merge_has_all_its_parents(repo: Repo) -> None:
    parents = [repo.commit("root", "a")]
    for name in ("b", "c", "d"):
        repo.git("checkout", "-qb", name, "main")
        parents.append(repo.commit(name, name))
    repo.git("checkout", "-q", "main")
    repo.git("merge", "-q", "--no-ff", "b", "c", "d")
    event = next(event for event in events(repo) if event["event_type"] == "merge")
    assert event["metadata"]["parents"] == parents
    assert event["metadata"]["merged_branch"] == "b, c, d"


# --- Tags ----------------------------------------------------------------------------------


def test_an_annotated_tag_has_its_own_author_time_and_message(repo: Repo) -> None:
    sha = repo.commit("Start", "a")
    who = {"GIT_COMMITTER_NAME": "Bo", "GIT_COMMITTER_DATE": f"{NOON + 60} +0000"}
    repo.git("tag", "-a", "v1.0", "-m", "First\n\n- search\n- cart", environment=who)
    assert events(repo)[0] == {
        "source": "github",
        "event_type": "tag",
        "title": "v1.0",
        "content": "First\n\n- search\n- cart",
        "external_id": "tag:shop:v1.0",
        "resource": "shop",
        "branch": None,
        "author": "Bo",
        "url": None,
        "occurred_at": datetime(2026, 1, 1, 12, 1, tzinfo=UTC),
        "metadata": {"tag": "v1.0", "sha": sha},
    }


def test_a_lightweight_tag_borrows_from_its_commit(repo: Repo) -> None:
    sha = repo.commit("Start", author="Bo", at=NOON + 5)
    repo.git("tag", "release/1")
    event = events(repo)[0]
    assert (event["title"], event["content"], event["author"]) == ("release/1", None, "Bo")
    assert event["occurred_at"].timestamp() == NOON + 5
    assert event["metadata"]["sha"] == sha


def test_a_label_on_a_blob_has_no_time_and_is_left_out(repo: Repo) -> None:
    repo.commit("Start", "a")
    repo.git("tag", "key", "HEAD:a")
    repo.git("tag", "-a", "signed-key", "-m", "A key", "HEAD:a")
    assert [event["title"] for event in events(repo)] == ["signed-key", "Start"]


def test_endless_tag_names_keep_ids_of_their_own(repo: Repo) -> None:
    shas = [repo.commit("one"), repo.commit("two")]
    prefix = "/".join(["n" * 100] * 3)
    for number, sha in enumerate(shas):
        repo.git("tag", f"{prefix}/{number}", sha)
    ids = {event["external_id"] for event in events(repo) if event["event_type"] == "tag"}
    assert ids == {f"tag:{sha}" for sha in shas}


def test_a_tag_with_an_impossible_date_does_not_hide_the_others(repo: Repo) -> None:
    sha = repo.commit("Start")
    head = b"object %b\ntype commit\ntag x\n" % sha.encode()
    taggers = {
        "huge": b"tagger Bo <b@c> %b +0000\n" % (b"9" * 25),
        "words": b"tagger Bo <b@c> yesterday\n",
        "old": b"",  # git wrote no tagger before 2005; the commit has the time
    }
    for name, tagger in taggers.items():
        data = head + tagger + b"\nM\n"
        made = repo.git("hash-object", "-t", "tag", "-w", "--literally", "--stdin", stdin=data)
        repo.git("update-ref", f"refs/tags/{name}", made)
    years = {event["title"]: event["occurred_at"].year for event in events(repo)}
    assert years == {"huge": 2200, "words": 1970, "old": 2026, "Start": 2026}


# --- Where it comes from -------------------------------------------------------------------

SHA_URL = "https://github.com/acme/shop/commit/"
REMOTES = {
    "https://github.com/acme/shop.git": ("acme/shop", SHA_URL),
    "https://github.com/acme/shop/": ("acme/shop", SHA_URL),
    "https://ada:s3cret@github.com/acme/shop.git": ("acme/shop", SHA_URL),
    "https://s3cret@GitHub.com/acme/shop": ("acme/shop", SHA_URL),
    "https://ada:s3/cret@x@github.com/acme/shop": ("acme/shop", SHA_URL),
    "https://github.com/acme/shop?token=s3cret#x": ("acme/shop", SHA_URL),
    "git@github.com:acme/shop.git": ("acme/shop", SHA_URL),
    "github.com:acme/shop": ("acme/shop", SHA_URL),
    "ssh://git:s3cret@github.com:22/acme/shop.git": ("acme/shop", SHA_URL),
    "git://github.com/acme/shop": ("acme/shop", SHA_URL),
    "https://gitlab.com/acme/web/shop.git": (
        "acme/web/shop",
        "https://gitlab.com/acme/web/shop/-/commit/",
    ),
    "https://gitlab.acme.test:8443/a/shop": (
        "a/shop",
        "https://gitlab.acme.test:8443/a/shop/-/commit/",
    ),
    "git@bitbucket.org:acme/shop.git": ("acme/shop", "https://bitbucket.org/acme/shop/commits/"),
    "https://code.acme.test/acme/shop.git": ("acme/shop", None),
    "https://github.evil/../x y/s.git": ("x y/s", "https://github.evil/x%20y/s/commit/"),
    "/srv/git/acme/shop.git": ("acme/shop", None),
    "/srv/git/acme/shop/.git": ("acme/shop", None),
    "file:///srv/git/acme/shop.git": ("acme/shop", None),
    "../shop-origin.git": ("shop-origin", None),
    "sub/shop-origin": ("sub/shop-origin", None),
    "ext::sh -c s3cret": ("work", None),
    "https://github.com/": ("work", None),
}


def test_the_remote_names_the_resource_and_the_links(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "work")
    sha = repo.commit("Start")
    found = {}
    for remote in REMOTES:
        repo.git("config", "remote.origin.url", remote)
        opened = open_history(repo.path)
        [event] = read_events(opened)
        EventInput.model_validate(event)
        found[remote] = (event["resource"], event["url"] and event["url"].removesuffix(sha))
        assert "s3cret" not in f"{event}{opened}"
    assert found == REMOTES


def test_tags_link_to_the_page_of_their_forge(repo: Repo) -> None:
    repo.commit("Start")
    repo.git("tag", "v1#2")
    pages = {
        "git@github.com:a/b.git": "https://github.com/a/b/releases/tag/v1%232",
        "git@gitlab.com:a/b.git": "https://gitlab.com/a/b/-/tags/v1%232",
        "git@bitbucket.org:a/b.git": "https://bitbucket.org/a/b/commits/tag/v1%232",
    }
    for remote, page in pages.items():
        repo.git("config", "remote.origin.url", remote)
        assert events(repo)[0]["url"] == page


def test_a_link_too_long_to_store_is_left_out(repo: Repo) -> None:
    repo.commit("Start")
    repo.git("config", "remote.origin.url", "https://github.com/a/" + "ü" * URL_MAX)
    assert only(repo)["url"] is None


def test_a_given_name_wins(repo: Repo) -> None:
    repo.git("config", "remote.origin.url", "https://github.com/acme/shop")
    repo.commit("Start")
    assert open_history(repo.path, name=" mine\n").name == "mine"
    assert open_history(repo.path, name="\ud800" * 999).name == "�" * NAME_MAX
    assert open_history(repo.path, name="").name == "acme/shop"


def test_every_way_into_a_repository_gives_the_same_name(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit("Start", "deep/er/a.py")
    repo.git("worktree", "add", "-q", "-b", "other", str(tmp_path / "elsewhere"))
    bare = repo.path / "mirrors" / "shop.git"  # inside another repository, to tempt
    repo.git("clone", "-q", "--bare", ".", str(bare))
    repo.git("-C", str(bare), "remote", "remove", "origin")
    monkeypatch.chdir(repo.path / "deep")
    ways = [Path(), repo.path / "deep" / "er", repo.path / ".git", tmp_path / "elsewhere"]
    for way in [*ways, bare, bare / "refs"]:
        [event] = events(way)
        assert event["resource"] == "shop", way
        assert event["metadata"]["files"] == ["deep/er/a.py"], way
    assert open_history(Path()).path == repo.path
    assert open_history(bare / "refs").path == bare
    assert open_history(tmp_path / "elsewhere").branch == "other"


def test_a_submodule_is_a_path_in_the_outer_and_a_repository_itself(
    repo: Repo, tmp_path: Path
) -> None:
    inner = Repo(tmp_path / "inner")
    inner.commit("Inner", "x")
    repo.git("submodule", "--quiet", "add", str(inner.path), "lib/inner")
    repo.commit("Use inner")
    assert only(repo)["metadata"]["files"] == [".gitmodules", "lib/inner"]
    [event] = events(repo.path / "lib" / "inner")
    assert event["title"] == "Inner"


def test_a_detached_head_reports_the_default_branch_only_if_that_contains_it(repo: Repo) -> None:
    repo.commit("one")
    repo.commit("two")
    repo.git("checkout", "-q", "HEAD~1")
    assert only(repo)["branch"] == "main"
    repo.commit("aside")
    assert open_history(repo.path).branch is None
    assert events(repo)[0]["branch"] is None


def test_a_shallow_clone_does_not_blame_its_first_commit_for_every_file(
    repo: Repo, tmp_path: Path
) -> None:
    one, two = repo.commit("one", "a"), repo.commit("two", "b")
    repo.raw(b"Merge pull request #5 from ada/x\n\nThe request", parents=(one, two))
    repo.git("reset", "-q", "--hard")
    repo.commit("after", "c")
    clone = tmp_path / "clone"
    repo.git("clone", "-q", "--depth", "2", f"file://{repo.path}", str(clone))
    newest, boundary = events(clone)
    assert newest["metadata"]["files"] == ["c"]
    assert (boundary["event_type"], boundary["title"]) == ("merge", "The request")
    assert "files" not in boundary["metadata"]
    repo.commit("newest", "d")
    Repo(clone).git("pull", "-q", "--depth", "2")
    assert [event["metadata"].get("files") for event in events(clone)] == [["d"], None]
    assert boundary["resource"].endswith("/shop")


@pytest.mark.parametrize(("kind", "files"), [("blob:none", ["a"]), ("tree:0", None)])
def test_a_partial_clone_is_read_without_fetching(
    repo: Repo, tmp_path: Path, kind: str, files: list[str] | None
) -> None:
    repo.commit("one", "a")
    repo.commit("two", "b")
    repo.git("config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "clone"
    repo.git("clone", "-q", "--no-checkout", f"--filter={kind}", f"file://{repo.path}", str(clone))
    repo.path.rename(tmp_path / "gone")
    assert events(clone)[1]["metadata"].get("files") == files


def test_grafts_are_followed(repo: Repo) -> None:
    repo.commit("lost", "a")
    root = repo.commit("root", "b")
    repo.git("checkout", "-q", "--orphan", "new")
    young = repo.commit("young", "c")
    repo.git("replace", "--graft", young, root)
    assert [event["title"] for event in events(repo)] == ["young", "root", "lost"]


# --- Everything git can hold ---------------------------------------------------------------

TEXTS: dict[str, tuple[bytes, str, str | None]] = {
    "not utf-8": (b"caf\xe9 \xff", "caf� �", None),
    "an encoded surrogate": (b"a\xed\xa0\x80b", "a���b", None),
    "control characters": (b"a\x01\x1b[31mb\x7f\xc2\x85c\n\nd\x00e", "a[31mbc", "d"),
    "windows lines": (b"a\r\n\r\nb\r\nc", "a", "b\nc"),
    "nothing": (b"", "(no message)", None),
    "only blanks": (b" \n\t\n", "(no message)", None),
    "only control characters": (b"\x01\x02", "(no message)", None),
    "a subject on two lines": (b"one\ntwo\n\nbody", "one two", "body"),
    "a record separator": (b"a\n\n\x1e\x1f%x00%H", "a", "%x00%H"),
    "long": (b"x" * 1001, "x" * 999 + "…", "x" * 1001),
    "endless": (b"s\n\n" + b"\xe2\x82\xac" * 900_000, "s", "€" * (CONTENT_MAX - 1) + "…"),
}


def test_any_message_comes_through(repo: Repo) -> None:
    made = repo.commit("before")
    for raw, _, _ in TEXTS.values():
        made = repo.raw(raw, parents=(made,))
    *found, before = events(repo)
    texts = [(event["title"], event["content"]) for event in reversed(found)]
    assert dict(zip(TEXTS, texts, strict=True)) == {name: text[1:] for name, text in TEXTS.items()}
    assert max(len(title) for title, _ in texts) == TITLE_MAX
    assert before["title"] == "before"


def test_a_message_in_another_encoding_is_translated(repo: Repo) -> None:
    repo.raw(b"caf\xe9", header=b"encoding ISO-8859-1")
    assert only(repo)["title"] == "café"


def test_any_author_comes_through(repo: Repo) -> None:
    authors = {
        b"<a@b>": None,
        b" \x01 <a@b>": None,
        b"J\xf6rg <a@b>": "J\ufffdrg",
        b"x" * 999 + b" <a@b>": "x" * NAME_MAX,
    }
    for author, expected in authors.items():
        repo.raw(b"m", author=author)
        assert only(repo)["author"] == expected


def test_any_date_comes_through(repo: Repo) -> None:
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 12, 31, 23, 59, 59, tzinfo=UTC)
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    dates = {
        b"1767268800 +9999": noon,
        b"1767268800 -1130": noon,
        b"-5 +0000": first,
        b"soon": first,
        b"": first,
        b"9999999999 +0000": last,
        b"9" * 40 + b" +0000": last,
    }
    for date, expected in dates.items():
        repo.raw(b"m", date=date)
        assert only(repo)["occurred_at"] == expected, date


def test_any_file_name_comes_through(repo: Repo) -> None:
    sha = repo.commit("Start", "\nfirst")
    names = ["two\nlines", 'quo"te', " blank ", "tab\t", "ünï", "-x", sha, "caf\udce9"]
    repo.commit("Names", *names)
    event, first = events(repo)
    assert set(event["metadata"]["files"]) == {
        *("two lines", 'quo"te', " blank ", "tab ", "ünï", "-x", sha, "caf�")
    }
    assert first["metadata"]["files"] == [" first"]


def test_a_rename_touches_both_paths(repo: Repo) -> None:
    repo.commit("Start", "a")
    repo.git("mv", "a", "b")
    repo.commit("Move")
    assert events(repo)[0]["metadata"]["files"] == ["a", "b"]


def test_a_commit_of_ten_thousand_files_is_counted_and_cut(repo: Repo) -> None:
    lines = "".join(f"M 100644 inline f{n:05}\ndata 0\n" for n in range(10_000))
    head = f"commit refs/heads/main\ncommitter A <a@b> {NOON} +0000\ndata 1\nx\n"
    repo.git("fast-import", "--quiet", stdin=(head + lines).encode())
    metadata = only(repo)["metadata"]
    assert metadata["files_changed"] == 10_000
    assert metadata["files"] == [f"f{n:05}" for n in range(50)]


def test_branch_names_outside_utf8_come_through(repo: Repo) -> None:
    repo.commit("Start")
    repo.git("checkout", "-qb", "caf\udce9")
    assert only(repo)["branch"] == "caf�"


# --- Since ---------------------------------------------------------------------------------


def test_since_counts_and_reads_only_what_is_newer(repo: Repo) -> None:
    now = int(time.time())
    repo.commit("old", at=now - 40 * 86_400)
    repo.git("tag", "old-tag")
    repo.commit("new", at=now - 86_400)
    repo.git("tag", "new-tag")
    assert [event["title"] for event in events(repo, since="2 weeks ago")] == ["new-tag", "new"]
    assert len(events(repo, since="3 months ago")) == 4


def test_since_a_bare_date_means_its_midnight(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    repo.commit("before", at=NOON - 43_201)
    repo.commit("at midnight", at=NOON - 43_200)
    assert [event["title"] for event in events(repo, since="2026-01-01")] == ["at midnight"]


def test_since_later_than_everything_is_an_empty_history(repo: Repo) -> None:
    repo.commit("Start")
    opened = open_history(repo.path, since="2026-02-01")
    assert (opened.commits, opened.tags, list(read_events(opened))) == (0, 0, [])


def test_since_nonsense_is_refused_instead_of_taken_for_now(repo: Repo) -> None:
    repo.commit("Start")
    for since in ("nonsense", "", "2026", "now", "2026-13-45", "--output=x"):
        with pytest.raises(UnknownTime, match="2 weeks ago"):
            open_history(repo.path, since=since)
    assert not (repo.path / "x").exists()


def test_since_with_a_nul_character_is_refused(repo: Repo) -> None:
    repo.commit("Start")
    with pytest.raises(NotARepository, match="invalid character"):
        open_history(repo.path, since="1 day\0ago")


# --- What is refused -----------------------------------------------------------------------


def test_what_holds_no_history_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    empty = Repo(tmp_path / "empty")
    cases = {
        tmp_path / "plain": "plain is not a git repository",
        tmp_path / "file": "file is not a directory",
        tmp_path / "missing": "missing is not a directory",
        Path("nul\0"): "is not a directory",
        empty.path: "empty has no commits yet",
    }
    for path, sentence in cases.items():
        with pytest.raises(NotARepository, match=sentence):
            open_history(path)
    monkeypatch.setenv("PATH", str(tmp_path / "plain"))
    with pytest.raises(NotARepository, match="empty cannot be read: git is not installed"):
        open_history(empty.path)


def test_another_users_repository_is_refused_with_the_remedy(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit("Start")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    with pytest.raises(NotARepository) as caught:
        open_history(repo.path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{repo.path} belongs to another user")
    subprocess.run(sentence.partition("run: ")[2], shell=True, check=True)
    assert open_history(repo.path).commits == 1


def test_a_path_that_looks_like_an_option_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo(tmp_path / "--upload-pack=x").commit("Start")
    monkeypatch.chdir(tmp_path)
    assert open_history(Path("--upload-pack=x")).commits == 1


def test_a_broken_repository_raises_with_gits_own_last_line(repo: Repo) -> None:
    repo.commit("one", "a")
    tree = repo.git("rev-parse", "HEAD^{tree}")
    repo.commit("two", "b")
    (repo.path / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    found = read_events(open_history(repo.path))
    with pytest.raises(GitFailed, match=f"shop: git failed: .*{tree}"):
        list(found)


def fake_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in front of git."""
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")


def test_git_that_does_not_answer_is_given_up(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_git(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(history, "ANSWER_SECONDS", 0.2)
    with pytest.raises(GitFailed, match="did not answer"):
        open_history(repo.path)


# --- Git as a process ----------------------------------------------------------------------


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr("app.history.subprocess.Popen", start)
    return started


def many_commits(repo: Repo, count: int) -> None:
    """Far more than a pipe holds, so that git is still writing when the reader leaves."""
    text = "x" * 1_000
    stream = (
        f"commit refs/heads/main\ncommitter A <a@b> {NOON + n} +0000\ndata 1000\n{text}\n"
        for n in range(count)
    )
    repo.git("fast-import", "--quiet", stdin="".join(stream).encode())


def leave_by_close(found: Any) -> None:
    next(found)
    found.close()


def leave_by_error(found: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        found.throw(ZeroDivisionError())


def leave_by_reading_all(found: Any) -> None:
    assert len(list(found)) == 2_000


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_error, leave_by_reading_all])
def test_git_never_outlives_the_iterator(
    repo: Repo, children: list[subprocess.Popen[bytes]], leave: Callable[[Any], None]
) -> None:
    many_commits(repo, 2_000)
    found = read_events(open_history(repo.path))
    next(found) if leave is leave_by_error else None
    leave(found)
    assert children
    assert all(child.returncode is not None for child in children)


def test_leaving_does_not_wait_for_a_git_that_is_busy(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit("Start")
    opened = open_history(repo.path)
    size = history.CHUNK - 1  # with its NUL exactly one read; then silence
    fake_git(tmp_path, monkeypatch, f"printf '%{size}s\\0' x; exec sleep 60")
    pieces = history._stream(opened.path, "log")
    assert len(next(pieces)) == size
    begun = time.monotonic()
    pieces.close()
    assert time.monotonic() - begun < 30


def test_a_monstrous_field_is_not_held_in_memory() -> None:
    endless = io.BytesIO(b"x" * (4 * history.PIECE_MAX) + b"\0next")
    first, second = history._pieces(endless)
    assert 4 * CONTENT_MAX < len(first) <= history.PIECE_MAX + history.CHUNK
    assert second == b"next"


def test_one_process_reads_all_commits(repo: Repo, children: list[subprocess.Popen[bytes]]) -> None:
    many_commits(repo, 2_000)
    opened = open_history(repo.path)
    children.clear()
    assert len(list(read_events(opened))) == 2_000
    logs = [child for child in children if "log" in child.args]  # type: ignore[operator]
    assert (len(logs), len(children) < 5) == (1, True)


def test_no_setting_of_the_user_changes_what_is_read(repo: Repo, own_git: Path) -> None:
    repo.commit("one", "sub/a")
    signature = b"gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----"
    repo.raw(b"two", parents=(repo.git("rev-parse", "HEAD"),), header=signature)
    repo.git("notes", "add", "-m", "a note")
    repo.git("tag", "v1")
    plain = events(repo), events(repo.path / "sub")
    own_git.write_text(
        """
        [log]
            showSignature = true
            showRoot = false
            decorate = full
            date = relative
            diffMerges = first-parent
            abbrevCommit = true
        [color]
            ui = always
        [core]
            pager = false
            quotePath = true
            notesRef = refs/notes/commits
        [diff]
            renames = copies
            relative = true
            noprefix = true
            orderFile = /does/not/exist
        [format]
            pretty = oneline
        [i18n]
            logOutputEncoding = UTF-16
        [pager]
            log = false
        [tag]
            sort = creatordate
        """
    )
    assert (events(repo), events(repo.path / "sub")) == plain


def test_no_program_that_a_repository_names_is_run(repo: Repo, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path}/sprung\n")
    trap.chmod(0o755)
    (repo.path / ".gitattributes").write_text("* diff=trap filter=trap\n")
    one = repo.commit("one", "a")
    repo.raw(
        b"two", parents=(one,), header=b"gpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END"
    )
    for key in (
        *("core.fsmonitor", "core.pager", "core.sshCommand", "diff.external", "gpg.program"),
        *("diff.trap.command", "diff.trap.textconv", "filter.trap.clean", "filter.trap.smudge"),
    ):
        repo.git("config", key, str(trap))
    repo.git("config", "log.showSignature", "true")
    events(repo)
    # Nor to fetch what a partial clone lacks.
    repo.git("config", "uploadpack.allowFilter", "true")
    clone = tmp_path / "clone"
    repo.git("clone", "-qn", "--filter=tree:0", f"file://{repo.path}", str(clone))
    repo.git("-C", str(clone), "config", "remote.origin.uploadpack", str(trap))
    repo.git("-C", str(clone), "config", "--unset", "remote.origin.partialclonefilter")
    with pytest.raises(GitFailed):
        list(read_events(open_history(clone)))
    assert not (tmp_path / "sprung").exists()


def test_another_work_tree_in_the_configuration_is_not_read(repo: Repo, tmp_path: Path) -> None:
    repo.commit("here")
    other = Repo(tmp_path / "other")
    other.commit("there")
    repo.git("config", "core.worktree", str(other.path))
    assert only(repo)["title"] == "here"


def test_the_environment_of_a_hook_does_not_redirect_the_reading(
    repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.commit("here")
    other = Repo(tmp_path / "other")
    other.commit("there")
    monkeypatch.setenv("GIT_DIR", str(other.path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.path))
    monkeypatch.setenv("GIT_INDEX_FILE", "nowhere")
    assert only(repo)["title"] == "here"


# --- The generator of large histories ------------------------------------------------------


def test_the_generated_history_is_the_same_every_time_and_reads_well(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        command = [sys.executable, str(GENERATOR), str(tmp_path / name), "--commits", "600"]
        subprocess.run([*command, "--until", "2026-06-01"], check=True, stdout=subprocess.DEVNULL)
        found.append(events(tmp_path / name, name="big"))
    assert found[0] == found[1]
    kinds = [event["event_type"] for event in found[0]]
    assert len(kinds) - kinds.count("tag") == 600
    assert kinds.count("merge") > 20
    assert max(event["occurred_at"] for event in found[0]) == datetime(2026, 6, 1, tzinfo=UTC)
    text = str(found[0])
    for word in ("Decision: ", "Question: ", "TODO: ", "This reverts commit ", "Bump ", "(#"):
        assert word in text
