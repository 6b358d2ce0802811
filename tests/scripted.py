"""A provider that does what the newest event's title says; for BATON_PROVIDER=scripted:Scripted."""

import asyncio
import ctypes
import os
from typing import Any

from tasks.calls import Calls
from tasks.context import Context
from tasks.outcomes import NoResult, Retry
from tasks.providers import Completion, Extractive

CALL: dict[str, Any] = {
    "model": "m",
    "outcome": "ok",
    "prompt_tokens": 1_000,
    "completion_tokens": 200,
    "seconds": 1.5,
    "request_id": "req_1",
    "status": 200,
    "purpose": "draft",
}


class Scripted(Extractive):
    """`exit`, `quit`, `segv`, `call and segv`, `hang`, `retry`, `fail`, `raise`, `print` as titles;
    else it extracts."""

    async def complete(self, context: Context, calls: Calls) -> Completion:
        """Follow the script, then extract."""
        match context.events[0].title:
            case "exit":
                os._exit(9)
            case "quit":
                os._exit(0)
            case "call and segv":
                calls.report(0.5, "generating", "half of it")
                calls.record(**CALL)
                ctypes.string_at(0)
            case "segv":
                ctypes.string_at(0)
            case "hang":
                await asyncio.Event().wait()
            case "retry":
                raise Retry("Busy.", after=7.0, meta={"provider_status": 429})
            case "fail":
                raise NoResult("Nothing usable came back.")
            case "raise":
                raise KeyError("what an event says")
            case "print":
                print("a library that talks")
        return await super().complete(context, calls)
