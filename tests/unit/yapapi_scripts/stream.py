"""Live output: prints what a command writes, as it comes, with the time since its start."""

import asyncio
import json
import time
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.events import (
    CommandExecuted,
    CommandProgress,
    CommandStarted,
    CommandStdErr,
    CommandStdOut,
)
from yapapi.payload import vm
from yapapi.script import ProgressArgs

COMMAND = "for i in 1 2 3; do echo line $i; sleep 0.3; done; echo grüße >&2"
begun = time.monotonic()
seen = []


def on_event(event):
    if isinstance(event, (CommandStdOut, CommandStdErr)):
        kind = type(event).__name__
        seen.append([kind, event.output, round(time.monotonic() - begun, 2)])
    elif isinstance(event, (CommandStarted, CommandExecuted, CommandProgress)):
        seen.append([type(event).__name__, repr(event.command), 0])


async def worker(context, tasks):
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=1))
        script.upload_bytes(b"x" * 100_000, "/golem/work/x", progress_args=ProgressArgs("1s"))
        script.run("/bin/sh", "-c", COMMAND)
        yield script
        task.accept_result()


async def main():
    package = await vm.repo(image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376")
    async with Golem(
        budget=1.0, subnet_tag="public", stream_output=True, event_consumer=on_event
    ) as golem:
        async for _task in golem.execute_tasks(
            worker, [Task(data=None)], payload=package, max_workers=1
        ):
            pass
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
