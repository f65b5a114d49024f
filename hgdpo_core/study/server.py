"""The study's page and what it asks for: questions one at a time, images by trial, answers.

The page loads nothing from elsewhere and runs no script but its own file. A participant is a random code in a cookie
that no script can read. No address and no name is stored or logged; models are named nowhere.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, StorageError, first_line
from hgdpo_core.storage import scratch_folder
from hgdpo_core.study.limits import (
    LOOPBACK,
    RateLimit,
    RefusedRequestError,
    check_host,
    check_origin,
    read_body,
    same_text,
)
from hgdpo_core.study.session import (
    ChangedMeanwhileError,
    FullStudyError,
    Participant,
    StudySession,
    UnknownTrialError,
)
from hgdpo_core.study.study import Study, StudyImages
from hgdpo_core.study.votes import Choice

STATIC = Path(__file__).parent / "static"
FILES = {"/": ("index.html", "text/html"), "/study.js": ("study.js", "text/javascript"),
         "/study.css": ("study.css", "text/css"), "/icon.svg": ("icon.svg", "image/svg+xml")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin"}
COOKIE_SECONDS = 180 * 86_400
MOVE_SECONDS = 10.0
LONGEST_MS = 3_600_000
LEAST_ACCESS_CODE = 6

logger = logging.getLogger(__name__)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JoinBody(_Body):
    """Taking part. `consent` stands for having read what the page says."""

    consent: Literal[True]
    access_code: str = Field(default="", max_length=200)


class ResumeBody(_Body):
    """Going on with a code from an earlier visit."""

    code: str = Field(min_length=1, max_length=64)


class AnswerBody(_Body):
    """An answer, or the correction of the last one."""

    trial: str = Field(pattern=r"^[0-9a-f]{32}$")
    choice: Choice
    revision: int = Field(ge=0, le=1000)
    ms: int = Field(ge=0, le=LONGEST_MS)


class WithdrawBody(_Body):
    """Deleting one's answers."""

    withdraw: Literal[True]


@dataclass
class StudyServer:
    """What the routes share."""

    session: StudySession
    images: StudyImages
    access_code: str | None = None
    loopback_only: bool = True
    answers: RateLimit = field(default_factory=lambda: RateLimit(5, 20))
    reads: RateLimit = field(default_factory=lambda: RateLimit(20, 100))
    joins: RateLimit = field(default_factory=lambda: RateLimit(20, 400))
    """Of all visitors together: they have no code yet."""
    wrong_codes: RateLimit = field(default_factory=lambda: RateLimit(1, 30))

    @property
    def study(self) -> Study:
        return self.session.study

    @property
    def cookie(self) -> str:
        """Its name: servers of two studies on one machine share a browser's cookies."""
        return f"study-{content_hash({'study': self.study.id})}"

    def participant(self, request: Request, limit: RateLimit) -> Participant:
        """Who asks; RefusedRequestError for a visitor who has not joined, and for one who asks too often."""
        participant = self.session.find(request.cookies.get(self.cookie))
        if participant is None:
            raise RefusedRequestError(401, "you have not joined this study in this browser: load the page again")
        limit.take(participant.id)
        return participant

    def state(self, participant: Participant | None, code: str | None = None) -> dict[str, Any]:
        """What the page shows."""
        study = self.study
        state: dict[str, Any] = {
            "question": study.config.question, "forced_choice": study.config.forced_choice,
            "needs_access_code": self.access_code is not None, "joined": participant is not None,
            "questions": study.trials_each, "minutes": study.minutes_each}
        if participant is None:
            return state
        done = participant.done
        return state | {
            "code": code, "done": done, "total": len(participant.trials), "current": self._shown(participant, done),
            "previous": self._shown(participant, done - 1), "next": self._shown(participant, done + 1)}

    def _shown(self, participant: Participant, position: int) -> dict[str, Any] | None:
        """A trial for the page, with the answer where there is one; None before the first and after the last."""
        if not 0 <= position < len(participant.trials):
            return None
        trial, vote = participant.trials[position], participant.votes.get(position)
        return {"trial": self.session.trial_id(participant, position), "prompt": self.study.pairs[trial.pair].prompt,
                "choice": vote and vote.choice, "revision": vote.revision + 1 if vote else 0}

    def set_cookie(self, request: Request, response: Response, code: str) -> None:
        response.set_cookie(self.cookie, code, max_age=COOKIE_SECONDS, httponly=True, samesite="strict",
                            secure=request.url.scheme == "https")


# -- routes


def create_app(server: StudyServer, *, move_seconds: float = MOVE_SECONDS) -> FastAPI:
    """The application. Votes go to the store every `move_seconds`, and when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_keep_moving(server.session, move_seconds))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(server.session.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _page_route(name, kind))
    _add_participants(app, server)
    _add_questions(app, server)
    _add_refusals(app)
    app.add_middleware(_Guard, loopback_only=server.loopback_only)
    return app


def _page_route(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (STATIC / name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send


def _add_participants(app: FastAPI, server: StudyServer) -> None:
    session = server.session

    @app.get("/api/state")
    async def state(request: Request) -> Response:
        code = request.cookies.get(server.cookie)
        participant = session.find(code)
        if participant is not None:
            server.reads.take(participant.id)
        return JSONResponse(server.state(participant, code))

    @app.post("/api/join")
    async def join(request: Request) -> Response:
        body = await read_body(request, JoinBody)
        code = request.cookies.get(server.cookie)
        participant = session.find(code)
        if participant is None:
            server.joins.take("everybody")
            if server.access_code is not None and not same_text(body.access_code, server.access_code):
                server.wrong_codes.take("everybody")
                raise RefusedRequestError(403, "this is not the access code: ask the person who invited you")
            participant, code = await session.join()
        return _with_cookie(request, participant, code)

    @app.post("/api/resume")
    async def resume(request: Request) -> Response:
        body = await read_body(request, ResumeBody)
        participant = session.find(body.code)
        if participant is None:
            raise RefusedRequestError(403, "this link is of no participant of this study: its answers may be deleted")
        return _with_cookie(request, participant, body.code)

    @app.post("/api/withdraw")
    async def withdraw(request: Request) -> Response:
        participant = server.participant(request, server.answers)
        await read_body(request, WithdrawBody)
        await asyncio.to_thread(session.withdraw, participant)
        response = JSONResponse(server.state(None))
        response.delete_cookie(server.cookie, httponly=True, samesite="strict")
        return response

    def _with_cookie(request: Request, participant: Participant, code: str | None) -> Response:
        response = JSONResponse(server.state(participant, code))
        server.set_cookie(request, response, code or "")
        return response


def _add_questions(app: FastAPI, server: StudyServer) -> None:
    session = server.session

    @app.get("/images/{trial}/{side}")
    async def image(request: Request, trial: str, side: str) -> Response:
        participant = server.participant(request, server.reads)
        if side not in ("left", "right"):
            raise RefusedRequestError(404, "there is nothing here")
        _, planned, pair = session.locate(participant, trial)
        content = await asyncio.to_thread(server.images.read, pair.pair, planned, side)
        return Response(content, media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})

    @app.post("/api/answer")
    async def answer(request: Request) -> Response:
        participant = server.participant(request, server.answers)
        body = await read_body(request, AnswerBody)
        if body.choice == "tie" and server.study.config.forced_choice:
            raise RefusedRequestError(422, "expected left or right: this study asks for a choice")
        await session.answer(participant, body.trial, body.choice, body.revision, body.ms)
        return JSONResponse(server.state(participant, request.cookies.get(server.cookie)))


def _add_refusals(app: FastAPI) -> None:
    """Every refusal as JSON of one line."""
    statuses = {FullStudyError: 409, UnknownTrialError: 404, ChangedMeanwhileError: 409, StorageError: 503}

    @app.exception_handler(RefusedRequestError)
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedRequestError)
        return _refusal(error.status, error.message)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refusal(error.status_code, str(error.detail))

    async def refuse_ours(request: Request, error: Exception) -> Response:
        status = next(status for kind, status in statuses.items() if isinstance(error, kind))
        if status == 503:
            logger.warning("an answer was not stored: %s", first_line(error))
            return _refusal(503, "this could not be stored just now: it is tried again")
        return _refusal(status, first_line(error))

    for kind in statuses:
        app.add_exception_handler(kind, refuse_ours)


class _Guard:
    """Checks host and origin before any route, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, loopback_only: bool):
        self.app, self.loopback_only = app, loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer: ASGIApp = self.app
        if scope["type"] == "http":
            try:
                check_host(Request(scope), self.loopback_only)
                if scope["method"] not in ("GET", "HEAD"):
                    check_origin(Request(scope))
            except RefusedRequestError as error:
                answer = _refusal(error.status, error.message)
        await answer(scope, receive, send_with_headers)


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)


async def _keep_moving(session: StudySession, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(session.move)
        except StorageError as error:
            logger.warning("votes wait in the log: %s", first_line(error))


# -- the process


def serve_study(study: Study, log: Path, *, host: str = "127.0.0.1", port: int = 8321, access_code: str | None = None,
                on_start: Callable[[str], object] = lambda url: None) -> None:
    """Serve a study until the process is told to end; `on_start` gets the page's address once it can be opened.

    ConfigError for a port that is taken or an access code that is too short, InputError for a log in use.
    """
    if access_code is not None and len(access_code) < LEAST_ACCESS_CODE:
        raise ConfigError(f"the access code has {len(access_code)} characters: expected at least {LEAST_ACCESS_CODE}")
    with _bound(host, port) as listening, scratch_folder() as folder:
        session = StudySession(study, log)
        server = StudyServer(session, StudyImages.unpack(study, folder), access_code, host in LOOPBACK)
        config = uvicorn.Config(create_app(server), access_log=False, log_level="warning", server_header=False,
                                timeout_graceful_shutdown=5, lifespan="on")
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on port {port} of {host}: {first_line(error)}; choose another with --port or "
                          "--host") from None
