"""Directories and files: the same on our development server and on a real one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator

import pytest
import trio

from cpodfs import errors
from cpodfs.dfs import Client

from .helpers import listed, names, read, write

pytestmark = pytest.mark.anyio

ODD_NAMES = [
    "a b",
    " lead and trail ",
    'quo"te',
    "back\\slash",
    "per%41cent 50%",
    "semi;colon",
    "apos'trophe",
    "a&b=c+d#e?f",
    "ümläut ☃ 🙂",
    "new\nline",
    "carriage\rreturn",
    "tab\tstop",
    "control\x01\x7f",
    ".hidden",
    "..two",
    "_F_file",
    "_D_dir",
    "=?utf-8?b?eA==?=",
    "n" * 255,
    "é" * 127,
]


async def test_a_new_pod_is_empty(client: Client) -> None:
    assert len(await client.list_dir("pod", "/")) == 0
    root = await client.stat_dir("pod", "/")
    assert (root.name, root.dirs, root.files) == ("/", 0, 0)


async def test_directories(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await client.mkdir("pod", "/d/e")
    assert await names(client) == ["d/"]
    assert await names(client, "/d") == ["e/"]
    with pytest.raises(errors.AlreadyExists):
        await client.mkdir("pod", "/d")
    with pytest.raises(errors.NotFound):
        await client.mkdir("pod", "/no/where")
    for call in (client.list_dir, client.stat_dir, client.rmdir):
        with pytest.raises(errors.NotFound):
            await call("pod", "/nope")
    with pytest.raises(errors.NotFound):
        await client.chmod_dir("pod", "/nope", 0o755)
    await client.rmdir("pod", "/d/e")
    await client.rmdir("pod", "/d")
    assert await names(client) == []
    await client.mkdir("pod", "/d")
    assert await names(client, "/d") == []


async def test_a_directorys_metadata(client: Client) -> None:
    before = int(time.time()) - 1
    await client.mkdir("pod", "/d")
    found = (await listed(client))["d"]
    assert found.is_dir
    assert found.mode == 0o700
    assert before <= found.mtime_s <= time.time() + 1
    await client.chmod_dir("pod", "/d", 0o755)
    assert (await listed(client))["d"].mode == 0o755
    await client.mkdir("pod", "/d/sub")
    await write(client, "/d/f", b"x")
    stat = await client.stat_dir("pod", "/d")
    assert (stat.name, stat.mode, stat.dirs, stat.files) == ("d", 0o755, 1, 1)


async def test_rmdir_is_for_empty_directories(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await client.mkdir("pod", "/d/e")
    await write(client, "/d/e/f", b"x")
    for path in ("/d", "/d/e"):
        with pytest.raises(errors.NotEmpty):
            await client.rmdir("pod", path)
    assert await read(client, "/d/e/f") == b"x"
    await client.rmdir("pod", "/d", check=False)
    assert await names(client) == []
    with pytest.raises(errors.NotFound):
        await read(client, "/d/e/f")


async def test_removing_a_nested_directory_leaves_its_namesakes(client: Client) -> None:
    """The server's own rmdir would unlist /same, and leave /d/e for ever."""
    for path in ("/same", "/d", "/d/same", "/d/e", "/d/e/e"):
        await client.mkdir("pod", path)
    await client.rmdir("pod", "/d/same")
    await client.rmdir("pod", "/d/e/e")
    await client.refresh_pod("pod")
    assert await names(client) == ["d/", "same/"]
    assert await names(client, "/d") == ["e/"]
    await client.rmdir("pod", "/d/e")
    await client.mkdir("pod", "/d/e")
    await client.rmdir("pod", "/d/e")
    await client.rmdir("pod", "/d")
    assert await names(client) == ["same/"]


async def test_a_directory_that_its_parent_does_not_list_is_listed_again(client: Client) -> None:
    """The server's own rmdir has unlisted it; asked to make it, it says that it is there."""
    for path in ("/same", "/same/e", "/d", "/d/same"):
        await client.mkdir("pod", path)
    for path in ("/same/f", "/same/e/f"):
        await write(client, path, path.encode())
    await client.raw_rmdir("pod", "/d/same")
    await client.refresh_pod("pod")
    assert await names(client) == ["d/"]
    with pytest.raises(errors.AlreadyExists):
        await client.mkdir("pod", "/same")
    await client.relist_dir("pod", "/same")
    await client.refresh_pod("pod")
    assert await names(client) == ["d/", "same/"]
    for path in ("/same/f", "/same/e/f"):
        assert await read(client, path) == path.encode()


async def test_what_an_interrupted_removal_left_is_swept(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await client.mkdir("pod", "/d/e")
    await client.mkdir("pod", "/.cpodfs-rm-not-ours")
    await client.raw_rename_dir("pod", "/d/e", "/.cpodfs-rm-0123456789abcdef")
    assert await client.sweep("pod") == 1
    assert await names(client) == [".cpodfs-rm-not-ours/", "d/"]
    assert await client.sweep("pod") == 0


async def test_moving_a_tree_leaves_namesakes_of_its_directories(client: Client) -> None:
    """The server's own rename would unlist /s, and /old/t in its new place."""
    for path in ("/s", "/old", "/old/s", "/old/t", "/old/u", "/old/u/t"):
        await client.mkdir("pod", path)
    for path in ("/s/f", "/old/f", "/old/s/f", "/old/t/f", "/old/u/f", "/old/u/t/f"):
        await write(client, path, path.encode())
    await client.chmod_dir("pod", "/old", 0o750)
    await client.rename_dir("pod", "/old", "/new")
    await client.refresh_pod("pod")
    assert await names(client) == ["new/", "s/"]
    assert (await listed(client))["new"].mode == 0o750
    assert await names(client, "/new") == ["f", "s/", "t/", "u/"]
    assert await names(client, "/new/u") == ["f", "t/"]
    for path in ("/f", "/s/f", "/t/f", "/u/f", "/u/t/f"):
        assert await read(client, f"/new{path}") == f"/old{path}".encode()
    assert await read(client, "/s/f") == b"/s/f"


async def test_moves_that_the_server_would_answer_with_a_loss(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await client.mkdir("pod", "/d/e")
    await write(client, "/d/e/f", b"kept")
    with pytest.raises(errors.NotFound):
        await client.rename_dir("pod", "/d", "/no/where")
    with pytest.raises(errors.NameRefused):
        await client.rename_dir("pod", "/d", "/d/e/d")
    await client.refresh_pod("pod")
    await client.rename_dir("pod", "/d", "/unlisted")
    assert await read(client, "/unlisted/e/f") == b"kept"


async def test_directory_names(client: Client) -> None:
    accepted = [name for name in ODD_NAMES if len(name.encode()) <= 100] + ["n" * 100]
    for name in accepted:
        await client.mkdir("pod", f"/{name}")
    assert await names(client) == sorted(f"{name}/" for name in accepted)
    for name in accepted:
        await write(client, f"/{name}/f", b"x")
        assert await names(client, f"/{name}") == ["f"]
    for name in ("n" * 101, "é" * 51):
        with pytest.raises(errors.TooLong):
            await client.mkdir("pod", f"/{name}")


async def test_a_directory_moves_with_all_its_content(client: Client) -> None:
    for path in ("/old", "/old/sub", "/to"):
        await client.mkdir("pod", path)
    await write(client, "/old/f", b"f")
    await write(client, "/old/sub/g", b"g")
    await client.rename_dir("pod", "/old", "/new")
    assert await names(client) == ["new/", "to/"]
    await client.rename_dir("pod", "/new", "/to/moved")
    assert await names(client) == ["to/"]
    assert await names(client, "/to/moved") == ["f", "sub/"]
    assert await read(client, "/to/moved/f") == b"f"
    assert await read(client, "/to/moved/sub/g") == b"g"
    await client.refresh_pod("pod")
    assert await names(client, "/to/moved/sub") == ["g"]
    assert await read(client, "/to/moved/sub/g") == b"g"


async def test_a_directory_does_not_move_onto_another(client: Client) -> None:
    await client.mkdir("pod", "/a")
    await client.mkdir("pod", "/b")
    for target in ("/b", "/a"):
        with pytest.raises(errors.AlreadyExists):
            await client.rename_dir("pod", "/a", target)
    with pytest.raises(errors.NotFound):
        await client.rename_dir("pod", "/nope", "/c")
    assert await names(client) == ["a/", "b/"]


async def test_a_file(client: Client) -> None:
    before = int(time.time()) - 1
    await client.mkdir("pod", "/d")
    await write(client, "/d/f", b"hello")
    assert await read(client, "/d/f") == b"hello"
    found = (await listed(client, "/d"))["f"]
    assert (found.is_dir, found.size, found.mode) == (False, 5, 0o600)
    assert before <= found.mtime_s <= time.time() + 1
    stat = await client.stat_file("pod", "/d/f")
    assert (stat.name, stat.path, stat.size, stat.mode) == ("f", "/d", 5, 0o600)
    await client.delete_file("pod", "/d/f")
    assert await names(client, "/d") == []


async def test_an_empty_file(client: Client) -> None:
    await write(client, "/empty", b"")
    assert (await listed(client))["empty"].size == 0
    assert await read(client, "/empty") == b""


async def test_overwriting_replaces_content_and_resets_mode(client: Client) -> None:
    await write(client, "/f", b"first, and longer")
    await client.chmod_file("pod", "/f", 0o4755)
    assert (await client.stat_file("pod", "/f")).mode == 0o4755
    assert (await listed(client))["f"].mode == 0o4755
    await write(client, "/f", b"second")
    found = await listed(client)
    assert list(found) == ["f"]
    assert (found["f"].size, found["f"].mode) == (6, 0o600)
    assert await read(client, "/f") == b"second"


async def test_quick_overwrites_all_survive(client: Client) -> None:
    """Several updates within one second, each read back; and what is read after a refresh."""
    for number in range(6):
        await write(client, "/f", b"version %d" % number)
        assert await read(client, "/f") == b"version %d" % number
    await client.delete_file("pod", "/f")
    await write(client, "/f", b"the last")
    await client.refresh_pod("pod")
    assert await names(client) == ["f"]
    assert await read(client, "/f") == b"the last"


async def test_a_file_of_many_blocks(client: Client) -> None:
    """Beyond the 32 MiB that the server holds in memory, with an odd last block."""
    chunk = bytes(range(256)) * 4096
    count, tail = 34, b"the end"
    size = count * len(chunk) + len(tail)
    sent, progress = hashlib.sha256(), []

    async def body() -> AsyncIterator[bytes]:
        for number in range(count):
            data = number.to_bytes(4, "big") + chunk[4:]
            sent.update(data)
            yield data
        sent.update(tail)
        yield tail

    await client.upload("pod", "/", "big", body, size, on_progress=progress.append)
    assert progress[-1] == size
    received = hashlib.sha256()
    async with client.download("pod", "/big") as download:
        assert download.size == size
        async for piece in download:
            received.update(piece)
    assert received.hexdigest() == sent.hexdigest()
    assert (await listed(client))["big"].size == size


async def test_how_much_of_a_file_swarm_has(client: Client) -> None:
    await write(client, "/f", b"x" * 3_000_000)
    status = await client.file_status("pod", "/f")
    assert status is not None
    # A server over the mock of a Bee node tells 0, 0, 0.
    assert status.synced <= status.processed == status.total
    assert status.total == 0 or status.total > 3_000_000 // 4096
    with pytest.raises(errors.NotFound):
        await client.file_status("pod", "/nope")
    await client.rename_file("pod", "/f", "/g")
    assert await client.file_status("pod", "/g") is None


async def test_how_much_swarm_has_is_forgotten_with_the_pod(client: Client) -> None:
    await write(client, "/f", b"x")
    assert await client.file_status("pod", "/f") is not None
    await client.close_pod("pod")
    assert await client.file_status("pod", "/f") is None
    await write(client, "/f", b"y")
    assert await client.file_status("pod", "/f") is not None


async def test_a_download_may_be_left_early(client: Client) -> None:
    await write(client, "/big", b"x" * 4_000_000)
    async with client.download("pod", "/big") as download:
        async for _ in download:
            break
    assert len(await read(client, "/big")) == 4_000_000


async def test_file_names(client: Client) -> None:
    await client.mkdir("pod", "/odd")
    for name in ODD_NAMES:
        await write(client, f"/odd/{name}", name.encode())
    assert await names(client, "/odd") == sorted(ODD_NAMES)
    for name in ODD_NAMES:
        assert await read(client, f"/odd/{name}") == name.encode()
        assert (await client.stat_file("pod", f"/odd/{name}")).name == name
        await client.delete_file("pod", f"/odd/{name}")
    assert await names(client, "/odd") == []


async def test_block_sizes(client: Client) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    for size in (1_000_000, 8_000_000):
        await client.upload("pod", "/", "f", body, 1, block_size=size)
        assert (await client.stat_file("pod", "/f")).block_size == size
    for size in (999_999, 8_000_001):
        with pytest.raises(errors.Refused):
            await client.upload("pod", "/", "g", body, 1, block_size=size)
    assert await names(client) == ["f"]


async def test_a_file_that_is_not_there(client: Client) -> None:
    await client.mkdir("pod", "/d")
    for path in ("/nope", "/no/where", "/d"):
        for call in (client.stat_file, client.delete_file, read_of(client)):
            with pytest.raises(errors.NotFound):
                await call("pod", path)
    with pytest.raises(errors.NotFound):
        await client.chmod_file("pod", "/nope", 0o644)
    with pytest.raises(errors.NotFound):
        await client.rename_file("pod", "/nope", "/other")
    with pytest.raises(errors.NotFound):
        await write(client, "/no/where", b"x")
    assert await names(client) == ["d/"]


def read_of(client: Client):
    async def call(pod: str, path: str) -> bytes:
        return await read(client, path, pod)

    return call


async def test_renaming_files(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/f", b"content")
    await client.chmod_file("pod", "/f", 0o640)
    await client.rename_file("pod", "/f", "/g")
    await client.rename_file("pod", "/g", "/d/h")
    assert await names(client) == ["d/"]
    assert await names(client, "/d") == ["h"]
    assert await read(client, "/d/h") == b"content"
    assert (await client.stat_file("pod", "/d/h")).mode == 0o640
    await client.rename_file("pod", "/d/h", "/f")
    await client.refresh_pod("pod")
    assert await names(client) == ["d/", "f"]
    assert await read(client, "/f") == b"content"


async def test_a_file_is_not_lost_by_renaming_it_to_nowhere(client: Client) -> None:
    await write(client, "/f", b"kept")
    with pytest.raises(errors.NotFound):
        await client.rename_file("pod", "/f", "/no/where")
    assert await names(client) == ["f"]
    assert await read(client, "/f") == b"kept"


async def test_a_file_does_not_replace_another_by_renaming(client: Client) -> None:
    await write(client, "/a", b"a")
    await write(client, "/b", b"b")
    for target in ("/b", "/a"):
        with pytest.raises(errors.AlreadyExists):
            await client.rename_file("pod", "/a", target)
    assert await read(client, "/a") == b"a"
    assert await read(client, "/b") == b"b"


async def test_an_upload_that_breaks_off_leaves_the_old_file(client: Client) -> None:
    await write(client, "/f", b"old")

    async def breaks() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await client.upload("pod", "/", "f", breaks, 5_000_000)
    with pytest.raises(OSError, match="the disk is gone"):
        await client.upload("pod", "/", "new", breaks, 5_000_000)
    assert await names(client) == ["f"]
    assert await read(client, "/f") == b"old"


async def test_directories_are_independent_of_each_other(client: Client) -> None:
    folders = [f"/d{number}" for number in range(4)]
    for folder in folders:
        await client.mkdir("pod", folder)

    async def fill(folder: str) -> None:
        for number in range(5):
            await write(client, f"{folder}/f{number}", b"x")

    async with trio.open_nursery() as nursery:
        for folder in folders:
            nursery.start_soon(fill, folder)
    for folder in folders:
        assert await names(client, folder) == [f"f{number}" for number in range(5)]


async def test_what_is_written_is_there_for_the_next_session(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/d/f", b"kept")
    await client.chmod_file("pod", "/d/f", 0o644)
    await client.logout()
    assert await names(client) == ["d/"]
    assert (await listed(client, "/d"))["f"].mode == 0o644
    assert await read(client, "/d/f") == b"kept"
