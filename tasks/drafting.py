"""Providers that have a language model write the draft.

From a context to a completion: briefs -> a draft of each -> one draft of them all. Every answer is
checked; an unusable one is sent back with what is wrong with it, once. A vendor's SDK is loaded
here and nowhere else, and only when the provider is asked for.
"""

import asyncio
import math
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from app.schemas import AnyDraft
from app.settings import Settings
from app.tracing import Span, span
from tasks import prompts
from tasks.briefs import write_briefs
from tasks.calls import Calls
from tasks.chat import Chat, Fault, Reply, Request, open_http, outcome_of
from tasks.context import Context
from tasks.outcomes import NoResult, Outcome
from tasks.prompts import Prompt
from tasks.providers import Completion
from tasks.replies import ShortIds, Unusable, read_reply, schema_of
from tasks.tokens import estimate_tokens

ANSWER_TOKENS = 16_000  # of one answer, thinking included; a good artifact takes about 2,000
ECHO_TOKENS = 4_000  # of an unusable answer that is shown again
PARTS = 6  # briefs at most, so that a job makes 14 calls at most: parts and whole, each repaired
PARTS_AT_ONCE = 3  # of one job; the worker bounds how many jobs run
PART_ENTRIES = (60, 30, 15, 8, 4)  # of a part's list, when the parts have to fit one request
ADAPTATIONS = 5  # things that a server may refuse one after the other
EXPECTED = 6_000  # characters of an answer, after which its progress is two thirds
HARD = ("architecture_insight", "cross_source_correlation")  # kinds that take more thought

# Current when this was written: for most kinds, and for the hard ones.
DEFAULT_MODELS = {
    "openai": ("gpt-6.1-terra", "gpt-6.1-sol"),
    "anthropic": ("claude-sonnet-5-5", "claude-opus-5-5"),
}


def make_openai(settings: Settings) -> "Drafter":
    """Over any server that speaks OpenAI's Chat Completions.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    from tasks.openai_chat import OpenAIChat

    key, url = settings.openai_api_key, settings.openai_base_url
    return Drafter(OpenAIChat(api_key=key, base_url=url, http=open_http()), settings)


def make_anthropic(settings: Settings) -> "Drafter":
    """Over any server that speaks Anthropic's Messages.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    from tasks.anthropic_chat import AnthropicChat

    key, url = settings.anthropic_api_key, settings.anthropic_base_url
    return Drafter(AnthropicChat(api_key=key, base_url=url, http=open_http()), settings)


class Drafter:
    """A `tasks.providers.Provider` over a chat."""

    def __init__(self, chat: Chat, settings: Settings) -> None:
        self._chat = chat
        self._settings = settings
        # One at a time: threads that only compute take turns with the loop, which renews leases.
        self._writing = asyncio.Semaphore()

    async def complete(self, context: Context, calls: Calls) -> Completion:
        """The draft for `context.kind`, by the model that the settings name for it."""
        model, named_by = self._settings.model_for(context.kind)
        work = _Work(
            chat=self._chat,
            calls=calls,
            context=context,
            model=model or DEFAULT_MODELS[self._settings.provider][context.kind in HARD],
            named_by=named_by,
            window=self._settings.context_tokens,
            provider=self._settings.provider,
        )
        calls.use(work.model)
        async with self._writing:
            asked = await asyncio.to_thread(work.ask_about_events)
        draft = await work.draft(asked)
        return Completion(
            draft=draft,
            model=work.answered or work.model,
            prompt_tokens=work.prompt_tokens,
            completion_tokens=work.completion_tokens,
            estimated=work.estimated,
            prompt_version=prompts.VERSIONS[context.kind],
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._chat.aclose()


@dataclass(kw_only=True)
class _Work:
    """One completion in the making, and what it has taken so far."""

    chat: Chat
    calls: Calls
    context: Context
    model: str
    named_by: str  # the variable that names the model
    window: int  # tokens of one request and its answer
    provider: str  # as BATON_PROVIDER names it
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    answered: str = ""  # the model that the server says it was
    written: int = 0  # characters that came

    @property
    def answer_tokens(self) -> int:
        """The room that a request leaves for its answer."""
        return min(ANSWER_TOKENS, self.window // 4)

    @property
    def echo_tokens(self) -> int:
        """The room for an answer that is sent back."""
        return min(ECHO_TOKENS, self.window // 8)

    @property
    def budget(self) -> int:
        """The room for the data of one request."""
        return self.window - self.answer_tokens - self.echo_tokens - prompts.INSTRUCTIONS_TOKENS

    def ask_about_events(self) -> list[tuple[Prompt, ShortIds]]:
        """What to ask, and what the answers may cite: one question, or several about parts."""
        briefs = write_briefs(self.context, self.budget, parts=PARTS)
        return [
            (prompts.about_events(self.context, brief.text, part=n, parts=len(briefs)), brief.ids)
            for n, brief in enumerate(briefs, 1)
        ]

    async def draft(self, asked: Sequence[tuple[Prompt, ShortIds]]) -> AnyDraft:
        """The one draft that the answers make."""
        if len(asked) == 1:
            return await self._drafted(*asked[0], "draft")
        gate = asyncio.Semaphore(PARTS_AT_ONCE)

        async def part(prompt: Prompt, ids: ShortIds) -> AnyDraft:
            async with gate:
                return await self._drafted(prompt, ids, "part", may_be_empty=True)

        drafts = await _together(part(*one) for one in asked)
        names = _Names()
        told = [names.shortened(draft.model_dump()) for draft in drafts]
        for entries in PART_ENTRIES:
            prompt = prompts.about_parts(self.context, [_limited(each, entries) for each in told])
            if estimate_tokens(prompt.data) <= self.budget:
                break
        return await self._drafted(prompt, names.ids, "merge")

    async def _drafted(
        self, prompt: Prompt, ids: ShortIds, purpose: str, *, may_be_empty: bool = False
    ) -> AnyDraft:
        """The draft that a prompt asks for, after one repair if need be."""
        may_be_empty |= self.context.kind == "question"  # the events do not answer it
        asked, problem = prompt, ""
        for what_for in (purpose, "repair"):
            reply = await self._answered(asked, what_for)
            try:
                if reply.finish == "endless":
                    raise Unusable("it was far too long; say less")
                return read_reply(
                    reply.text, self.context.kind, ids, asked, may_be_empty=may_be_empty
                )
            except Unusable as unusable:
                whole = reply.finish == "stop"
                problem = "could not be used" if whole else "was too long"
                told = str(unusable) if whole else "it was cut off for its length; say less"
                asked = prompts.repair(prompt, self._echo(reply.text) if whole else "", told)
        raise NoResult(f"The model's answer {problem}, also when asked again.", stage="answer")

    async def _answered(self, prompt: Prompt, purpose: str) -> Reply:
        """What the model answers; what its server does not take is left out and asked again."""
        request = Request(
            model=self.model,
            prompt=prompt,
            name=self.context.kind,
            schema=schema_of(self.context.kind),
            max_tokens=self.answer_tokens,
            effort="medium" if self.context.kind in HARD else "low",
        )
        for tries_left in reversed(range(ADAPTATIONS + 1)):
            reply = Reply(told=self._wrote)
            try:
                await self._called(request, reply, purpose)
                break
            except Fault as fault:
                if not (tries_left and self.chat.adapt(request, fault)):
                    raise self._outcome(fault) from None
        if reply.finish == "refusal":
            raise NoResult("The model refused to answer.", stage="answer")
        return reply

    async def _called(self, request: Request, reply: Reply, purpose: str) -> None:
        """One call, which is told to `calls` and to the trace however it ends."""
        with span(f"chat {request.model}", "client", self._traced(request, purpose)) as told:
            await self._recorded(request, reply, purpose, told)

    def _traced(self, request: Request, purpose: str) -> dict[str, str]:
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self.provider,
            "gen_ai.request.model": request.model,
            "baton.purpose": purpose,
        }

    async def _recorded(self, request: Request, reply: Reply, purpose: str, told: Span) -> None:
        started, outcome, status = time.monotonic(), "cancelled", None
        try:
            await self.chat.ask(request, reply)
            outcome = "ok" if reply.finish == "stop" else reply.finish
        except Fault as fault:
            outcome, status = fault.how, fault.status
            if fault.how != "endless":
                raise
            reply.finish = "endless"
        finally:
            self._count(request, reply)
            told.set("gen_ai.response.model", reply.model or request.model)
            told.set("gen_ai.usage.input_tokens", reply.prompt_tokens or 0)
            told.set("gen_ai.usage.output_tokens", reply.completion_tokens or 0)
            told.set("baton.outcome", outcome)
            self.calls.record(
                model=reply.model or request.model,
                outcome=outcome,
                prompt_tokens=reply.prompt_tokens or 0,
                completion_tokens=reply.completion_tokens or 0,
                seconds=time.monotonic() - started,
                request_id=reply.request_id,
                status=status or reply.status,
                purpose=purpose,
            )

    def _count(self, request: Request, reply: Reply) -> None:
        """Add what a call took. When the server took the prompt and did not tell, or was cut off
        before it could, it is an estimate: nothing would be less true."""
        if reply.status == 200 and reply.prompt_tokens is None:
            asked = request.prompt
            reply.prompt_tokens = estimate_tokens(asked.instructions + asked.data)
            self.estimated = True
        if reply.status == 200 and reply.completion_tokens is None:
            reply.completion_tokens = estimate_tokens(reply.text)
            self.estimated = True
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.answered = reply.model or self.answered

    def _wrote(self, characters: int) -> None:
        """Move the progress, ever slower: nobody knows how long the answer will be."""
        before, self.written = self.written, self.written + characters
        if before // 200 != self.written // 200:
            share = 1 - math.exp(-self.written / EXPECTED)
            self.calls.report(
                round(0.2 + 0.65 * share, 3), "generating", f"{self.written} characters written"
            )

    def _echo(self, text: str) -> str:
        """An answer as far as there is room to show it again."""
        return text if estimate_tokens(text) <= self.echo_tokens else ""

    def _outcome(self, fault: Fault) -> Outcome:
        return outcome_of(
            fault, self.chat, model=self.model, named_by=self.named_by, window=self.window
        )


class _Names:
    """Short ids for what the drafts of parts cite, so that another request can cite it too."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # by event id

    @property
    def ids(self) -> ShortIds:
        return {name: (id,) for id, name in self._names.items()}

    def shortened(self, value: Any) -> Any:
        """The value with short ids in place of event ids."""
        if isinstance(value, list):
            return [self.shortened(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: [self._names.setdefault(id, f"e{len(self._names) + 1}") for id in part]
            if key == "event_ids"
            else self.shortened(part)
            for key, part in value.items()
        }


def _limited(draft: dict[str, Any], entries: int) -> dict[str, Any]:
    """A draft with its lists cut to their first entries."""
    return {k: v[:entries] if isinstance(v, list) else v for k, v in draft.items()}


async def _together(makers: Iterable[Coroutine[Any, Any, AnyDraft]]) -> list[AnyDraft]:
    """All results; when one fails, the others are stopped, for they cost money."""
    tasks = [asyncio.create_task(maker) for maker in makers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
