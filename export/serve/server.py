"""Run the application with uvicorn, and end without losing a request."""

import asyncio
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Callable

import numpy as np
import uvicorn

from export.predict import ModelError, Predictor, self_test_pixels
from export.serve.app import Service, application
from export.serve.run import BACKLOG, ServeConfig
from resnet_dist.config.fields import required
from resnet_dist.errors import ArtifactError, MachineError
from resnet_dist.runtime import environment
from resnet_dist.runtime.wording import counted

SECONDS_OPEN = 1.0  # in which connections that are open may still send a request
SECONDS_TO_ANSWER = 30  # for requests that have begun


class Server(uvicorn.Server):
    """A uvicorn server that lets open connections end with an answer."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, then give open connections a moment before the idle ones are closed.

        uvicorn alone closes a connection that is idle at this moment, though a request may be on its way to it.
        From now on, every answer ends its connection.
        """
        self.service.stopping = True
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        end = asyncio.get_running_loop().time() + SECONDS_OPEN
        while self.server_state.connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def serve(cfg: ServeConfig, listener: socket.socket, say: Callable[[str], None]) -> None:
    """Serve on a listening socket until SIGTERM or SIGINT. `say` is called with a line about the model when it is warm.

    Raises ArtifactError if the model cannot be used, MachineError if there is too little memory for the largest batch.
    """
    threads = cfg.threads or environment.cores()
    try:
        predictor = Predictor(required(cfg.model, "MODEL"), threads, cfg.providers)
        warm_up(predictor, cfg.batch)
    except ModelError as error:
        raise ArtifactError(str(error)) from None
    except MemoryError:
        raise MachineError(
            f"--max-batch {cfg.max_batch}: not enough memory for such a batch; give a smaller one"
        ) from None
    if warning := predictor.warning:
        print(warning, file=sys.stderr)
    service = Service(cfg, predictor, threads)
    config = uvicorn.Config(
        application(service),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SECONDS_TO_ANSWER,
    )
    for name in ("python_multipart", "PIL"):  # they report damage in what clients send, which is in the answers
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    server = Server(config, service)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises a signal again at its end, which is a success here
        signal.signal(number, server.handle_exit)
    say(f"{predictor.path}: {counted(len(predictor.classes), 'class')}, {predictor.provider}")
    server.run([listener])


def warm_up(predictor: Predictor, max_batch: int) -> None:
    """Run the self-test, and batches before the first request. Raises ModelError if the self-test fails.

    On a GPU the first batch of every size is slow, because algorithms are chosen for it.
    """
    predictor.verify()
    pixels = self_test_pixels(predictor.preprocessing.img_size)
    for size in range(1, max_batch + 1) if "CUDA" in predictor.providers[0] else (max_batch,):
        predictor.logits(np.repeat(pixels, size, axis=0))
