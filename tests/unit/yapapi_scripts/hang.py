"""A task that does not end by itself; its argument makes its process known."""

import asyncio
import sys
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.payload import vm


async def worker(context, tasks):
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=5))
        # Said again and again: what is said before yapapi listens is lost.
        say = "while :; do echo running; sleep 0.5; done"
        script.run("/bin/sh", "-c", f"({say}) & sleep {sys.argv[1]}; true")
        yield script
        task.accept_result()


async def main():
    package = await vm.repo(image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376")
    async with Golem(
        budget=1.0,
        subnet_tag="public",
        stream_output=True,
        event_consumer=lambda event: print(type(event).__name__, flush=True),
    ) as golem:
        async for _task in golem.execute_tasks(
            worker, [Task(data=None)], payload=package, max_workers=1
        ):
            pass


if __name__ == "__main__":
    asyncio.run(main())
