"""One Apache Kafka node (KRaft, broker and controller in one) for tests and for trying things out.

    python scripts/kafka.py fetch                           the jars, once, through Maven, into .cache/kafka/jars
    python scripts/kafka.py run [--port 9092] [--data DIR]  a node in the foreground, until Ctrl-C

Not for production: one node, no replication, no authentication, loopback only.
"""

import argparse
import base64
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy" / "kafka"
JARS = ROOT / ".cache" / "kafka" / "jars"
START_SECONDS = 60.0

SETTINGS = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
# One node holds everything once.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# Ready soon, and soon again after a kill (the dead incarnation must time out first).
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Topics are made on purpose or not at all.
auto.create.topics.enable=false
message.max.bytes=4194304
log.index.size.max.bytes=1048576
"""


class KafkaError(Exception):
    """What is wrong and what to do, in one line."""


def fetch(jars: Path = JARS) -> None:
    """Downloads the jars that pom.xml names, unless they are there. Raises KafkaError."""
    done = jars / ".complete"
    if done.exists() and done.stat().st_mtime >= (DEPLOY / "pom.xml").stat().st_mtime:
        return
    _tool("mvn", "Maven fetches Kafka's jars")
    _tool("java", "Kafka needs Java 17 or newer")
    jars.mkdir(parents=True, exist_ok=True)
    command = ["mvn", "-q", "-B", "-f", DEPLOY / "pom.xml", "dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
    fetched = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if fetched.returncode:
        raise KafkaError(f"Maven could not fetch Kafka's jars:\n{fetched.stdout.strip()}")
    done.touch()


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Node:
    """A node that can be killed and started again on the same port and data."""

    def __init__(
        self,
        data: Path,
        *,
        port: int = 0,
        jars: Path = JARS,
        cluster_id: str = "",
        more: Mapping[str, str] | None = None,
        formatting: Sequence[str] = (),
    ) -> None:
        """`more` settings win over those above; `formatting` are more arguments of the storage tool."""
        self.port = port or free_port()
        self.bootstrap = f"127.0.0.1:{self.port}"
        self._cluster_id = cluster_id
        self._more = more or {}
        self._formatting = formatting
        self._begin = 0
        self.data = data
        self.log = data / "node.log"
        self._jars = jars
        self._settings = data / "server.properties"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, timeout: float = START_SECONDS) -> None:
        """Returns when the node answers clients. Raises KafkaError."""
        self.prepare()
        self.launch()
        self.wait_started(timeout)

    def prepare(self) -> None:
        """Writes the settings and formats the storage, once. Raises KafkaError."""
        _tool("java", "Kafka needs Java 17 or newer")
        self.data.mkdir(parents=True, exist_ok=True)
        logs = self.data / "logs"
        settings = SETTINGS.format(port=self.port, controller_port=free_port(), data=logs)
        settings += "".join(f"{name}={value}\n" for name, value in self._more.items())
        self._settings.write_text(settings)
        if not (logs / "meta.properties").exists():
            self._format()

    def launch(self) -> None:
        """Begins a prepared node. Call it in a thread that stays: the node dies with it."""
        with self.log.open("ab") as out:
            self._begin = out.tell()
            command = [*_die_with_parent(), *self.tool("kafka.Kafka"), str(self._settings)]
            self._process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def wait_started(self, timeout: float = START_SECONDS) -> None:
        self._wait_for(b"Kafka Server started", self._begin, timeout)

    def kill(self) -> None:
        """SIGKILL: what it acknowledged is in the page cache, what it did not may be lost."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: an orderly end."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nobody."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def wait(self) -> int:
        """Until the node ends by itself; its exit code."""
        return self._process.wait() if self._process else 0

    def tool(self, main: str) -> list[str]:
        """The command of one of Kafka's programs, for example `org.apache.kafka.tools.TopicCommand`."""
        memory = ["-Xms64m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        logging = f"-Dlog4j2.configurationFile={DEPLOY / 'log4j2.properties'}"
        return ["java", *memory, logging, "-cp", f"{self._jars}/*", main]

    def _format(self) -> None:
        command = [
            *self.tool("kafka.tools.StorageTool"),
            "format",
            # A new one each time a node is formatted: consumers must notice a recreated Kafka.
            f"--cluster-id={self._cluster_id or new_cluster_id()}",
            "-c",
            str(self._settings),
            *self._formatting,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise KafkaError(f"Kafka's storage in {self.data} could not be formatted:\n{done.stdout.strip()}")

    def _wait_for(self, line: bytes, begin: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            with self.log.open("rb") as log:
                log.seek(begin)
                if line in log.read():
                    return
            if self._process is None or self._process.poll() is not None:
                raise KafkaError(f"Kafka ended while starting; the reason is at the end of {self.log}")
            if time.monotonic() > deadline:
                self.kill()
                raise KafkaError(f"Kafka was not ready within {timeout:.0f} s; see {self.log}")
            time.sleep(0.05)

    def _signal(self, number: signal.Signals) -> None:
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        if self._process is None:
            return
        self.go_on()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Cluster:
    """Three nodes, each broker and controller: everything is held three times, a write needs two."""

    def __init__(self, data: Path, *, jars: Path = JARS) -> None:
        ports = {number: free_port() for number in (1, 2, 3)}
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in ports.items())
        cluster_id = new_cluster_id()
        self.nodes: dict[int, Node] = {}
        for number, controller in ports.items():
            port = free_port()
            more = {
                "node.id": str(number),
                "controller.quorum.voters": voters,
                "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
                "controller.quorum.election.timeout.ms": "500",
                "controller.quorum.fetch.timeout.ms": "1000",
                "min.insync.replicas": "2",
                "offsets.topic.replication.factor": "3",
                "transaction.state.log.replication.factor": "3",
                "transaction.state.log.min.isr": "2",
            }
            self.nodes[number] = Node(data / str(number), port=port, jars=jars, cluster_id=cluster_id, more=more)
        self.bootstrap = ",".join(node.bootstrap for node in self.nodes.values())

    def start(self, *, timeout: float = 2 * START_SECONDS) -> None:
        """Returns when all three answer clients. Raises KafkaError."""
        with ThreadPoolExecutor(len(self.nodes)) as pool:  # formatting takes a second of Java each
            list(pool.map(Node.prepare, self.nodes.values()))
        for node in self.nodes.values():
            node.launch()
        for node in self.nodes.values():
            node.wait_started(timeout)

    def kill(self) -> None:
        for node in self.nodes.values():
            node.kill()


def secured(data: Path, *, key_store: Path, user: str, password: str, jars: Path = JARS) -> Node:
    """A node whose clients must speak SASL_SSL with SCRAM-SHA-512. `key_store` is a PEM file: PKCS#8 key and chain."""
    port, inner, controller = free_port(), free_port(), free_port()
    more = {
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "listeners": ",".join(
            (f"SASL_SSL://127.0.0.1:{port}", f"PLAINTEXT://127.0.0.1:{inner}", f"CONTROLLER://127.0.0.1:{controller}")
        ),
        "advertised.listeners": f"SASL_SSL://127.0.0.1:{port},PLAINTEXT://127.0.0.1:{inner}",
        "listener.security.protocol.map": "SASL_SSL:SASL_SSL,PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(key_store),
    }
    scram = f"SCRAM-SHA-512=[name={user},password={password}]"
    return Node(data, port=port, jars=jars, more=more, formatting=["--add-scram", scram])


def new_cluster_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()


def _tool(name: str, why: str) -> None:
    if not shutil.which(name):
        raise KafkaError(f"{name} was not found: {why}; install it, or point at a running Kafka instead")


def _die_with_parent() -> list[str]:
    """A node must not outlive a test run that was killed (util-linux, where there is one)."""
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def _run(port: int, data: Path) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise KafkaError(f"port {port} is taken ({error.strerror}); choose another with --port") from error
    fetch()
    node = Node(data, port=port)

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        node.start()
        print(f"Kafka listens on {node.bootstrap}; data and node.log in {data}; Ctrl-C stops it", flush=True)
        print(f'Next: make run ARGS="--kafka localhost:{node.port}"', flush=True)
        node.wait()
    except KeyboardInterrupt:
        pass
    finally:
        node.stop()
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stopping in the handler itself would wait inside a wait."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One Apache Kafka node for tests and for trying things out.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", help="download the jars into .cache/kafka/jars")
    run = commands.add_parser("run", help="run a node in the foreground until Ctrl-C")
    run.add_argument("--port", type=int, default=9092, help="where it listens, on loopback (default 9092)")
    run.add_argument("--data", type=Path, default=ROOT / ".megido" / "kafka", help="where it keeps its data")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "fetch":
            fetch()
            return 0
        return _run(arguments.port, arguments.data.resolve())
    except KafkaError as error:
        print(f"kafka: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
