"""Load test of the server: many clients send images to a server on this machine.

python benchmarks/load.py runs/NAME --clients 32 --seconds 60 --out load.json
python benchmarks/load.py runs/NAME --queue 40      # no client is refused
python benchmarks/load.py stand-in                  # a network of negligible cost: the server alone

Counts answers by status, times those that were answered, and reads the server's resident memory every half second.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from overfly.core.classes import Classes
from overfly.core.device import describe_machine
from overfly.data.domain import Domain
from overfly.exporting.predictor import Floats, ModelMetadata, Predictor
from overfly.web import server
from overfly.web.service import Limits, ServedNetwork

STAND_IN = "stand-in"
BOUNDARY = "overfly-load"
WARM = 15.0
"""Seconds after which memory is expected to be constant."""


def body(image: Any) -> bytes:
    """Encode an image as a multipart request."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head.encode() + file.getvalue() + f"\r\n--{BOUNDARY}--\r\n".encode()


def client(
    address: tuple[str, int], bodies: list[bytes], until: float, requests: list[tuple[int | str, float]]
) -> None:
    """Send one image after another; wait for `Retry-After` when it is refused."""
    number = 0
    while time.monotonic() < until:
        start = time.monotonic()
        connection = http.client.HTTPConnection(*address, timeout=120)
        try:
            headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            connection.request("POST", "/predict", bodies[number % len(bodies)], headers)
            answer = connection.getresponse()
            answer.read()
            requests.append((answer.status, time.monotonic() - start))
            if answer.status == 429:
                time.sleep(min(float(answer.headers["retry-after"]), max(0.0, until - time.monotonic())))
        except (OSError, http.client.HTTPException) as error:
            requests.append((type(error).__name__, time.monotonic() - start))
        finally:
            connection.close()
        number += 1


def resident(process: int) -> float:
    """Resident memory of a process in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Start a server, load it, and measure."""
    own = [sys.executable, __file__, STAND_IN, "--serve", "--queue", str(settings.queue)]
    real = [sys.executable, "-m", "overfly", "serve", settings.run, "--port", "0", "--queue", str(settings.queue)]
    command = own if settings.run == STAND_IN else real
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        url = urlsplit(next(word for word in line.split() if word.startswith("http")).rstrip(";"))
        address = (str(url.hostname), int(url.port or 0))
        domain = Domain.model_validate({"name": "synthetic", "scene": "rural", "size": settings.size, "val": 8})
        bodies = [body(domain.read_image(item)) for item in domain.items("val")]
        requests: list[tuple[int | str, float]] = []
        client(address, bodies, time.monotonic() + 0.01, [])
        started = time.monotonic()
        threads = [
            threading.Thread(target=client, args=(address, bodies, started + settings.seconds, requests))
            for _ in range(settings.clients)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append((time.monotonic() - started, resident(process.pid)))
            time.sleep(0.5)
        took = time.monotonic() - started
        for thread in threads:
            thread.join()
    finally:
        process.terminate()
        process.wait(20)
    return summarize(settings, requests, memory, took, len(bodies[0]))


def stand_in(queue: int) -> None:
    """Serve a network that costs nothing, so that what remains is the server itself."""
    metadata = ModelMetadata(
        architecture="threshold", classes=Classes(names=("dark", "bright")), mean=(0.0,) * 3, std=(1.0,) * 3
    )

    def bright(images: Floats) -> Floats:
        return np.concatenate([1 - images[:, :1] / 255, images[:, :1] / 255], 1).astype(np.float32)

    network = ServedNetwork("0", "threshold", lambda: Predictor(metadata, "torch", "cpu", bright))
    bound = server.bind("127.0.0.1", 0)
    print(f"serving at {server.socket_url(bound)}", file=sys.stderr, flush=True)
    server.run(server.application([network], limits=Limits(queue=queue)), bound)


def summarize(
    settings: argparse.Namespace,
    requests: list[tuple[int | str, float]],
    memory: list[tuple[float, float]],
    took: float,
    size: int,
) -> dict[str, Any]:
    """Summarize the measurements."""
    good = np.asarray([seconds for status, seconds in requests if status == 200]) * 1e3
    full = np.asarray([seconds for status, seconds in requests if status == 429] or [np.nan]) * 1e3
    statuses = {
        str(status): sum(each == status for each, _ in requests)
        for status in dict.fromkeys(each for each, _ in requests)
    }
    warm = [megabytes for when, megabytes in memory if when >= WARM]
    thirds = [float(np.median(part)) for part in np.array_split(np.asarray(warm), 3)] if len(warm) >= 3 else []
    return {
        "clients": settings.clients,
        "seconds": round(took, 1),
        "image": [settings.size, settings.size],
        "request_bytes": size,
        "queue": settings.queue,
        "answers": statuses,
        "errors": sum(count for status, count in statuses.items() if status not in ("200", "429")),
        "images_per_second": round(len(good) / took, 2),
        "p50_ms": round(float(np.percentile(good, 50)), 1),
        "p95_ms": round(float(np.percentile(good, 95)), 1),
        "p99_ms": round(float(np.percentile(good, 99)), 1),
        "refusal_p95_ms": round(float(np.nanpercentile(full, 95)), 1) if np.isfinite(full).any() else None,
        "memory_mb_thirds": [round(value, 1) for value in thirds],
        "memory_mb_most": round(max(megabytes for _, megabytes in memory), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help=f"a run; or {STAND_IN}: a network of negligible cost")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--queue", type=int, default=16)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    if settings.serve:
        stand_in(settings.queue)
        return
    result = {"network": Path(settings.run).name} | measure(settings)
    result["machine"] = describe_machine("cpu") | {"load_average": [round(value, 2) for value in os.getloadavg()]}
    print(json.dumps(result, indent=2))
    if settings.out is not None:
        settings.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
