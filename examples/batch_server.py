"""Serve an artifact over HTTP: images that come at the same time are embedded in one batch.

    pip install "regcache[serve]"
    python examples/batch_server.py ARTIFACT [--port 8000] [--batch-size 8] [--wait-ms 2]

`POST /embed` with the bytes of an image file gives `{"embedding": [...]}`; 422 says why an image
cannot be read, 413 that it is too large, 503 that too many wait. `GET /health` gives 200.
"""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

import regcache

# Named, so that nothing else of Pillow's readers is reached by what strangers send.
FORMATS = ("JPEG", "PNG", "WEBP")
MOST_BYTES = 20 << 20
MOST_WAITING = 1024


@dataclass(frozen=True)
class Waiting:
    """An image, and where its embedding is waited for."""

    image: Image.Image
    answer: "asyncio.Future[list[float] | None]"


class Batcher:
    """Embeds images in the order in which they come, as many at once as there are.

    `batch_size`: at most. `wait`: seconds that the first image of a batch waits for others.
    """

    def __init__(self, embedder: regcache.Embedder, batch_size: int, wait: float) -> None:
        self.embedder, self.batch_size, self.wait = embedder, batch_size, wait
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue(MOST_WAITING)

    async def embed(self, image: Image.Image) -> list[float] | None:
        """The embedding; None where the image cannot be read. Raises asyncio.QueueFull."""
        answer: asyncio.Future[list[float] | None] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait(Waiting(image, answer))
        return await answer

    async def run(self) -> None:
        """Embed batch after batch, until the task is cancelled."""
        while True:
            batch = await self._collect()
            images = [item.image for item in batch]
            try:
                rows = await asyncio.to_thread(self._rows, images)
            except Exception as error:  # told to those who wait for it; the next batch goes on
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            for item, row in zip(batch, rows, strict=True):
                if not item.answer.done():  # its client has gone
                    item.answer.set_result(row)

    def _rows(self, images: list[Image.Image]) -> list[list[float] | None]:
        vectors = self.embedder.embed(images, batch_size=self.batch_size, on_error="nan")
        return [row.tolist() if np.isfinite(row).all() else None for row in vectors]

    async def _collect(self) -> list[Waiting]:
        batch = [await self.queue.get()]
        if self.queue.qsize() + 1 < self.batch_size:
            await asyncio.sleep(self.wait)
        while len(batch) < self.batch_size and not self.queue.empty():
            batch.append(self.queue.get_nowait())
        return batch


def make_app(
    artifact: Path, *, batch_size: int = 8, wait: float = 0.002, threads: int | None = None
) -> FastAPI:
    """The server of an artifact. `wait`: seconds. `threads`: of the runtime, all CPUs by default.

    Raises InputError where the artifact cannot be opened.
    """
    embedder = regcache.load(artifact, threads=threads)
    batcher = Batcher(embedder, batch_size, wait)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        embedder.close()

    async def embed(request: Request) -> dict[str, Any]:
        image = _open(await _read(request))
        try:
            row = await batcher.embed(image)
        except asyncio.QueueFull as error:
            raise HTTPException(503, "too many images wait; try again later") from error
        if row is None:
            raise HTTPException(422, "the image cannot be read: it is broken or too large")
        return {"embedding": row}

    app = FastAPI(lifespan=running, title="regcache")
    app.add_api_route("/embed", embed, methods=["POST"])
    app.add_api_route("/health", lambda: {"dim": embedder.dim}, methods=["GET"])
    return app


async def _read(request: Request) -> bytes:
    """The body, of which no more than MOST_BYTES are taken."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"an image may have {MOST_BYTES} bytes at most")
    return bytes(body)


def _open(body: bytes) -> Image.Image:
    """An image that is not decoded yet: `embed` holds its size against the limit first."""
    try:
        return Image.open(io.BytesIO(body), formats=FORMATS)
    except Exception as error:  # Pillow's readers let any type escape on broken bytes
        raise HTTPException(422, f"no image of {', '.join(FORMATS)}") from error


def main(
    artifact: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 8,
    wait_ms: Annotated[float, typer.Option(min=0)] = 2.0,
    threads: int | None = None,
) -> None:
    """Serve until Ctrl-C."""
    app = make_app(artifact, batch_size=batch_size, wait=wait_ms / 1000, threads=threads)
    uvicorn.run(app, host=host, port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
