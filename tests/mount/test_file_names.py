"""Names of files are data to a program at a provider, whatever they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.mount.compute import record, run_to_end
from tests.mount.provider_pods import check_tidy, market_mounted, provider_pod
from tests.mount.strangers import reason, touch

NAMES = ("a b", "c;echo INJECTED.txt", "$(touch evil)", 'it\'s "x"', "`id`", "*", "-n")


def test_a_files_name_is_not_run_at_the_provider(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one") as mount:
        pod = provider_pod(mount, "names", "sh -c 'wc -c < {}'", "", foreach="payload/*")
        for name in NAMES:
            (pod / "payload" / name).write_text(name)
        assert "Exec format error" in touch(pod)
        assert "a file's name would be a piece of the program" in reason(pod)
        assert """sh -c '… "$1" …' sh {}""" in reason(pod)
        recipe = json.loads((pod / "a.recipe").read_text())
        recipe["golem"]["exec"] = """sh -c 'cp "$1" output/; echo "got $1"' sh {}"""
        (pod / "a.recipe").write_text(json.dumps(recipe))
        folder = run_to_end(pod)
        check_tidy(mount, folder)
        assert record(folder)["exit_code"] == 0
        assert sorted(os.listdir(pod / "output")) == sorted(NAMES)
        said = (folder / "stdout.log").read_text() + "".join(
            log.read_text() for log in (folder / "tasks").iterdir()
        )
        assert [name for name in NAMES if f"got payload/{name}\n" not in said] == []
        assert "\nINJECTED.txt" not in said
