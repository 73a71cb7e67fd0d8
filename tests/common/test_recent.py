"""The cache of recently used values."""

from __future__ import annotations

from magi_attention.common.recent import Recent


def test_the_oldest_unused_value_goes_first() -> None:
    recent: Recent[str] = Recent(max_entries=2)
    for key in ("a", "b"):
        recent.put(key, key)
    recent.get("a")
    recent.put("c", "c")
    assert [recent.get(key) for key in "abc"] == ["a", None, "c"]


def test_a_value_put_again_counts_as_used() -> None:
    recent: Recent[int] = Recent(max_entries=2)
    for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        recent.put(key, value)
    assert [recent.get(key) for key in "abc"] == [3, None, 4]


def test_clear_forgets_everything() -> None:
    recent: Recent[int] = Recent(max_entries=2)
    recent.put("a", 1)
    recent.clear()
    assert len(recent) == 0 and recent.get("a") is None
