"""SASL_SSL with SCRAM, as MEGIDO_KAFKA_* sets it up, against a broker that takes nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from scripts.kafka import Node, secured

from megido_shared.bus.base import Outgoing
from megido_shared.bus.kafka import KafkaBus
from megido_shared.bus.kafka.client import security_from_env
from megido_shared.bus.local import Journal
from megido_shared.bus.topics import Topic
from megido_shared.datadir import DataDir
from megido_shared.errors import Unavailable
from megido_shared.testing import a_completed_flow
from tests.fixtures.kafka import started
from tests.integration.capture.harness import environment
from tests.support.waiting import until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

TOPIC = Topic("secret", 3, "delete", "key")
PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def broker(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("secured")
    store = folder / "broker.pem"
    _write_key_store(authority, store)
    node = secured(folder / "kafka", key_store=store, user="megido", password=PASSWORD)
    try:
        yield started(node)
    finally:
        node.kill()


def _write_key_store(authority: trustme.CA, path: Path) -> None:
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + chain)


@pytest.fixture
def env(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    return {
        "MEGIDO_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "MEGIDO_KAFKA_SASL_USERNAME": "megido",
        "MEGIDO_KAFKA_SASL_PASSWORD": PASSWORD,
        "MEGIDO_KAFKA_CA_FILE": str(trusted),
    }


async def test_the_right_password_reads_and_writes(broker: Node, env: dict[str, str]) -> None:
    bus = KafkaBus(broker.bootstrap, security=security_from_env(env))
    await bus.create_topics([TOPIC])
    producer = await bus.producer("writer")
    await producer.append([Outgoing(TOPIC.name, b"k", b"v")])
    consumer = await bus.consumer("readers", [TOPIC])
    batch = await consumer.poll(timeout=30)
    assert [record.value for record in batch.records] == [b"v"]
    await consumer.close()
    await producer.close()
    await bus.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"MEGIDO_KAFKA_SASL_PASSWORD": "battery-staple"}, "password"),
        ({"MEGIDO_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}, "MEGIDO_KAFKA_SECURITY_PROTOCOL"),
        ({"MEGIDO_KAFKA_CA_FILE": ""}, "certificate"),
    ],
)
async def test_what_is_wrong_is_named_in_one_line(
    wrong: dict[str, str], message: str, broker: Node, env: dict[str, str]
) -> None:
    bus = KafkaBus(broker.bootstrap, security=security_from_env(env | wrong))
    with pytest.raises(Unavailable) as refused:
        await bus.ping()
    text = str(refused.value)
    assert message in text and "\n" not in text and "battery" not in text
    await bus.close()


def test_the_forwarder_says_once_that_the_password_is_wrong(broker: Node, env: dict[str, str], tmp_path: Path) -> None:
    journal = Journal.open(DataDir(tmp_path / "data"), "capture")
    journal.publish(a_completed_flow())
    log = tmp_path / "log"
    command = [sys.executable, "-m", "megido_shared.bus.forwarder"]
    with log.open("wb") as out:
        forwarder = subprocess.Popen(
            [*command, "--data-dir", str(tmp_path / "data"), "--kafka", broker.bootstrap],
            env=environment(**env | {"MEGIDO_KAFKA_SASL_PASSWORD": "battery-staple"}),
            stderr=out,
            stdout=subprocess.DEVNULL,
        )
    try:
        until(lambda: "the password" in log.read_text(), "it says so")
        # Several more attempts, each refused.
        until(lambda: broker.log.read_text().count("Failed authentication") >= 4, "it tries again")
        lines = [line for line in log.read_text().splitlines() if "megido.forwarder" in line]
        assert len(lines) == 1 and "battery" not in log.read_text()
    finally:
        forwarder.terminate()
        assert forwarder.wait(15) == 0
        journal.close()
