"""A requestor like any other: one task per file in payload/, on up to three Golem providers."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from zlib import compress, crc32

from yapapi import Golem, Task, WorkContext
from yapapi.payload import vm
from yapapi.script import Script

IMAGE = "d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376"
PAYLOAD, OUTPUT = Path("payload"), Path("output")
COMPUTE = "awk -f /golem/input/band.awk /golem/input/band.txt > /golem/output/rows.txt"
SHADES = " .,:;ox%#@"


async def worker(context: WorkContext, tasks: AsyncIterator[Task]) -> AsyncIterator[Script]:
    script = context.new_script(timeout=timedelta(minutes=1))
    script.upload_file("script/band.awk", "/golem/input/band.awk")
    yield script
    async for task in tasks:
        band: Path = task.data
        print(f"{band.stem}: sent to {context.provider_name}", flush=True)
        begun = time.monotonic()
        script = context.new_script(timeout=timedelta(minutes=2))
        script.upload_file(str(band), "/golem/input/band.txt")
        script.run("/bin/sh", "-c", COMPUTE)
        script.download_file("/golem/output/rows.txt", str(OUTPUT / band.name))
        yield script
        taken = time.monotonic() - begun
        task.accept_result(f"back from {context.provider_name} in {taken:.1f} s")


def join(bands: list[Path]) -> None:
    """Put the bands together: a picture for programs and one for the terminal."""
    rows = [
        line.split() for band in bands for line in (OUTPUT / band.name).read_text().splitlines()
    ]
    (OUTPUT / "mandelbrot.png").write_bytes(picture([bytes(map(int, row)) for row in rows]))
    drawn = ["".join(shade(int(value)) for value in row[::6]) for row in rows[::10]]
    (OUTPUT / "mandelbrot.txt").write_text("\n".join(drawn) + "\n")
    inside = sum(row.count("0") for row in rows)
    area = 3.0 * 2.3 * inside / (len(rows) * len(rows[0]))
    print(f"area of the set: about {area:.2f} (known to be near 1.51)", flush=True)


def picture(rows: list[bytes]) -> bytes:
    """Rows of grey values as a PNG file (RFC 2083), 8 bits each, no filters."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", crc32(kind + data))

    header = struct.pack(">2I5B", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    pixels = compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def shade(value: int) -> str:
    """A character for a grey value: the longer a point stayed, the darker."""
    if value == 0:
        return SHADES[-1]
    steps = 255 - value
    return SHADES[min(len(SHADES) - 2, max(0, steps.bit_length() - 1))]


async def main(bands: list[Path]) -> None:
    package = await vm.repo(image_hash=IMAGE, min_mem_gib=0.5, min_storage_gib=1.0)
    print(f"{len(bands)} bands to draw; looking for providers", flush=True)
    done = 0
    async with Golem(budget=1.0) as golem:
        tasks = [Task(data=band) for band in bands]
        async for task in golem.execute_tasks(
            worker, tasks, payload=package, max_workers=3, timeout=timedelta(minutes=10)
        ):
            done += 1
            print(f"{task.data.stem}: {task.result} ({done} of {len(bands)})", flush=True)
    join(bands)
    print(f"wrote {OUTPUT / 'mandelbrot.png'} and {OUTPUT / 'mandelbrot.txt'}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sorted(PAYLOAD.glob("band-*.txt"))))
