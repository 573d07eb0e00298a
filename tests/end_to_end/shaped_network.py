"""A network of supernodes with shaped uplinks before a storage with a shaped way in, in network namespaces; and writers
that send over it.

    unshare --net --mount --propagation private --pid --fork --kill-child \\
        python -m tests.end_to_end.shaped_network 16,0,0,0 4,4,4,4

As root. For each list of writers by supernode it prints a line: JSON of the seconds until each of them has sent its
bytes, as the storage has them. Nothing leaves the namespaces, which end with the process. (The set-up is that of a
prototype of the planner, which had the same results.)
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

RANK_BYTES_PER_SECOND = 2_000_000
UPLINK_BYTES_PER_SECOND = 12_500_000
STORAGE_BYTES_PER_SECOND = 40_000_000
WRITER_BYTES = 6_000_000
PORT = 7000
STORAGE = "10.9.0.1"
SECONDS_MAX = 60.0
SO_MAX_PACING_RATE = 47
"""Of Linux; Python has no name for it."""
_READY_SECONDS = 0.3
_PATIENCE_SECONDS = 30.0


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def build(supernodes: int) -> None:
    run("mount -t tmpfs tmpfs /run")  # where ``ip netns`` keeps its names
    run("ip link add bridge type bridge")
    run("ip link set bridge up")
    for name, address in [("storage", STORAGE), *((f"s{n}", f"10.9.0.{10 + n}") for n in range(supernodes))]:
        run(f"ip netns add {name}")
        run(f"ip link add to-{name} type veth peer name eth0 netns {name}")
        run(f"ip link set to-{name} master bridge up")
        run(f"ip -n {name} address add {address}/24 dev eth0")
        run(f"ip -n {name} link set eth0 up")
        if name != "storage":
            run(f"tc -n {name} qdisc add dev eth0 root {_bucket(UPLINK_BYTES_PER_SECOND)}")
    run(f"tc qdisc add dev to-storage root {_bucket(STORAGE_BYTES_PER_SECOND)}")


def _bucket(bytes_per_second: int) -> str:
    return f"tbf rate {bytes_per_second * 8} burst 64kb limit 512kb"


def store() -> None:
    """Takes all that is sent, and says of each writer when it has all."""
    with socket.create_server((STORAGE, PORT), backlog=256) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_take, args=(connection,), daemon=True).start()


def _take(connection: socket.socket) -> None:
    with connection, contextlib.suppress(ConnectionError):
        left, buffer = WRITER_BYTES, bytearray(1 << 16)
        while left and (count := connection.recv_into(buffer)):
            left -= count
        connection.sendall(b"." if not left else b"")


def write(count: int, start: float) -> None:
    """So many writers of one supernode, all from ``start`` on."""
    seconds: list[float] = []

    def one() -> None:
        with socket.create_connection((STORAGE, PORT), _PATIENCE_SECONDS) as connection:
            connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, RANK_BYTES_PER_SECOND)
            connection.settimeout(SECONDS_MAX)
            time.sleep(max(0.0, start - time.monotonic()))
            connection.sendall(bytes(WRITER_BYTES))
            assert connection.recv(1) == b"."
            seconds.append(time.monotonic() - start)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(seconds))


def measure(writers: list[int]) -> list[float]:
    """Of every writer, the seconds it took."""
    start = time.monotonic() + _READY_SECONDS + 0.02 * sum(writers)
    processes = [_start(f"s{n}", "write", str(count), str(start)) for n, count in enumerate(writers) if count]
    return [each for process in processes for each in json.loads(process.communicate(timeout=SECONDS_MAX)[0])]


def _start(name: str, *arguments: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "tests.end_to_end.shaped_network", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def main() -> None:
    if sys.argv[1] == "store":
        store()
    elif sys.argv[1] == "write":
        write(int(sys.argv[2]), float(sys.argv[3]))
    else:
        cases = [[int(count) for count in case.split(",")] for case in sys.argv[1:]]
        build(max(map(len, cases)))
        storage = _start("storage", "store")
        assert storage.stdout is not None
        assert storage.stdout.readline() == "ready\n"
        for case in cases:
            print(json.dumps(measure(case)), flush=True)
        storage.kill()


if __name__ == "__main__":
    main()
