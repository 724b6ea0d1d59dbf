"""An ordinary requestor, as yapapi's documentation has it, with a task that takes a minute."""

import asyncio

from yapapi import Golem, Task
from yapapi.payload import vm


async def worker(context, tasks):
    async for task in tasks:
        print(f"on {context.provider_name}", flush=True)
        script = context.new_script()
        script.run("/bin/sh", "-c", "sleep 60")
        yield script
        task.accept_result()


async def main():
    package = await vm.repo(image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376")
    async with Golem(budget=1.0) as golem:
        async for _ in golem.execute_tasks(worker, [Task(1)], payload=package):
            print("done", flush=True)


asyncio.run(main())
