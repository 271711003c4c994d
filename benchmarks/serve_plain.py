"""The server that `resnet-dist serve` is compared with: the loop of most tutorials, one prediction per request.

    python benchmarks/serve_plain.py MODEL loop|threads THREADS

`loop` predicts in the event loop, so one request after the other; `threads` predicts in Starlette's thread pool.
"""

import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from export.predict import Prediction, Predictor

MODEL, KIND, THREADS = sys.argv[1:]
predictor = Predictor(MODEL, int(THREADS))


def classify(image: bytes) -> Prediction:
    """The prediction for the bytes of an image."""
    return next(predictor.predict(image))


async def predict(request: Request) -> JSONResponse:
    """POST /predict."""
    image = await request.body()
    prediction = classify(image) if KIND == "loop" else await run_in_threadpool(classify, image)
    return JSONResponse(prediction.to_dict(), 422 if prediction.error else 200)


listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
listener.bind(("127.0.0.1", 0))
listener.listen(2048)
print(f"on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
uvicorn.Server(uvicorn.Config(app, http="h11", log_level="error", access_log=False, backlog=2048)).run([listener])
