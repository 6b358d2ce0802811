"""Who is calling, and which project they may see.

A key is `fr_` and 32 random bytes as base64url. The one rule: missing, malformed, unknown and
revoked keys get the same 401, and what cannot be a key never reaches the database.
"""

import hashlib
import re
from collections.abc import Sequence

from starlette.requests import Request

from app.errors import ApiError, Gone, Unauthorized
from app.limits import Policy, admit
from app.wire import known_id, not_found

_BEARER = re.compile(r"(?i:bearer) +(fr_[A-Za-z0-9_-]{43})", re.ASCII)


async def authenticate(request: Request, policies: Sequence[Policy]) -> str:
    """The id of the user that the request's key acts for; counts the request in `policies`.

    Raises:
        Unauthorized: in one wording, whatever is wrong with the key.
        RateLimited: the key is good and has been used too often.
    """
    bearer = _BEARER.fullmatch(request.headers.get("authorization", "").strip())
    if bearer:
        digest = hashlib.sha256(bearer[1].encode()).digest()
        user_id = await admit(request, digest, policies)
        if user_id is not None:
            return user_id
    raise unauthorized()


def unauthorized() -> Unauthorized:
    """The one answer to whatever is wrong with a key."""
    return Unauthorized("Send a valid API key as 'Authorization: Bearer fr_…'.")


async def visible_project(request: Request, project_id: str) -> str:
    """The project's id, when the caller may see it.

    Raises:
        NotFound: unknown, foreign or malformed; nobody can tell which.
    """
    known_id(project_id, "project_id")
    await request.app.state.database.value("assert_project", request.state.user_id, project_id)
    return project_id


async def missing_job(request: Request, job_id: str) -> ApiError:
    """What to raise for a job that is not there: `Gone` if the caller could see it once."""
    if await request.app.state.database.value("is_deleted", request.state.user_id, job_id):
        return Gone("This job is gone: it has been deleted, or its time was over.")
    return not_found("job_id")
