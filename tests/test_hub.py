"""ORG/NAME through huggingface_hub, against a hub of our own on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
REPOSITORIES = {
    "org/open": {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00001.safetensors": b"weights",
        "consolidated.safetensors": b"no",
        "pytorch_model.bin": b"no",
        "README.md": b"no",
        "original/model.safetensors": b"no",
        "onnx/config.json": b"no",
    },
    "org/gated": {"config.json": CONFIG, "model.safetensors": b"weights"},
    "org/bin-only": {"config.json": CONFIG, "pytorch_model.bin": b"no"},
    "org/broken": {},
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a snapshot download speaks."""

    protocol_version = "HTTP/1.1"
    downloaded: list[str]

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        repo_id = "/".join(path[2:4] if path[0] == "api" else path[:2])
        files = REPOSITORIES.get(repo_id)
        if files is None:
            return self.answer(404, error="RepoNotFound")
        if repo_id == "org/broken":
            return self.answer(500)
        if path[0] == "api" and path[4] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())
        if path[0] == "api":
            entries = [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files.items()]
            return self.answer(200, json.dumps(entries).encode())
        if repo_id == "org/gated" and self.headers["Authorization"] != "Bearer hf_secret":
            return self.answer(403, error="GatedRepo")
        name = "/".join(path[4:])
        if self.command == "GET":
            self.downloaded.append(name)
        return self.answer(200, files[name])

    do_HEAD = do_GET

    def answer(self, status, body=b"", error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """resolve_all(names, environment) -> each name's folder or error, in a process of its own (the hub's library reads
    HF_* when it is imported) and one HF_HOME for all."""
    Hub.downloaded = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("hf")
    program = """if True:
        import json, sys
        from cupaged.checkpoint.fetch import resolve
        from cupaged.errors import FetchError
        answers = {}
        for name in sys.argv[1:]:
            try:
                answers[name] = str(resolve(name))
            except FetchError as error:
                answers[name] = f"FetchError: {error}"
        print(json.dumps(answers))"""

    def resolve_all(*names, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept |= {
            "HF_HOME": str(home),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        command = [sys.executable, "-c", program, *names]
        result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, cwd=home, timeout=120)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    resolve_all.home = home
    yield resolve_all
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def online(hub):
    return hub("org/open", "org/gated", "org/missing", "org/bin-only", "org/broken")


def test_safetensors_and_tokenizer_files_only(hub, online):
    folder = Path(online["org/open"])
    assert hub.home in folder.parents
    wanted = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    assert sorted(path.name for path in folder.rglob("*")) == wanted
    assert (folder / "config.json").read_bytes() == CONFIG
    assert not {"pytorch_model.bin", "README.md", "consolidated.safetensors", "onnx/config.json"} & set(Hub.downloaded)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/gated", ["https://huggingface.co/org/gated", "HF_TOKEN", "licence"]),
        ("org/missing", ["no folder org/missing", "spelling"]),
        ("org/bin-only", ["no *.safetensors"]),
        ("org/broken", ["500"]),
    ],
)
def test_refusals_in_one_line(online, name, words):
    error = online[name]
    assert error.startswith("FetchError: ")
    assert all(word in error for word in words), error
    assert "\n" not in error


def test_token_opens_a_gated_model(hub, online):
    folder = Path(hub("org/gated", HF_TOKEN="hf_secret")["org/gated"])
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached")],
)
def test_without_the_hub_the_cache_serves(hub, online, environment, reason):
    answers = hub("org/open", "org/missing", **environment)
    assert answers["org/open"] == online["org/open"]
    assert reason in answers["org/missing"]
    assert "\n" not in answers["org/missing"]
