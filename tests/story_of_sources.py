"""One day of a team as its tools tell it: an alert, its ticket, the thread, the mend, the end.

Each delivery is in the shape that its source documents and signed as that source signs. The noise
is of the same team and the same day, and has nothing to do with it.
"""

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from standardwebhooks import Webhook

SECRET = "whsec_c3Rvcmllcy1hcmUtdG9sZC1ieS10b29scw=="
MORNING = (datetime.now(UTC) - timedelta(days=2)).replace(hour=9, minute=0, second=0, microsecond=0)

PAGE = "https://acme.pagerduty.com/incidents/Q2LDZ8K3CHECK1"
CRASH = "https://acme.sentry.io/issues/5120031187/"
TICKET = "https://linear.app/acme/issue/ENG-482/vouchers-are-counted-twice-at-checkout"
RUNBOOK = "https://www.notion.so/153104cd477e80eca87df7ff0236d35c"
REPOSITORY = "https://github.com/acme/checkout"
HEAD = "7c1f09ab34de5678c1f09ab34de5678c1f09ab34"
MENDED = "e19b44d07a2c5f8396b1d0e7f4a2c8b35d6e9f01"
MERGED = "4be8d21f90c3a7765e1b2f8d4c6a09e3b7f5d812"


@dataclass(frozen=True)
class Sent:
    """One delivery: what the source sends, and whether it is of the story."""

    source: str
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    noise: bool = False

    def signed(self, number: int) -> tuple[bytes, dict[str, str]]:
        """Body and headers as they go over the wire."""
        raw = json.dumps(self.body).encode()
        headers = {"content-type": "application/json", **self.headers}
        return raw, headers | SIGNS[self.source](raw, f"story-{number}")


def _mac(message: bytes, algorithm: str = "sha256") -> str:
    return hmac.new(SECRET.encode(), message, algorithm).hexdigest()


def _slack(raw: bytes, _: str) -> dict[str, str]:
    at = str(int(time.time()))
    signature = "v0=" + _mac(b"v0:%s:%s" % (at.encode(), raw))
    return {"x-slack-request-timestamp": at, "x-slack-signature": signature}


def _standard(raw: bytes, message_id: str) -> dict[str, str]:
    now = datetime.now(UTC)
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(SECRET).sign(message_id, now, raw.decode()),
    }


def _buildkite(raw: bytes, _: str) -> dict[str, str]:
    at = str(int(time.time()))
    return {"x-buildkite-signature": f"timestamp={at},signature={_mac(at.encode() + b'.' + raw)}"}


def _grafana(raw: bytes, _: str) -> dict[str, str]:
    at = str(int(time.time()))
    signature = _mac(b"%s:%s" % (at.encode(), raw))
    return {"x-grafana-alerting-timestamp": at, "x-grafana-alerting-signature": signature}


def _bearer(raw: bytes, _: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRET}"}


SIGNS: dict[str, Callable[[bytes, str], dict[str, str]]] = {
    "alertmanager": _bearer,
    "buildkite": _buildkite,
    "circleci": lambda raw, _: {"circleci-signature": f"v1={_mac(raw)}"},
    "github": lambda raw, number: {
        "x-hub-signature-256": f"sha256={_mac(raw)}", "x-github-delivery": number,
    },
    "grafana": _grafana,
    "incident_io": _standard,
    "linear": lambda raw, number: {"linear-signature": _mac(raw), "linear-delivery": number},
    "netlify": _bearer,
    "notion": lambda raw, _: {"x-notion-signature": f"sha256={_mac(raw)}"},
    "pagerduty": lambda raw, _: {"x-pagerduty-signature": f"v1={_mac(raw)}"},
    "sentry": lambda raw, number: {"sentry-hook-signature": _mac(raw), "request-id": number},
    "slack": _slack,
    "vercel": lambda raw, _: {"x-vercel-signature": _mac(raw, "sha1")},
}  # fmt: skip


def at(hour: int, minute: int) -> datetime:
    """A time of the day of the story."""
    return MORNING.replace(hour=hour, minute=minute)


def iso(hour: int, minute: int) -> str:
    return at(hour, minute).isoformat().replace("+00:00", "Z")


def told() -> list[Sent]:
    """Everything that the tools sent that day, in order of time."""
    return [
        alert("firing", "checkout", "HighCheckoutErrorRate", (9, 2)),
        page("incident.triggered", "triggered", (9, 3)),
        crash("created", (9, 4)),
        say("Ramen at twelve, come along", (9, 6), channel="C0RANDOM", noise=True),
        say(
            f"Checkouts with a voucher fail since nine. <{PAGE}|The page>, Sentry has <{CRASH}>",
            (9, 10),
        ),
        page("incident.acknowledged", "acknowledged", (9, 11), by="Ada Lovelace"),
        incident("incident_created_v2", "Investigating", "active", (9, 15)),
        say(f"I follow <{RUNBOOK}>: restarting the workers does not help", (9, 17), thread=(9, 10)),
        ticket("create", "Todo", "unstarted", (9, 20)),
        say(f"Tracked in <{TICKET}>, Bo is on it", (9, 25), thread=(9, 10)),
        alert("firing", "database", "DiskWillFill", (9, 40), noise=True),
        pull("opened", (11, 0)),
        build("failed", HEAD, (11, 10)),
        review(
            "changes_requested", (11, 40),
            "The lock ends before the payment is captured, so two tabs still race.",
        ),
        other_ticket((11, 50)),
        push("bo/eng-482-voucher-once", MENDED, "Hold the voucher's lock until capture", (13, 0)),
        build("success", MENDED, (13, 10)),
        review("approved", (13, 30), "Now it holds."),
        pull("merged", (13, 40)),
        push("main", MERGED, "Count a voucher once per cart (#231)\n\nFixes ENG-482", (13, 41)),
        deployment((13, 50)),
        alert("resolved", "checkout", "HighCheckoutErrorRate", (13, 58)),
        page("incident.resolved", "resolved", (14, 0), by="Ada Lovelace"),
        crash("resolved", (14, 2)),
        say(
            "It is out and the error rate is back to normal. We decided to keep the lock of a"
            " voucher until the payment is captured.", (14, 5), thread=(9, 10),
        ),
        ticket("update", "Done", "completed", (14, 10)),
        docs_build((14, 30)),
        site((14, 40)),
        runbook((15, 0)),
        incident("incident_status_updated_v2", "Closed", "closed", (15, 30)),
    ]  # fmt: skip


def alert(
    status: str, service: str, name: str, when: tuple[int, int], *, noise: bool = False
) -> Sent:
    """An alert of Alertmanager; that of the database is Grafana's."""
    labels = {"alertname": name, "service": service, "severity": "critical", "namespace": "shop"}
    summary = f"{service} needs a look"
    annotations = {"summary": summary}
    if not noise:
        annotations = {
            "summary": "More than 5 % of checkouts fail",
            "runbook_url": RUNBOOK,
        }
    begun = iso(9, 2) if not noise else iso(*when)
    ended = iso(*when) if status == "resolved" else "0001-01-01T00:00:00Z"
    one = {
        "status": status, "labels": labels, "annotations": annotations, "startsAt": begun,
        "endsAt": ended, "fingerprint": hashlib.sha256(name.encode()).hexdigest()[:16],
        "generatorURL": "http://prometheus.acme.dev:9090/graph?g0.expr=rate&g0.tab=1",
    }  # fmt: skip
    body = {
        "version": "4" if not noise else "1", "groupKey": f"{{}}:{{alertname={name!r}}}",
        "status": status, "receiver": "baton", "groupLabels": {"alertname": name},
        "commonLabels": labels, "commonAnnotations": annotations, "alerts": [one],
        "externalURL": "http://alertmanager.acme.dev:9093",
    }  # fmt: skip
    return Sent("grafana" if noise else "alertmanager", body, noise=noise)


def page(name: str, status: str, when: tuple[int, int], by: str = "") -> Sent:
    """An incident of PagerDuty."""
    agent = {"id": "PADA", "summary": by, "type": "user_reference"} if by else None
    incident = {
        "id": "Q2LDZ8K3CHECK1", "type": "incident", "html_url": PAGE, "number": 1207,
        "status": status, "title": "Checkout: more than 5 % of requests fail", "urgency": "high",
        "service": {"id": "PCHECK", "summary": "Checkout", "type": "service_reference"},
        "assignees": [{"id": "PADA", "summary": "Ada Lovelace", "type": "user_reference"}],
        "priority": {"id": "P1ID", "summary": "P1", "type": "priority_reference"},
    }  # fmt: skip
    event = {
        "id": f"01{name}", "event_type": name, "resource_type": "incident",
        "occurred_at": iso(*when), "agent": agent, "client": None, "data": incident,
    }  # fmt: skip
    return Sent("pagerduty", {"event": event})


def crash(action: str, when: tuple[int, int]) -> Sent:
    """An issue of Sentry."""
    resolved = action == "resolved"
    details = {"inCommit": {"repository": "acme/checkout", "commit": MERGED}} if resolved else {}
    issue = {
        "id": "5120031187", "shortId": "CHECKOUT-3F", "title": "VoucherError: already redeemed",
        "culprit": "checkout.vouchers in redeem", "level": "error", "web_url": CRASH,
        "status": "resolved" if resolved else "unresolved", "statusDetails": details,
        "substatus": None if resolved else "new", "firstSeen": iso(*when), "lastSeen": iso(*when),
        "metadata": {"type": "VoucherError", "value": "already redeemed"},
        "project": {"id": "7", "name": "checkout", "slug": "checkout"},
    }  # fmt: skip
    body = {"action": action, "actor": {"type": "application"}, "data": {"issue": issue}}
    headers = {
        "sentry-hook-resource": "issue",
        "sentry-hook-timestamp": str(int(at(*when).timestamp())),
    }
    return Sent("sentry", body, headers)


def say(
    text: str,
    when: tuple[int, int],
    *,
    thread: tuple[int, int] | None = None,
    channel: str = "C0INCIDENT",
    noise: bool = False,
) -> Sent:
    """A message in Slack."""
    ts = f"{int(at(*when).timestamp())}.000100"
    event = {
        "type": "message", "channel": channel, "channel_type": "channel", "user": "U0ADA00001",
        "ts": ts, "event_ts": ts, "text": text,
        "user_profile": {"real_name": "Ada Lovelace", "display_name": "Ada"},
    }  # fmt: skip
    if thread:
        event["thread_ts"] = f"{int(at(*thread).timestamp())}.000100"
    body = {
        "type": "event_callback", "team_id": "T0ACME", "api_app_id": "A0BATON",
        "event_id": f"Ev{ts}", "event_time": int(at(*when).timestamp()), "event": event,
    }  # fmt: skip
    return Sent("slack", body, noise=noise)


def incident(name: str, status: str, category: str, when: tuple[int, int]) -> Sent:
    """An incident of incident.io."""
    state = {"category": category, "id": "01FCNDV6P8", "name": status, "rank": 1}
    made = {
        "id": "01HCHECKOUT", "reference": "INC-57", "name": "Checkouts with a voucher fail",
        "summary": f"Paged by {PAGE}", "permalink": "https://app.incident.io/acme/incidents/57",
        "incident_status": state, "severity": {"id": "01S", "name": "Major", "rank": 2},
        "incident_type": {"id": "01T", "name": "Production"}, "mode": "standard",
        "created_at": iso(9, 15), "updated_at": iso(*when), "slack_channel_id": "C0INC57",
    }  # fmt: skip
    kind = f"public_incident.{name}"
    told: dict[str, Any] = made
    if name != "incident_created_v2":
        before = {"category": "active", "name": "Monitoring"}
        told = {"incident": made, "new_status": state, "previous_status": before}
    return Sent("incident_io", {"event_type": kind, kind: told})


def ticket(action: str, state: str, kind: str, when: tuple[int, int]) -> Sent:
    """The issue in Linear."""
    data = {
        "id": "539068e2-0482", "number": 482, "identifier": "ENG-482", "url": TICKET,
        "title": "Vouchers are counted twice at checkout", "priority": 1,
        "priorityLabel": "Urgent", "branchName": "bo/eng-482-voucher-once",
        "description": f"The retry of a payment redeems the voucher again. See {CRASH} and INC-57.",
        "team": {"id": "t1", "key": "ENG", "name": "Engineering"},
        "state": {"id": f"s-{kind}", "name": state, "type": kind},
        "assignee": {"id": "u2", "name": "Bo Berg"}, "labels": [{"id": "l1", "name": "bug"}],
        "createdAt": iso(9, 20), "updatedAt": iso(*when),
    }  # fmt: skip
    return _linear(action, data, when, noise=False)


def other_ticket(when: tuple[int, int]) -> Sent:
    data = {
        "id": "539068e2-0490", "number": 490, "identifier": "ENG-490",
        "title": "Offer a dark theme in the settings", "priority": 4, "priorityLabel": "Low",
        "url": "https://linear.app/acme/issue/ENG-490/offer-a-dark-theme-in-the-settings",
        "team": {"id": "t1", "key": "ENG", "name": "Engineering"},
        "state": {"id": "s0", "name": "Backlog", "type": "backlog"},
        "createdAt": iso(*when), "updatedAt": iso(*when),
    }  # fmt: skip
    return _linear("create", data, when, noise=True)


def _linear(action: str, data: Any, when: tuple[int, int], *, noise: bool) -> Sent:
    body = {
        "action": action, "type": "Issue", "data": data, "createdAt": iso(*when),
        "actor": {"id": "u1", "type": "user", "name": "Ada Lovelace"}, "url": data["url"],
        "webhookTimestamp": int(time.time() * 1000), "webhookId": "000042e3",
        **({"updatedFrom": {"stateId": "s-unstarted"}} if action == "update" else {}),
    }  # fmt: skip
    return Sent("linear", body, {"linear-event": "Issue"}, noise=noise)


def _repository() -> dict[str, Any]:
    return {
        "id": 1, "full_name": "acme/checkout", "html_url": REPOSITORY, "default_branch": "main",
    }  # fmt: skip


def _pull(when: tuple[int, int], *, merged: bool = False) -> dict[str, Any]:
    return {
        "number": 231, "title": "Count a voucher once per cart", "user": {"login": "bo"},
        "html_url": f"{REPOSITORY}/pull/231", "state": "closed" if merged else "open",
        "body": "The retry of a payment redeemed the voucher again.\n\nFixes ENG-482",
        "head": {"ref": "bo/eng-482-voucher-once", "sha": HEAD}, "base": {"ref": "main"},
        "labels": [{"name": "bug"}], "created_at": iso(11, 0), "updated_at": iso(*when),
        "merged": merged, "merged_at": iso(*when) if merged else None,
        "closed_at": iso(*when) if merged else None, "changed_files": 2,
        "merge_commit_sha": MERGED if merged else None,
    }  # fmt: skip


def pull(verb: str, when: tuple[int, int]) -> Sent:
    """The pull request on GitHub."""
    merged = verb == "merged"
    body = {
        "action": "closed" if merged else verb, "number": 231,
        "pull_request": _pull(when, merged=merged), "repository": _repository(),
        "sender": {"login": "bo", "type": "User"},
    }  # fmt: skip
    return Sent("github", body, {"x-github-event": "pull_request"})


def review(state: str, when: tuple[int, int], said: str) -> Sent:
    body = {
        "action": "submitted", "pull_request": _pull(when), "repository": _repository(),
        "review": {
            "id": when[0] * 60 + when[1], "state": state, "body": said, "user": {"login": "ada"},
            "submitted_at": iso(*when), "html_url": f"{REPOSITORY}/pull/231#review-{when[0]}",
        },
        "sender": {"login": "ada", "type": "User"},
    }  # fmt: skip
    return Sent("github", body, {"x-github-event": "pull_request_review"})


def push(branch: str, sha: str, message: str, when: tuple[int, int]) -> Sent:
    body = {
        "ref": f"refs/heads/{branch}", "before": HEAD, "after": sha, "created": False,
        "deleted": False, "repository": _repository(), "pusher": {"name": "bo"},
        "commits": [{
            "id": sha, "message": message, "timestamp": iso(*when), "distinct": True,
            "url": f"{REPOSITORY}/commit/{sha}", "author": {"name": "Bo Berg", "username": "bo"},
            "added": [], "removed": [], "modified": ["checkout/vouchers.py"],
        }],
        "sender": {"login": "bo", "type": "User"},
    }  # fmt: skip
    return Sent("github", body, {"x-github-event": "push"})


def build(status: str, sha: str, when: tuple[int, int]) -> Sent:
    """A workflow of CircleCI."""
    body = {
        "id": f"c1-{sha[:8]}", "type": "workflow-completed", "happened_at": iso(*when),
        "project": {"id": "84996744", "name": "checkout", "slug": "github/acme/checkout"},
        "workflow": {
            "id": f"w-{sha[:8]}", "name": "build-test", "status": status,
            "created_at": iso(*when), "stopped_at": iso(*when),
            "url": f"https://app.circleci.com/pipelines/github/acme/checkout/9/workflows/w-{sha[:8]}",
        },
        "pipeline": {"id": "p9", "number": 9, "vcs": {
            "provider_name": "github", "origin_repository_url": REPOSITORY, "revision": sha,
            "target_repository_url": REPOSITORY, "branch": "bo/eng-482-voucher-once",
            "commit": {"subject": "Count a voucher once per cart", "author": {"name": "Bo Berg"}},
        }},
    }  # fmt: skip
    return Sent("circleci", body, {"circleci-event-type": "workflow-completed"})


def docs_build(when: tuple[int, int]) -> Sent:
    body = {
        "event": "build.finished",
        "build": {
            "id": "f62a1b4d", "number": 88, "state": "failed", "branch": "main",
            "message": "Reword the landing page", "creator": {"name": "Cy"},
            "web_url": "https://buildkite.com/acme/handbook/builds/88",
            "commit": "90ab90ab90ab90ab90ab90ab90ab90ab90ab90ab", "finished_at": iso(*when),
        },
        "pipeline": {"id": "849411f9", "slug": "handbook", "name": "Handbook"},
        "sender": {"name": "Cy"},
    }  # fmt: skip
    return Sent("buildkite", body, {"x-buildkite-event": "build.finished"}, noise=True)


def deployment(when: tuple[int, int]) -> Sent:
    """Production on Vercel."""
    body = {
        "id": "uev_story", "type": "deployment.succeeded",
        "createdAt": int(at(*when).timestamp() * 1000),
        "payload": {
            "deployment": {
                "id": "dpl_story", "name": "checkout", "url": "checkout-abc123.vercel.app",
                "meta": {
                    "githubCommitSha": MERGED, "githubCommitRef": "main",
                    "githubCommitMessage": "Count a voucher once per cart (#231)",
                    "githubCommitAuthorName": "Bo Berg",
                },
            },
            "links": {"deployment": "https://vercel.com/acme/checkout/dpl_story"},
            "target": "production", "project": {"id": "prj_1", "name": "checkout"},
        },
    }  # fmt: skip
    return Sent("vercel", body)


def site(when: tuple[int, int]) -> Sent:
    """A CloudEvent of a source that has no way of its own."""
    body = {
        "specversion": "1.0", "type": "com.netlify.deploy.created", "source": "/sites/handbook",
        "id": "5d65a7ab", "time": iso(*when), "datacontenttype": "application/json",
        "data": {"title": "Handbook is published", "url": "https://handbook.acme.dev"},
    }  # fmt: skip
    return Sent("netlify", body, {"content-type": "application/cloudevents+json"}, noise=True)


def runbook(when: tuple[int, int]) -> Sent:
    """The page of Notion that the alert points to."""
    body = {
        "id": "367cba44-b6f3", "timestamp": iso(*when), "workspace_id": "13950b26",
        "workspace_name": "Acme", "type": "page.content_updated",
        "authors": [{"id": "c7c11cca-1d73-471d-9b6e-bdef51470190", "type": "person"}],
        "entity": {"id": "153104cd-477e-80ec-a87d-f7ff0236d35c", "type": "page"},
        "data": {"updated_blocks": [{"id": "153104cd", "type": "block"}]},
    }  # fmt: skip
    return Sent("notion", body)
