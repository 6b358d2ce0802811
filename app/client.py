"""The command line as a client of Baton's API: it asks, polls as the documentation advises, and
knows nothing that any other client could not know."""

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx

WAIT = 120.0  # seconds that a client is told to wait for a job
POLL_AFTER = 2.0  # seconds between polls when the server does not say


class RequestFailed(Exception):
    """The API refused or could not be reached; the message is a sentence for a person.

    `retry_after` is in seconds, and None when asking again would not help. `job_id` is of the job
    that goes on all the same, if there is one.
    """

    def __init__(
        self, sentence: str, retry_after: float | None = None, job_id: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after
        self.job_id = job_id


class Client:
    """One API key at one base URL; `on_wait` is told how many seconds a limit makes it wait."""

    def __init__(
        self, base_url: str, key: str, on_wait: Callable[[int], None] = lambda seconds: None
    ) -> None:
        self._on_wait = on_wait
        self._http = httpx.Client(
            base_url=base_url,
            headers={"Authorization": f"Bearer {key}", "User-Agent": "baton-cli"},
            timeout=30,
            trust_env=False,
        )

    def projects(self) -> list[dict[str, Any]]:
        """The projects that the key may see."""
        listed: list[dict[str, Any]] = self._call("GET", "/api/v1/projects").json()["projects"]
        return listed

    def request_handoff(self, body: dict[str, Any]) -> str:
        """Ask for a handoff; answer the job's id."""
        return str(self._call("POST", "/api/v1/handoffs", json=body).json()["jobId"])

    def ask(
        self, project_id: str, question: str, on_poll: Callable[[str], None]
    ) -> tuple[str, list[str]]:
        """The answer to a question, as Markdown when it cites events, and those citations.

        Raises:
            RequestFailed: it cannot be answered, or is not after `WAIT`.
        """
        path = f"/api/v1/projects/{project_id}/qa"
        asked = {"json": {"question": question}, "headers": {"Idempotency-Key": str(uuid4())}}
        try:
            response = self._call("POST", path, **asked)
        except RequestFailed as failed:
            if failed.job_id is None:
                raise
            self.wait(failed.job_id, on_poll)
            response = self._call("POST", path, **asked)
        answer = response.json()
        if not answer["citations"]:
            return str(answer["answer"]), []
        job = self._call("GET", f"/api/v1/jobs/{job_of(response)}").json()
        return str(job["result"]["markdown"]), answer["citations"]

    def wait(self, job_id: str, on_poll: Callable[[str], None]) -> dict[str, Any]:
        """Poll a job until it has ended; `on_poll` sees each status.

        Raises:
            RequestFailed: the job is not done after `WAIT`.
        """
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            response = self._call("GET", f"/api/v1/jobs/{job_id}")
            body: dict[str, Any] = response.json()
            on_poll(body["job"]["status"])
            if body["job"]["status"] in ("completed", "failed"):
                return body
            time.sleep(float(response.headers.get("retry-after", POLL_AFTER)))
        raise RequestFailed(f"The job {job_id} is not done after {WAIT:.0f} s; it goes on.")

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                response = self._http.request(method, path, **options)
            except httpx.HTTPError as error:
                raise unreachable(self._http.base_url, error) from None
            after = response.headers.get("retry-after", "")
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS or not after.isdigit():
                break
            if time.monotonic() + int(after) > deadline:
                break
            self._on_wait(int(after))
            time.sleep(int(after))  # a 429 has done nothing, so nothing is done twice
        return checked(response)


def checked(response: httpx.Response) -> httpx.Response:
    """The response, when it is a success or says that nothing has changed.

    Raises:
        RequestFailed: with the sentence of the API.
    """
    if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
        return response
    try:
        sentence = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        sentence = f"{response.request.url.host} answered {response.status_code}."
    after = response.headers.get("Retry-After", "")
    raise RequestFailed(sentence, float(after) if after.isdigit() else None, job_of(response))


def job_of(response: httpx.Response) -> str | None:
    """The id of the job behind an answer to a question, or behind one that is not there yet."""
    path = response.headers.get("Operation-Location") or response.headers.get("Location", "")
    return path.rpartition("/jobs/")[2] if "/jobs/" in path else None


def unreachable(base_url: httpx.URL, error: httpx.HTTPError) -> RequestFailed:
    """There was no answer; it may come back."""
    sentence = f"{base_url} cannot be reached: {str(error) or type(error).__name__}."
    return RequestFailed(sentence, POLL_AFTER)


def is_baton(base_url: str) -> bool:
    """Does a Baton listen there?"""
    try:
        answer = httpx.get(f"{base_url}/healthz", timeout=2, trust_env=False)
        return bool(answer.is_success and answer.json() == {"status": "ok"})
    except (httpx.HTTPError, ValueError):
        return False


def is_ready(base_url: str) -> bool:
    """Does it answer, with its database and a current schema?"""
    try:
        return httpx.get(f"{base_url}/readyz", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False
