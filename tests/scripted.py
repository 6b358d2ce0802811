"""A provider that does what the newest event's title says; for BATON_PROVIDER=scripted:Scripted."""

import asyncio
import ctypes
import os

from tasks.context import Context
from tasks.outcomes import NoResult, Retry
from tasks.providers import Completion, Extractive


class Scripted(Extractive):
    """`exit`, `segv`, `hang`, `retry`, `fail`, `raise`, `print` in a title; else it extracts."""

    async def complete(self, context: Context) -> Completion:
        """Follow the script, then extract."""
        match context.events[0].title:
            case "exit":
                os._exit(9)
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
        return await super().complete(context)
