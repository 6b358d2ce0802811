"""Asks a running API everything that its document allows, and much that it does not: schemathesis.

    python tests/fuzz.py http://127.0.0.1:8000 fr_… PROJECT_ID [EXAMPLES [SEED]]

Prints what contradicts the document, and exits 1 if anything does. tests/test_fuzz.py runs it with
few examples; by hand it takes as many as one has patience for. The server must have no limits
(BATON_LIMITS), and a worker.
"""

import itertools
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from schemathesis import Case, HookContext, Response, SerializationContext
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.engine import Status, from_schema
from schemathesis.engine import events as told
from schemathesis.openapi.checks import RejectedPositiveData

NDJSON = "application/x-ndjson"

# What JSON Schema cannot say of a request, so that one which fits the schema is refused: only with
# these sentences.
UNTOLD = re.compile(
    r"must not contain NUL characters"
    r"|there is no source named "  # the vocabulary is a table, which an operator can add to
    r"|has no (branches|priorities)"  # of which each source has other dimensions
    r"|must name a source with code"
    r"|must be the next_cursor of an earlier answer"
    r"|give exactly one of job_id, webhook_id and project_id"
    r"|is required, as a query parameter or in each line"
    r"|must be the same in all lines"
    r"|this key was used for another request"
    r"|give exactly one of content, handoff_id, insight_id and artifact"
    r"|is required with artifact"
    r"|is not connected"  # by any integration
)


def config(base_url: str, key: str, project_id: str, examples: int, seed: int) -> dict[str, Any]:
    """All phases and all checks."""
    return {
        "base-url": base_url,
        "seed": seed,
        "workers": 1,
        "continue-on-failure": True,
        "max-failures": 20,
        "request-timeout": 30.0,
        "warnings": False,
        "auth": {"openapi": {"key": {"bearer": key}}},
        "checks": {
            "enabled": True,
            # 410: a job that it has deleted before. 414: together the parameters are too long.
            "positive_data_acceptance": {
                "expected-statuses": ["2xx", "3xx", 404, 409, 410, 414],
            },
            "negative_data_rejection": {
                "expected-statuses": [400, 401, 404, 405, 409, 410, 414, 415, 422],
            },
        },
        "generation": {"max-examples": examples, "deterministic": False, "no-shrink": True},
        # Among many unknown projects also the one that there is.
        "dictionaries": {"project": {"values": [project_id]}},
        "parameters": {
            f"{place}.project_id": {"dictionary": "project", "probability": 0.8}
            for place in ("path", "query")
        },
    }


def described(base_url: str) -> dict[str, Any]:
    """The document, telling of NDJSON what OpenAPI 3.1 has no word for: the type of a line."""
    document: dict[str, Any] = httpx.get(f"{base_url}/openapi.json", trust_env=False).json()
    body = document["paths"]["/api/v1/events"]["post"]["requestBody"]
    line = {"$ref": "#/components/schemas/EventInput"}
    body["content"][NDJSON] = {"schema": {"type": "array", "minItems": 1, "items": line}}
    return document


@schemathesis.serializer(NDJSON)
def ndjson(context: SerializationContext, value: Any) -> Any:
    """Each item on a line."""
    items = value if isinstance(value, list) else [value]
    return b"\n".join(json.dumps(item).encode() for item in items)


_used: set[tuple[str, str]] = set()
_waits = itertools.cycle(range(10))


@schemathesis.hook
def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
    """Use no idempotency key twice: that is refused, as no schema can tell. And wait seldom."""
    headers = case.headers
    if headers.get("Prefer") == "wait=10" and next(_waits):
        headers["Prefer"] = "respond-async"
    if "Idempotency-Key" in headers and case.meta and case.meta.generation.mode.is_positive:
        named = (case.operation.label, str(headers["Idempotency-Key"]))
        if named in _used:
            headers["Idempotency-Key"] = secrets.token_hex(8)
        _used.add(named)


@schemathesis.hook
def filter_failure(
    context: HookContext, failure: Failure, case: Case[Any], response: Response
) -> bool:
    """Leave out what is refused as it should be."""
    if isinstance(failure, RejectedPositiveData) and response.status_code in (400, 403, 422):
        return not UNTOLD.search(response.json()["error"])
    return True


def run(base_url: str, key: str, project_id: str, examples: int, seed: int) -> Iterator[str]:
    """What contradicts the document, each as a text."""
    made = SchemathesisConfig.from_dict(config(base_url, key, project_id, examples, seed))
    schema = schemathesis.openapi.from_dict(described(base_url), config=made)
    answers: Counter[int] = Counter()
    for event in from_schema(schema).execute():
        match event:
            case told.ScenarioFinished():
                recorder = event.recorder
                answers.update(
                    each.response.status_code
                    for each in recorder.interactions.values()
                    if each.response
                )
                for case_id, checks in recorder.checks.items():
                    for check in checks:
                        if check.status == Status.FAILURE and check.failure_info:
                            yield f"{event.phase.value}: {recorder.label}: {check.name}\n" + shown(
                                check.failure_info, recorder.find_response(case_id=case_id)
                            )
            case told.NonFatalError():
                yield f"{event.label}: {event.info.format()}"
            case told.FatalError():
                raise event.exception
    print(f"{answers.total()} requests: {dict(sorted(answers.items()))}")


def shown(failed: Any, response: Response | None) -> str:
    """What is wrong, how to ask so again, and what the answer was."""
    answer = f"{response.status_code} {response.text[:500]}" if response else "no answer"
    return f"{failed.failure.title}: {failed.failure.message}\n{failed.code_sample}\n-> {answer}"


def main() -> None:
    """Run it; see the top."""
    base_url, key, project_id, *numbers = sys.argv[1:]
    examples, seed = [*map(int, numbers), *(10, 1)[len(numbers) :]]
    found = 0
    for text in run(base_url, key, project_id, examples, seed):
        found += 1
        print(text, end="\n\n", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
