"""A requestor like many: an event loop of its own, no handler of signals, all that yapapi logs in a file.

Says where it has come to, in ``stdout``, and takes its time there when ``CPODFS_SET_AT`` names it.
"""

import asyncio
import os
import time
from datetime import timedelta

from yapapi import Golem, Task
from yapapi.log import enable_default_logger
from yapapi.payload import vm

HELD = os.environ.get("CPODFS_SET_AT")


def reached(name):
    print(name, flush=True)
    if name == HELD:
        time.sleep(600)


async def worker(context, tasks):
    reached("activity")
    async for task in tasks:
        script = context.new_script(timeout=timedelta(minutes=5))
        ran = script.run("/bin/sh", "-c", "sleep 1; echo hello")
        if HELD == "batch":
            script.run("/bin/sh", "-c", "sleep 600")
            print("batch", flush=True)
        yield script
        task.accept_result(result=(await ran).stdout)
        reached("accepted")


def consumer(event):
    name = type(event).__name__
    if name in ("AgreementCreated", "AgreementConfirmed", "SubscriptionCreated", "InvoiceReceived"):
        reached(name)


async def main():
    package = await vm.repo(image_hash="d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376")
    async with Golem(budget=1.0, event_consumer=consumer) as golem:
        async for done in golem.execute_tasks(worker, [Task(data=None)], payload=package):
            print(done.result, flush=True)


if __name__ == "__main__":
    enable_default_logger(
        log_file="logs/hasty.log",
        debug_activity_api=True,
        debug_market_api=True,
        debug_payment_api=True,
        debug_net_api=True,
    )
    loop = asyncio.get_event_loop()
    task = loop.create_task(main())
    loop.run_until_complete(task)
