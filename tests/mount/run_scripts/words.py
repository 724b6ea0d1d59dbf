"""A requestor as its author wrote it: counts the words of each payload file on some provider."""

import asyncio
from datetime import timedelta
from pathlib import Path

from yapapi import Golem, Task
from yapapi.payload import vm


async def worker(context, tasks):
    async for task in tasks:
        name = task.data.name
        script = context.new_script(timeout=timedelta(minutes=1))
        script.upload_file(task.data, f"/golem/work/{name}")
        counted = f"wc -w < /golem/work/{name} > /golem/work/{name}.count; sleep 3"
        script.run("/bin/sh", "-c", counted)
        script.download_file(f"/golem/work/{name}.count", f"output/{name}.count")
        yield script
        task.accept_result(result=f"{name} by {context.provider_name}")


async def main():
    package = await vm.repo(
        image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376",
        min_mem_gib=0.5,
    )
    tasks = [Task(data=path) for path in sorted(Path("payload").iterdir())]
    async with Golem(budget=1.0, subnet_tag="public") as golem:
        async for done in golem.execute_tasks(worker, tasks, payload=package, max_workers=2):
            print(done.result, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
