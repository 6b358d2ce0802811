"""A provider that does what an event's title says and notes every call.

Each job of the suite has an event of its own: `resource` is the job's tag, `title` its script. A
script is a line of steps, `verb=argument@call`: `sleep=30@1 exit@2` sleeps in the first call, ends
the process in the second and does neither in the third. One rule: a call is noted before its first
step, in a file of the job's own, so that a process that dies in the middle has been counted.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

from app.schemas import HandoffDraft, Statement
from tasks.calls import Calls
from tasks.context import Context
from tasks.outcomes import GenerationFailed, Retry
from tasks.providers import Completion

CALLS = "CHAOS_CALLS"  # names the folder of the notes
DOWN = "provider_down"  # a file beside that folder: while it is there, every call fails


class Scripted:
    """For `BATON_PROVIDER=chaos.provider:Scripted`."""

    def __init__(self) -> None:
        self._calls = Path(os.environ[CALLS])

    async def complete(self, context: Context, calls: Calls) -> Completion:
        """Follow the script of the newest event, then answer a draft about it."""
        event = context.events[0]
        path = self._calls / str(event.resource)
        number = 1 + (path.read_text().count('"start"') if path.exists() else 0)
        note(path, "start", number)
        text = "It happened."
        try:
            if (self._calls.parent / DOWN).exists():
                raise Retry("Down.", meta={"provider_status": 503})
            for step in event.title.split():
                verb, _, call = step.partition("@")
                if not call or int(call) == number:
                    text = await _follow(*verb.partition("=")[::2], number) or text
        except BaseException as error:
            note(path, type(error).__name__, number)
            raise
        note(path, "end", number)
        said = Statement(text=text, event_ids=[event.id])
        return Completion(
            draft=HandoffDraft(
                title="Handoff",
                summary=said,
                key_changes=[said],
                decisions=[],
                open_questions=[],
                next_steps=[],
            ),
            model="scripted",
        )


def note(path: Path, what: str, number: int) -> None:
    """Append a line; one write to a file opened for appending is whole, whoever else writes."""
    line = json.dumps(
        {
            "what": what,
            "call": number,
            "pid": os.getpid(),
            "parent": os.getppid(),
            "monotonic": time.monotonic(),
        }
    )
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode() + b"\n")
    finally:
        os.close(file)


async def _follow(verb: str, argument: str, number: int) -> str | None:
    """One step; answers a text when the draft shall have it."""
    match verb:
        case "sleep":
            await asyncio.sleep(float(argument))
        case "hang":
            await asyncio.Event().wait()
        case "block":
            time.sleep(float(argument))  # on the event loop: that is the fault
        case "nul":
            return "It\0happened."
        case "huge":
            return "x" * int(argument)
        case _:
            _fail(verb, argument, number)
    return None


def _fail(verb: str, argument: str, number: int) -> None:
    match verb:
        case "exit":
            os._exit(9)
        case "segv":
            ctypes.string_at(0)
        case "kill":  # as the kernel does when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            raise MemoryError
        case "fail":
            raise GenerationFailed("The script says so.", provider_status=400)
        case "retry":  # times:status:seconds
            times, status, after = argument.split(":")
            if number <= int(times):
                raise Retry(
                    "Busy.",
                    after=float(after) if after else None,
                    meta={"provider_status": int(status)},
                )
        case _:
            sys.exit(f"no such step: {verb}")
