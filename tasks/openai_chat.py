"""OpenAI's Chat Completions, of OpenAI and of the many servers that speak the same."""

from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai

from tasks.chat import TIMEOUT, Fault, Finish, Reply, Request, Traits, fault_of, read_stream
from tasks.prompts import with_schema

TEMPERATURE = 0.2  # the same events should read much the same tomorrow
HOME = "api.openai.com"

# What may be left out, and the words that a server refuses it with; the order is that of trying.
_OPTIONAL = {
    "max_completion_tokens": ("max_completion_tokens",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
    "effort": ("reasoning_effort", "reasoning effort", "reasoning.effort"),
    "schema": ("response_format", "json_schema", "response format", "structured output"),
    "json": ("response_format", "json_object", "response format"),
    "usage": ("stream_options", "include_usage"),
}
_FINISH: dict[str, Finish] = {"length": "length", "content_filter": "refusal"}


class OpenAIChat:
    """See `tasks.chat.Chat`.

    Args:
        api_key: None for a server that needs none.
        base_url: None for OpenAI's own.
    """

    key = "OPENAI_API_KEY"
    url = "OPENAI_BASE_URL"

    def __init__(
        self, *, api_key: str | None, base_url: str | None, http: httpx2.AsyncClient
    ) -> None:
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none",
            base_url=base_url,
            timeout=TIMEOUT,
            max_retries=0,
            http_client=http,
        )
        self._traits = Traits(_OPTIONAL)
        # OpenAI renamed it; others know the old name, and some ignore the new one, which bounds
        # nothing.
        at_home = base_url is None or urlsplit(base_url).hostname == HOME
        self._limit = "max_completion_tokens" if at_home else "max_tokens"

    async def ask(self, request: Request, reply: Reply) -> None:
        """Stream a completion."""
        try:
            answer = await self._client.chat.completions.create(**self._body(request))
        except openai.APIStatusError as error:
            reply.status, reply.request_id = error.status_code, error.request_id
            raise fault_of(error.status_code, error.response.headers, body=error.body) from None
        except openai.APITimeoutError:
            raise Fault("timeout") from None
        except openai.APIConnectionError:
            raise Fault("connection") from None
        async with answer:
            reply.status = answer.response.status_code
            reply.request_id = answer.response.headers.get("x-request-id")
            await read_stream(answer.response, reply, _take)

    def adapt(self, request: Request, fault: Fault) -> bool:
        """Leave out what the server refused, or name it as it wants."""
        return self._traits.learn(request.model, fault, self._sent(request.model))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _sent(self, model: str) -> tuple[str, ...]:
        """What a request to the model holds that may be left out."""

        def taken(what: str) -> bool:
            return not self._traits.lacks(model, what)

        other = "max_tokens" if self._limit == "max_completion_tokens" else "max_completion_tokens"
        limit = self._limit if taken(self._limit) else other
        form = "schema" if taken("schema") else "json"
        sent = (limit, "temperature", "effort", form, "usage")
        return tuple(what for what in sent if taken(what))

    def _body(self, request: Request) -> dict[str, Any]:
        sent = self._sent(request.model)
        prompt = request.prompt if "schema" in sent else with_schema(request.prompt, request.schema)
        schema = {"name": request.name, "schema": request.schema, "strict": True}
        optional: dict[str, dict[str, Any]] = {
            "max_completion_tokens": {"max_completion_tokens": request.max_tokens},
            "max_tokens": {"max_tokens": request.max_tokens},
            "temperature": {"temperature": TEMPERATURE},
            "effort": {"reasoning_effort": request.effort},
            "schema": {"response_format": {"type": "json_schema", "json_schema": schema}},
            "json": {"response_format": {"type": "json_object"}},
            "usage": {"stream_options": {"include_usage": True}},
        }
        extra: dict[str, Any] = {}
        for what in sent:
            extra |= optional[what]
        return {
            "model": request.model,
            "messages": [
                {"role": "system", "content": prompt.instructions},
                {"role": "user", "content": prompt.data},
            ],
            "stream": True,
            "extra_body": extra,  # as it is: the SDK would walk through the schema each time
        }


def _take(event: dict[str, Any], reply: Reply) -> None:
    """One piece of the stream; servers differ in what they leave out."""
    if event.get("error"):
        raise _inside(event["error"])
    reply.model = event.get("model") or reply.model
    usage = event.get("usage")
    if usage:
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.completion_tokens = usage["completion_tokens"]
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if delta.get("refusal"):
            reply.finish = "refusal"
        if delta.get("content"):
            reply.add(delta["content"])
        if choice.get("finish_reason") and reply.finish != "refusal":
            reply.finish = _FINISH.get(choice["finish_reason"], "stop")


def _inside(error: Any) -> Fault:
    """An error that came as an event of a stream; some servers put the status into its code."""
    code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
    status = int(code) if code.isdigit() and 400 <= int(code) < 600 else 500
    if "rate_limit" in code or "insufficient_quota" in code:
        status = 429
    return fault_of(status, {}, body={"error": error}, code=code)
