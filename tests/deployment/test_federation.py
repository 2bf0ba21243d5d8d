"""A federation as docker/ and docs/deployment.md describe it: started, used, and closed to everybody else."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import psutil
import pytest
import yaml
from federation import ROOT, Federation, free_port, wait

DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one = Federation(tmp_path_factory.mktemp("federation"), ("north", "south"))
    yield one
    one.close()


def test_nodes_train_on_their_own_images_and_bytes_are_counted_as_flower_counts_them(federation: Federation) -> None:
    judged = {"eval__features": "random", "eval__min_images": 1, "eval__samples": 16, "eval__audit": True}
    for strategy, rounds, more in (("feddm-vanilla", 1, {}), ("feddm-lean", 2, judged)):
        code, said = federation.run(run_name=strategy, strategy=strategy, num_server_rounds=rounds, **more)
        assert code == 0, said
        listed = json.loads(federation.command("flwr", "ls", "site", "--format=json"))
        metered = max(listed["runs"], key=lambda run: str(run["pending-at"]))["network-traffic"]
        described = json.loads((federation.out / strategy / "nodes.json").read_text())
        assert {node["name"]: node["images"] for node in described} == {"north": 18, "south": 18}
        rows = federation.rows(strategy)
        assert [row["clients_ok"] for row in rows] == [2] * rounds
        assert (federation.out / strategy / "model" / "unet").is_dir()
        # Flower adds about 1.5 kB to a message, whatever is in it; each node gets one more, to introduce itself,
        # and one or two where it is late (see `probes`).
        final = json.loads((federation.out / strategy / "final.json").read_text()) if more else {"bytes_other": 0}
        messages = 2 * 2 * (rounds + 3 + 2 * bool(more))
        payload = sum(row[f"bytes_{way}"] for row in rows for way in ("up", "down", "other")) + final["bytes_other"]
        flowers = metered["inbound-bytes"] + metered["outbound-bytes"]
        assert 0 < flowers - payload < 0.01 * payload + 2000 * messages
    assert {*final["audit"]} == {"north", "south"}
    assert rows[-1]["fid"] > 0
    (state,) = {path.parent.parent for path in (federation.folder / "north-state").glob("*/north/residual-*.frame")}
    assert sorted(path.name.split("-")[0] for path in state.iterdir()) == ["north", "shadow", "shadow"]


@contextmanager
def nginx(federation: Federation, name: str, superlink: str) -> Iterator[int]:
    """nginx with docker/gateway.conf before a SuperLink; its port."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    port, folder = free_port(), federation.folder / name
    text = (DOCKER / "gateway.conf").read_text()
    paths = {
        " /tmp/": f" {folder}/",
        "superlink:8000": superlink,
        "8443": str(port),
        "/run/secrets": str(federation.keys),
    }
    for path, here in paths.items():
        assert path in text
        text = text.replace(path, here)
    folder.mkdir()
    (folder / "nginx.conf").write_text(text)
    federation.spawn(name, "nginx", "-c", folder / "nginx.conf", "-p", folder, "-g", "daemon off;")
    wait(lambda: psutil.Process(federation.processes[name].pid).children(), "nginx", 20)
    yield port
    federation.kill(name)


@pytest.fixture
def gateway(federation: Federation) -> Iterator[int]:
    """The port of one before the federation's SuperLink."""
    with nginx(federation, "gateway", federation.address) as port:
        yield port


def test_the_gateway_lets_nodes_through_and_nobody_else(federation: Federation, gateway: int) -> None:
    known = federation.log("south").count("SuperNode ID")
    federation.stop("south")
    federation.start_node("south", port=gateway)
    wait(lambda: federation.log("south").count("SuperNode ID") > known, "south through the gateway")
    federation.processes["superlink"].kill()
    time.sleep(15)  # the gateway says 502 meanwhile
    federation.start_superlink()
    code, said = federation.run(run_name="after-a-restart", num_server_rounds=1, min_nodes=2, min_replies=2)
    assert code == 0, said
    trusted = ssl.create_default_context(cafile=str(federation.keys / "ca.crt"))
    for path in ("/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/pull-task-input", "/", "/health"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"https://127.0.0.1:{gateway}{path}", data=b"", context=trusted, timeout=10)
    outside = f'[superlink.outside]\naddress = "127.0.0.1:{gateway}"\nroot-certificates = "{federation.keys}/ca.crt"\n'
    with (federation.home / "config.toml").open("a") as file:
        file.write(outside)
    line = ["flwr", "run", str(ROOT), "outside"]
    done = subprocess.run(line, env=federation.environment, capture_output=True, text=True, timeout=120, check=False)
    assert "Successfully started run" not in done.stdout + done.stderr


def test_nodes_are_told_to_try_again_where_the_superlink_fails(federation: Federation) -> None:
    """Such as with a full disk: any other error but "unavailable" ends a SuperNode, which goes on running."""

    class Failing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(500 if self.path.endswith("heartbeat") else 412)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(federation.keys / "server.pem", federation.keys / "server.key")
    server.socket = own.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    trusted = ssl.create_default_context(cafile=str(federation.keys / "ca.crt"))
    with nginx(federation, "gateway-of-one-that-fails", f"127.0.0.1:{server.server_port}") as port:
        for path, code in (("heartbeat", "503"), ("activate", "412")):
            with pytest.raises(urllib.error.HTTPError, match=code):
                urllib.request.urlopen(f"https://127.0.0.1:{port}/v1/fleet/{path}", b"", context=trusted, timeout=10)
    server.shutdown()


def test_what_runs_in_a_container_is_shut_in() -> None:
    for file in ("superlink", "supernode"):
        for name, service in yaml.safe_load((DOCKER / f"{file}.compose.yaml").read_text())["services"].items():
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert service["user"].startswith("${FEDDM_USER"), name
            assert not any("insecure" in part for part in service.get("command", [])), name
            assert all(re.match(r"8443:", port) for port in service.get("ports", [])), name
