"""A requestor with one task that runs the command given; where it fails, yapapi tries it elsewhere."""

import asyncio
import sys
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.payload import vm


async def worker(context, tasks):
    async for task in tasks:
        print(f"on {context.provider_name}", flush=True)
        script = context.new_script(timeout=timedelta(minutes=5))
        script.run("/bin/sh", "-c", sys.argv[1])
        yield script
        task.accept_result()


async def main():
    package = await vm.repo(image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376")
    async with Golem(budget=5.0) as golem:
        async for _ in golem.execute_tasks(worker, [Task(data=None)], payload=package):
            print("done", flush=True)


asyncio.run(main())
