"""Uploads to the Hub and downloads from it, over HTTP to a stand-in on this machine."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from tiny import random_fill, random_pixels, random_vit

from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.compact.card import model_card
from vitcut.compact.info import ModelInfo
from vitcut.compact.model import CompactViT
from vitcut.compiler.emit import compile_circuit
from vitcut.errors import ArtefactError, ConfigError, ModelError
from vitcut.inputs import load_either
from vitcut.prediction import load_any
from vitcut.preprocessing import Preprocessing

SHA = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that one upload and one download use."""

    files: ClassVar[dict[str, bytes]] = {}
    refuse: ClassVar[bool] = False

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def answer(self, content: bytes = b"{}", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def told(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self.told({"error": "you may not write here"}, 403)
        elif self.path == "/api/repos/create":
            self.told({"url": f"{constants.ENDPOINT}/me/owls"})
        elif self.path.endswith("/validate-yaml"):
            text = json.loads(body)["content"]
            yaml.safe_load(text.split("---\n")[1])
            self.told({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [item["path"] for item in json.loads(body)["files"]]
            kinds = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.told({"files": kinds})
        else:
            assert "/commit/" in self.path
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{constants.ENDPOINT}/me/owls/commit/{SHA}"
            self.told({"success": True, "commitUrl": url, "commitOid": SHA})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path:
            content = self.files[name]
            self.answer(content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=SHA)
        elif self.path.startswith("/api/models/me/owls/tree"):
            self.told([{"type": "file", "path": name, "size": 1, "oid": ""} for name in self.files])
        elif self.path.startswith("/api/models/me/owls"):
            self.told({"id": "me/owls", "sha": SHA})
        else:
            self.answer(status=200 if self.path == "/" else 404)


@pytest.fixture
def folder(tmp_path):
    """A model directory with a circuit, a fill and a card with measurements."""
    weights = random_vit()
    circuit, names = Circuit.full(weights.graph), ("newt", "wasp", "owl", "seal")
    fill = random_fill(weights, circuit)
    model = compile_circuit(weights, circuit, fill)
    model.info = ModelInfo(
        preprocessing=Preprocessing(image_size=4),
        class_names=names,
        group_names=names,
        group_of_class=(0, 1, 2, 3),
    )
    circuit.save(tmp_path / "circuit.json")
    fill.save(tmp_path / "fill.safetensors")
    model.save_pretrained(
        tmp_path / "model",
        circuit=tmp_path / "circuit.json",
        fill=tmp_path / "fill.safetensors",
        card=model_card(model.info, measured="It is 3x as fast."),
    )
    return tmp_path / "model"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[type[Hub]]:
    Hub.files, Hub.refuse = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_was_uploaded_comes_back(hub, folder):
    before = CompactViT.from_pretrained(folder)
    assert before.push_to_hub("me/owls").endswith(f"/me/owls/commit/{SHA}")
    # Not the fill, which is not needed to run it.
    assert {*hub.files} == {
        "README.md", "circuit.json", "config.json", "labels.txt", "model.safetensors",
    }  # fmt: skip
    after = CompactViT.from_pretrained("me/owls")
    pixels = random_pixels(random_vit()).float()
    torch.testing.assert_close(after(pixels), before(pixels))
    assert (after.plan, after.info) == (before.plan, before.info)
    card = (after.folder / "README.md").read_text()
    assert card.split("---\n")[1] == model_card(before.info).split("---\n")[1]
    assert "It is 3x as fast." in card
    assert 'vitcut.predict("me/owls", ["picture.jpg"])' in card


def test_every_command_takes_the_id_of_a_cut(hub, folder, tmp_path, capsys):
    CompactViT.from_pretrained(folder).push_to_hub("me/owls")
    assert main(["info", "me/owls"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("me/owls")
    assert "next: vitcut predict me/owls PICTURES" in told
    assert "heads" in told.partition("kept")[2], "its circuit was uploaded too"
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    assert main(["predict", "me/owls", str(tmp_path / "red.png")]) == 0
    assert "red.png\t" in capsys.readouterr().out
    # `export` and `eval` open models in this way.
    loaded = load_either("me/owls")
    assert (loaded.name, loaded.model.info.class_names[0]) == ("me/owls", "newt")


@pytest.mark.parametrize("load", [load_any, load_either])
@pytest.mark.parametrize("given", [{"point": "a"}, {"arch": "vit"}, {"labels": "names.txt"}])
def test_what_is_for_other_models_is_refused_with_an_id(load, given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))} .*got it with .*me/owls"):
        load("me/owls", **given)


def test_a_dense_model_on_the_hub_is_named_as_such(hub):
    hub.files = {"config.json": b'{"architecture": "vit_tiny_patch16_224"}'}
    with pytest.raises(ArtefactError, match="if it is a dense one, give hf-hub:me/owls"):
        load_any("me/owls")


@pytest.mark.parametrize("name", ["runs/nope", "here/nope", "nope", "/nope/nope", "./nope"])
def test_a_path_where_nothing_is_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ModelError, match=f"no model at {name}"):
        load_any(name)


def test_a_hub_that_refuses_says_so_in_one_line(hub, folder):
    hub.refuse = True
    with pytest.raises(ArtefactError, match=r"cannot upload to me/owls: .*hf auth login") as told:
        CompactViT.from_pretrained(folder).push_to_hub("me/owls")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["owls/", "me/o wls", "a/b/c"])
def test_what_is_no_hub_id_is_refused(hub, folder, name):
    with pytest.raises(ArtefactError, match="cannot upload to"):
        CompactViT.from_pretrained(folder).push_to_hub(name)


def test_a_hub_that_does_not_answer_is_not_waited_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    start = time.monotonic()
    with pytest.raises(ArtefactError, match=r"no model directory at me/owls.* does not answer"):
        CompactViT.from_pretrained("me/owls")
    with pytest.raises(ArtefactError, match=r"cannot upload to me/owls: .* does not answer"):
        CompactViT.from_pretrained(folder).push_to_hub("me/owls")
    assert time.monotonic() - start < 10
