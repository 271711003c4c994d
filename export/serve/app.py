"""The application: what each address answers."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.predict import Prediction, Predictor
from export.serve.batching import Batcher
from export.serve.bodies import Intake, Load, bytes_of, images_of
from export.serve.metrics import Metrics
from export.serve.openapi import document
from export.serve.page import page, policy
from export.serve.run import ServeConfig


class Service:
    """A model, its batcher, and the state of the server."""

    def __init__(self, cfg: ServeConfig, predictor: Predictor, threads: int) -> None:
        self.cfg, self.predictor = cfg, predictor
        self.metrics, self.load = Metrics(), Load(cfg.queue)
        wait = cfg.max_wait / 1000
        self.batcher = Batcher(predictor.rows, threads, cfg.batch, wait, on_batch=self.metrics.batches.add)
        self.stopping = False

    @asynccontextmanager
    async def running(self, _: Starlette) -> AsyncIterator[None]:
        """While the server runs, run batches."""
        work = asyncio.create_task(self.batcher.work())
        yield
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        self.batcher.close()

    async def classify(self, name: str, image: bytes | str, top_k: int) -> Prediction:
        """The prediction for the bytes of an image, or for base64 text."""
        pixels, error = await self.batcher.decoded(partial(self._decode, image))
        if pixels is None:
            self.metrics.images["unusable"] += 1
            return Prediction(name, error=error)
        row = await self.batcher.row(pixels)
        self.metrics.images["classified"] += 1
        return self.predictor.best(name, row, top_k)

    def _decode(self, image: bytes | str) -> tuple[np.ndarray | None, str]:
        data = bytes_of(image)
        if data is None:
            return None, "not base64 (without line breaks)"
        _, pixels, error = self.predictor.load(data, self.cfg.max_pixels)
        return pixels, error

    async def predict(self, request: Request) -> Response:
        """POST /predict: 200, or 422 if no image of the request can be used."""
        top_k = self._top_k(request)
        with Intake(self.load) as intake:
            images, several = await images_of(request, intake, int(self.cfg.max_mib * 2**20), self.cfg.queue)
            predictions = await asyncio.gather(*(self.classify(name, image, top_k) for name, image in images))
        answers = [prediction.to_dict() for prediction in predictions]
        status = 422 if all(prediction.error for prediction in predictions) else 200
        return as_json(answers if several else answers[0], status)

    def _top_k(self, request: Request) -> int:
        text = request.query_params.get("top_k", str(self.cfg.top_k))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
            raise HTTPException(400, f"top_k={text[:20]}: must be a whole number above 0")
        return min(int(text), len(self.predictor.classes))

    async def health(self, _: Request) -> Response:
        """GET /health: the server lives."""
        return as_json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """GET /ready: 503 when the server stops."""
        return as_json({"status": "stopping"}, 503) if self.stopping else as_json({"status": "ready"})

    async def counts(self, _: Request) -> Response:
        """GET /metrics, for Prometheus."""
        text = self.metrics.text(self.load.images, ready=not self.stopping)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def description(self, _: Request) -> Response:
        """GET /openapi.json."""
        return as_json(document(self.predictor, self.cfg))

    async def page(self, _: Request) -> Response:
        """GET /: a form to try the model."""
        return Response(page(), headers={"Content-Security-Policy": policy(page())}, media_type="text/html")


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer in ASCII, because class names can contain characters that UTF-8 lacks."""
    return Response(json.dumps(value), status, headers, media_type="application/json")


def application(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    routes = [
        Route("/predict", service.predict, methods=["POST"]),
        Route("/health", service.health),
        Route("/ready", service.ready),
        Route("/metrics", service.counts),
        Route("/openapi.json", service.description),
        Route("/", service.page),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
    return Outermost(Starlette(routes=routes, lifespan=service.running, exception_handlers=handlers), service)


async def _refused(_: Request, error: HTTPException) -> Response:
    return as_json({"error": error.detail}, error.status_code, error.headers)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    return as_json({"error": "the request ended early"}, 400)  # for the metrics: nobody reads it


async def _failed(_: Request, __: Exception) -> Response:
    return as_json({"error": "the server failed; its log has the reason"}, 500)


class Outermost:
    """Around the application: adds headers to every answer, and counts the answers of /predict."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        started = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cache-Control"] = "no-store"
                if self.service.stopping:
                    headers["Connection"] = "close"
                if scope["path"] == "/predict":
                    self.service.metrics.requests[message["status"]] += 1
                    self.service.metrics.seconds.add(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, answer)
