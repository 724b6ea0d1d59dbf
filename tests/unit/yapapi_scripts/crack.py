"""After yacat of the Golem examples: a first task finds the size of the problem, many solve it.

Arguments: the number of workers and a folder. Exercises upload_file, upload_json, upload_bytes,
download_file and download_json, two jobs in one Golem, an activity that does several tasks.
"""

import asyncio
import json
import sys
from datetime import timedelta
from pathlib import Path

from yapapi import Golem, Task
from yapapi.events import WorkerStarted
from yapapi.log import log_event
from yapapi.payload import vm

SOLVE = """
read -r first last <<END
$(tr -dc '0-9 ' < /golem/work/part.json)
END
sed -n "${first},${last}p" /golem/input/words.txt | tr a-z A-Z > /golem/output/part.txt
printf '{"lines": %d}' "$(wc -l < /golem/output/part.txt)" > /golem/output/part.json
cat /golem/work/greeting
sleep 0.5
"""

WORKERS, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
providers = set()
counts = {}


def on_event(event):
    log_event(event)
    if isinstance(event, WorkerStarted):
        providers.add(event.agreement.details.raw_details.offer.properties["golem.node.id.name"])


async def count_lines(context, tasks):
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=1))
        script.upload_file(str(FOLDER / "words.txt"), "/golem/input/words.txt")
        counted = script.run("/usr/bin/wc", "-l", "/golem/input/words.txt")
        yield script
        task.accept_result(result=int((await counted).stdout.split()[0]))


async def solve(context, tasks):
    script = context.new_script(timeout=timedelta(minutes=1))
    script.upload_file(str(FOLDER / "words.txt"), "/golem/input/words.txt")
    script.upload_bytes(SOLVE.encode(), "/golem/work/solve.sh")
    script.upload_bytes(b"done", "/golem/work/greeting")
    yield script

    async for task in tasks:
        first, last = task.data
        target = FOLDER / f"part-{first:04}.txt"
        script = context.new_script(timeout=timedelta(minutes=1))
        script.upload_json({"first": first, ",": last}, "/golem/work/part.json")
        ran = script.run("/bin/sh", "/golem/work/solve.sh")
        script.download_file("/golem/output/part.txt", str(target))

        async def on_json(found, first=first):
            counts[first] = found["lines"]

        script.download_json("/golem/output/part.json", on_json)
        yield script
        assert (await ran).stdout == "done"
        task.accept_result(result=str(target))


async def main():
    package = await vm.repo(image_tag="golem/examples-yacat:latest", min_mem_gib=0.5)
    async with Golem(budget=10.0, subnet_tag="public", event_consumer=on_event) as golem:
        async for task in golem.execute_tasks(
            count_lines, [Task(data=None)], payload=package, max_workers=1
        ):
            total = task.result
        step = 10
        tasks = [Task(data=(at, at + step - 1)) for at in range(1, total + 1, step)]
        async for _task in golem.execute_tasks(
            solve, tasks, payload=package, max_workers=WORKERS, timeout=timedelta(minutes=10)
        ):
            pass
    print(json.dumps({"total": total, "counts": counts, "providers": sorted(providers)}))


if __name__ == "__main__":
    asyncio.run(main())
