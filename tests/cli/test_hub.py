"""Ids of the Hugging Face hub in commands, on a hub that is made up."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from moe_ops.cli import hub


def test_an_id_becomes_a_folder(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.local_folder("quantize", Path("owner/model-1.5")) == tmp_path
    assert asked[0][0] == "owner/model-1.5" and "*.py" not in asked[0][1]
    for path in (tmp_path, Path("./owner/../x/y"), Path("nothing")):
        assert hub.local_folder("quantize", path) == path
    assert len(asked) == 1


def test_what_the_hub_refuses(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 Client Error.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"SOURCE must be .*, got owner/model: 401 Client Error$"):
        hub.local_folder("quantize", Path("owner/model"))
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"--push-to must be a repository .*the result is in"):
        hub.upload("quantize", tmp_path, "owner/model")
    with pytest.raises(ValueError, match=r"--push-to must be an id like owner/name, got 'model'"):
        hub.check_id("quantize", "model")


def test_an_upload(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, exist_ok: f"https://hub/{name}"
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path: done.append((repo_id, folder_path)),
    )
    assert hub.upload("quantize", tmp_path, "owner/model") == "https://hub/owner/model"
    assert done == [("owner/model", tmp_path)]
