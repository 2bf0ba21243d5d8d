"""What is changed in Flower: that it is still there to be changed, and what it does."""

from __future__ import annotations

import inspect

import flwr
import pytest
from flwr.app import Array
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflatable_class_registry
from flwr.superlink.grid import http_grid

from feddm_flwr.server.federation import flower_patches

#: Of these somebody read what the changes replace: `inflatable_utils` and `http_grid`, and what calls them.
READ = ("1.41.", "1.42.")


def test_this_version_of_flower_is_one_whose_private_parts_were_read() -> None:
    assert flwr.__version__.startswith(READ), "read server/federation/flower_patches.py against it, then add it here"
    taken = [*inspect.signature(inflatable_utils.pull_objects).parameters][:2]
    assert taken == ["object_ids", "pull_object_fn"]
    assert "pull_objects(" in inspect.getsource(http_grid.HttpGrid)
    assert Array.__name__ in inflatable_class_registry


def test_an_array_that_would_grow_as_it_is_unpacked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4)
    flower_patches.install()
    inflate = inflatable_class_registry["Array"].inflate  # as Flower calls it
    honest, bomb = (Array("uint8", (8,), "feddm.frame", data) for data in (b"abcdefgh", b"abcdabcd"))
    monkeypatch.setattr(flower_patches.pulling, "left", 14, raising=False)
    assert inflate(honest.deflate(), honest.children).data == b"abcdefgh"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="an array of 8 bytes, where 6 were left"):
        inflate(bomb.deflate(), bomb.children)
    whole = Array("uint8", (4,), "feddm.frame", b"abcd")
    with pytest.raises(ValueError, match="an array of other things than chunks"):
        inflate(whole.deflate(), {"an array's": whole})


def test_a_reply_of_a_real_node_that_is_too_large_is_not_fetched_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(name: str) -> bytes:
        fetched.append(name)
        return bytes(100)

    monkeypatch.setattr(flower_patches.pulling, "reply", flower_patches.PendingReply(1000), raising=False)
    flower_patches.install()
    pull = http_grid.pull_objects  # type: ignore[attr-defined]
    assert len(pull(object_ids=[str(i) for i in range(10)], pull_object_fn=fetch)) == 10  # as Flower calls it
    fetched.clear()
    with pytest.raises(ObjectPullError, match="a reply of more than 1000 bytes"):
        pull(object_ids=[str(i) for i in range(100)], pull_object_fn=fetch)
    assert len(fetched) < 50
    fetched.clear()
    with pytest.raises(ObjectPullError, match="a reply of more than 100 objects"):
        pull(object_ids=[str(i) for i in range(101)], pull_object_fn=fetch)
    assert not fetched
