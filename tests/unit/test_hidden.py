"""Names that cannot be shown are logged, but not again and again."""

from __future__ import annotations

import pytest

from cpodfs.sync.hidden import FOLDERS, NAMES, Hidden


def test_a_name_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    hidden = Hidden()
    for _listing in range(3):
        for name in ("a/b", "..", "c\nd"):
            hidden.note(5, name, "pod/d")
        hidden.note(6, "a/b", "pod/e")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "hidden: unusable name 'a/b' in pod/d",
        "hidden: unusable name '..' in pod/d",
        "hidden: unusable name 'c\\nd' in pod/d",
        "hidden: unusable name 'a/b' in pod/e",
    ]


def test_a_hostile_server_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    hidden = Hidden()
    for number in range(10_000):
        hidden.note(5, f"{number}/" + "x" * 10_000, "pod/d")
    assert len(caplog.records) == NAMES
    assert "more in there are not logged" in caplog.records[-1].getMessage()
    assert max(len(record.getMessage()) for record in caplog.records) < 500
    for folder in range(2 * FOLDERS):
        hidden.note(folder, "a/b", "pod/d")
    assert len(hidden._known) == FOLDERS
