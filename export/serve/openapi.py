"""The description of the interface, as an OpenAPI document."""

from collections.abc import Mapping
from typing import Any

from export.predict import Predictor
from export.serve.run import ServeConfig
from resnet_dist import __version__

PREDICTION = {
    "type": "object",
    "required": ["path", "predictions", "abstained", "error"],
    "properties": {
        "path": {"type": "string", "description": "the file name in a form, otherwise `image`"},
        "predictions": {
            "type": "array",
            "description": "the most probable classes, best first; empty if there is an error",
            "items": {
                "type": "object",
                "required": ["class", "p"],
                "properties": {"class": {"type": "string"}, "p": {"type": "number", "minimum": 0, "maximum": 1}},
            },
        },
        "abstained": {"type": "boolean", "description": "the best probability is below the confidence threshold"},
        "error": {"type": ["string", "null"], "description": "why the image cannot be used"},
    },
}
ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
REFUSALS = {
    400: "the body is not what its Content-Type says, or contains no image",
    408: "the body took too long",
    413: "the body is too large, or contains too many images",
    415: "the Content-Type is not supported",
    500: "the server failed",
    503: "the server is busy; Retry-After says when to try again",
}
ANSWER = {
    "oneOf": [
        {"$ref": "#/components/schemas/Prediction"},
        {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}},
    ]
}


def document(predictor: Predictor, cfg: ServeConfig) -> dict[str, Any]:
    """An OpenAPI 3.1 document, plain JSON values."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Image classification",
            "version": __version__,
            "description": f"{predictor.path.name}: {len(predictor.classes)} classes",
        },
        "paths": {
            "/predict": {"post": _predict(cfg)},
            "/health": {"get": _plain("whether the server lives", {200: "it lives"})},
            "/ready": {"get": _plain("whether to send requests here", {200: "ready", 503: "the server stops"})},
            "/metrics": {"get": _plain("counters in the text format of Prometheus", {200: "the counters"})},
        },
        "components": {"schemas": {"Prediction": PREDICTION, "Error": ERROR}},
    }


def _predict(cfg: ServeConfig) -> dict[str, Any]:
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    text = {"type": "string", "contentEncoding": "base64"}
    whole: dict[str, Any] = {"schema": {}}
    return {
        "summary": "the most probable classes of one or several images",
        "operationId": "predict",
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "description": "number of classes per image",
                "schema": {"type": "integer", "minimum": 1, "default": cfg.top_k},
            }
        ],
        "requestBody": {
            "required": True,
            "description": f"at most {cfg.max_mib:g} MiB, {cfg.queue} images, and {cfg.max_pixels} pixels per image",
            "content": {
                "image/*": whole,
                "application/octet-stream": whole,
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"image": {"type": "array", "items": file}}}
                },
                "application/json": {"schema": {"type": "array", "minItems": 1, "items": text}},
            },
        },
        "responses": {
            "200": _answer("one prediction for an image; a list of them for a form or a list, in its order", ANSWER),
            "422": _answer("no image can be used", ANSWER),
            **{str(status): _answer(text, {"$ref": "#/components/schemas/Error"}) for status, text in REFUSALS.items()},
        },
    }


def _answer(text: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _plain(text: str, answers: Mapping[int, str]) -> dict[str, Any]:
    return {"summary": text, "responses": {str(status): {"description": said} for status, said in answers.items()}}
