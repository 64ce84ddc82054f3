"""The ASGI application: paths, the guard before them, and errors in the dialect of each path."""

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .anthropic_messages import CountBody, Messages
from .anthropic_messages import error_body as anthropic_error
from .backend import Backend
from .bodies import IGNORED_HEADER, ignored_fields, ignored_header, read_object
from .chat_completions import ChatCompletions
from .endpoint import Endpoint, client_name, error_response, until_gone
from .errors import ClientGone, RequestError
from .guard import Guard, GuardMiddleware
from .metrics import Metrics
from .openai_input import error_body as openai_error
from .openai_input import now
from .responses import Responses
from .text_completions import TextCompletions

# how `qchat launch` tells this server from another program
PROGRAM = "qchat"
ANTHROPIC_PATHS = "/v1/messages"


def make_app(backend: Backend, guard: Guard) -> Starlette:
    """Return the application that answers with `backend` whom `guard` lets in."""
    metrics = Metrics(backend)
    messages = Messages()

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(backend)]})

    async def model(request: Request) -> Response:
        return JSONResponse({**_model_object(backend), "id": request.path_params["name"]})

    async def health(_: Request) -> Response:
        ready = backend.source.ready
        return JSONResponse(
            {"status": "ok" if ready else "loading"}, 200 if ready else 503, headers={"server": PROGRAM}
        )

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def count_tokens(request: Request) -> Response:
        return await _count(request, backend, messages)

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", Endpoint(backend, ChatCompletions()), methods=["POST"]),
        Route("/v1/completions", Endpoint(backend, TextCompletions()), methods=["POST"]),
        Route("/v1/responses", Endpoint(backend, Responses()), methods=["POST"]),
        Route("/v1/messages", Endpoint(backend, messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", show_metrics),
    ]
    handlers: dict[Any, Any] = {
        HTTPException: _refuse_http,
        RequestError: _refuse_request,
        ClientGone: _forget_client,
        Exception: _refuse_internal,
    }
    return Starlette(routes=routes, middleware=_middleware(guard), exception_handlers=handlers)


def _middleware(guard: Guard) -> Sequence[Middleware]:
    found: list[Middleware] = []
    if guard.origins:
        allowed = Middleware(
            CORSMiddleware,
            allow_origins=list(guard.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[IGNORED_HEADER, "retry-after"],
        )
        found.append(allowed)
    return [*found, Middleware(GuardMiddleware, guard=guard, refuse=_error_response)]


def _model_object(backend: Backend) -> dict[str, Any]:
    model = backend.source.model
    limit = model.context_limit if model else 0
    about = {"object": "model", "created": now(), "owned_by": "local", "type": "model"}
    return {"id": backend.model_name, "display_name": backend.model_name, "context_length": limit, **about}


async def _count(request: Request, backend: Backend, messages: Messages) -> Response:
    body = await read_object(request)
    completion = messages.read_count(body, backend)
    counting = backend.count(completion, client_name(request, ""), request.url.path)
    tokens = await until_gone(request.receive, counting)
    headers = ignored_header(ignored_fields(body, CountBody))
    return JSONResponse({"input_tokens": tokens}, headers=headers)


def _error_response(path: str, error: RequestError) -> Response:
    body = anthropic_error(error) if path.startswith(ANTHROPIC_PATHS) else openai_error(error)
    return error_response(body, error)


async def _refuse_request(request: Request, error: RequestError) -> Response:
    return _error_response(request.url.path, error)


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    sentences = {
        404: f"there is nothing at {request.url.path[:80]}",
        405: f"{request.method} is not served here",
    }
    found = RequestError(error.status_code, sentences.get(error.status_code, error.detail))
    return _error_response(request.url.path, found)


async def _refuse_internal(request: Request, error: Exception) -> Response:
    found = RequestError(500, f"an internal error ({type(error).__name__}) ended this request")
    return _error_response(request.url.path, found)


async def _forget_client(request: Request, error: ClientGone) -> Response:
    del request, error
    return Response(status_code=499)  # nobody reads it
