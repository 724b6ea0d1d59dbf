"""A command that fails at the first attempt: yapapi gives the task to another activity."""

import asyncio
import json
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.payload import vm
from yapapi.rest.activity import CommandExecutionError

attempts = []


async def worker(context, tasks):
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=1))
        command = "echo fine" if attempts else "echo broken >&2; exit 3"
        ran = script.run("/bin/sh", "-c", command)
        try:
            yield script
        except CommandExecutionError as error:
            attempts.append({"message": error.message, "stderr": error.stderr})
            raise
        task.accept_result(result=(await ran).stdout)


async def main():
    package = await vm.repo(
        image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376",
        image_url="http://images.example.invalid/some.gvmi",
    )
    async with Golem(budget=1.0, subnet_tag="public") as golem:
        # Two workers: a failed one keeps its place for up to 10 s.
        async for task in golem.execute_tasks(
            worker, [Task(data=None)], payload=package, max_workers=2
        ):
            print(json.dumps({"result": task.result, "failed": attempts}))


if __name__ == "__main__":
    asyncio.run(main())
