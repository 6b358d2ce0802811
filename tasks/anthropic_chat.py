"""Anthropic's Messages."""

from typing import Any

import anthropic
import httpx2
import orjson

from tasks.chat import TIMEOUT, Fault, Finish, Reply, Request, Traits, fault_of, read_stream
from tasks.prompts import with_schema

# What may be left out, and the words that a server refuses it with. Newer models refuse a forced
# tool; they take a schema for the output instead.
_OPTIONAL = {
    "tool": ("tool_choice", "forced tool", "tools"),
    "schema": ("output_config.format", "output_config: format", "structured output", "json_schema"),
    "effort": ("effort", "output_config"),
}
_FINISH: dict[str, Finish] = {
    "max_tokens": "length",
    "refusal": "refusal",
    "model_context_window_exceeded": "length",
}
_STATUS = {  # of an error inside a stream
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class AnthropicChat:
    """See `tasks.chat.Chat`. The SDK has no temperature any more; the models choose their own.

    Args:
        api_key: None for a server that needs none.
        base_url: None for Anthropic's own.
    """

    key = "ANTHROPIC_API_KEY"
    url = "ANTHROPIC_BASE_URL"

    def __init__(
        self, *, api_key: str | None, base_url: str | None, http: httpx2.AsyncClient
    ) -> None:
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key or "none",
            base_url=base_url,
            timeout=TIMEOUT,
            max_retries=0,
            http_client=http,
            open_telemetry=False,
        )
        self._traits = Traits(_OPTIONAL)

    async def ask(self, request: Request, reply: Reply) -> None:
        """Stream a message."""
        try:
            answer = await self._client.messages.create(**self._body(request))
        except anthropic.APIStatusError as error:
            reply.status, reply.request_id = error.status_code, error.request_id
            headers = error.response.headers
            raise fault_of(
                error.status_code, headers, body=error.body, code=error.error_code
            ) from None
        except anthropic.APITimeoutError:
            raise Fault("timeout") from None
        except anthropic.APIConnectionError as error:
            if isinstance(error.__cause__, Fault):  # the SDK takes ours for the network's
                raise error.__cause__ from None
            raise Fault("connection") from None
        async with answer:
            reply.status = answer.response.status_code
            reply.request_id = answer.response.headers.get("request-id")
            await read_stream(answer.response, reply, _take)

    def adapt(self, request: Request, fault: Fault) -> bool:
        """Leave out what the server refused."""
        return self._traits.learn(request.model, fault, self._sent(request.model))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _sent(self, model: str) -> tuple[str, ...]:
        """What a request to the model holds that may be left out."""
        form = "schema" if self._traits.lacks(model, "tool") else "tool"
        return tuple(what for what in (form, "effort") if not self._traits.lacks(model, what))

    def _body(self, request: Request) -> dict[str, Any]:
        sent = self._sent(request.model)
        held = "tool" in sent or "schema" in sent
        prompt = request.prompt if held else with_schema(request.prompt, request.schema)
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_tokens,
            "system": prompt.instructions,
            "messages": [{"role": "user", "content": prompt.data}],
            "stream": True,
        }
        output: dict[str, Any] = {"effort": request.effort} if "effort" in sent else {}
        if "schema" in sent:
            output["format"] = {"type": "json_schema", "schema": request.schema}
        if "tool" in sent:
            tool = {"name": request.name, "input_schema": request.schema}
            body["tools"] = [{**tool, "description": "Takes the finished object."}]
            body["tool_choice"] = {
                "type": "tool",
                "name": request.name,
                "disable_parallel_tool_use": True,
            }
        return {**body, "output_config": output} if output else body


def _take(event: dict[str, Any], reply: Reply) -> None:
    """One event of the stream: the text of a message, or the input of the tool."""
    match event.get("type"):
        case "error":
            status = _STATUS.get(event["error"].get("type"), 500)
            raise fault_of(status, {}, body=event)
        case "message_start":
            reply.model = event["message"].get("model")
            _count(event["message"].get("usage"), reply)
        case "content_block_start":
            block = event["content_block"]
            if block["type"] == "tool_use" and block.get("input"):  # all at once, as some have it
                reply.add(orjson.dumps(block["input"]).decode())
        case "content_block_delta":
            delta = event["delta"]
            if delta["type"] in ("input_json_delta", "text_delta"):
                reply.add(delta.get("partial_json") or delta.get("text") or "")
        case "message_delta":
            reason = event["delta"].get("stop_reason")
            if reason:
                reply.finish = _FINISH.get(reason, "stop")
            _count(event.get("usage"), reply)


def _count(usage: dict[str, Any] | None, reply: Reply) -> None:
    """The counts are cumulative; what came from a cache was read all the same."""
    usage = usage or {}
    if usage.get("input_tokens") is not None:
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        reply.prompt_tokens = sum(usage.get(name) or 0 for name in names)
    if usage.get("output_tokens") is not None:
        reply.completion_tokens = usage["output_tokens"]
