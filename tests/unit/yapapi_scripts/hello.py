"""The hello-world of the Golem documentation: one task, one provider, its output printed."""

import asyncio
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.payload import vm


async def worker(context, tasks):
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=1))
        future_result = script.run("/bin/sh", "-c", "echo Hello, $(basename $(pwd))!")
        yield script
        task.accept_result(result=(await future_result).stdout)


async def main():
    package = await vm.repo(
        image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376",
    )
    async with Golem(budget=1.0, subnet_tag="public") as golem:
        async for completed in golem.execute_tasks(
            worker, [Task(data=None)], payload=package, max_workers=1
        ):
            print(completed.result, end="", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
