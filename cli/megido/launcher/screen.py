"""The one screen: what runs where, and what to do next."""

import shlex
import shutil
import sys
from pathlib import Path

from megido.launcher.options import UpOptions
from megido.launcher.plan import API, CAPTURE, INGEST
from megido_shared.db.connect import hide_password


def render(options: UpOptions, *, database: str, ports: dict[str, int], seconds: float) -> str:
    """`ports` are those of probes and metrics, by service."""
    data_dir = options.common.data_dir
    api = f"http://127.0.0.1:{options.api_port}"
    lines = [f"Megido is running (ready in {seconds:.1f} s). Ctrl-C stops everything.", ""]
    if options.runs(CAPTURE):
        several = f" ({options.workers} workers)" if options.workers > 1 else ""
        lines.append(_line("Proxy", f"http://127.0.0.1:{options.proxy_port}{several}"))
    if options.runs(API):
        lines.append(_line("API", f"{api}/proxy/api/requests/   {api}/docs"))
    lines += [
        _line("Bus", f"Kafka at {options.common.kafka}" if options.common.kafka else f"{data_dir.bus} (no Kafka)"),
        _line("History", database),
    ]
    if options.runs(INGEST):
        lines.append(_line("JSON logs", str(options.log_dir)))
    lines += [
        _line("Certificate", str(data_dir.ca / "mitmproxy-ca-cert.pem")),
        _line("Service logs", str(data_dir.service_logs)),
        _line("Metrics", "  ".join(f"{name} http://127.0.0.1:{port}/metrics" for name, port in ports.items() if port)),
        "",
    ]
    if options.runs(CAPTURE):
        lines += ["Send something through it:", f"  {_curl(options)}", ""]
        lines += [
            f"A browser: set its HTTP and HTTPS proxy to 127.0.0.1:{options.proxy_port}, then open http://mitm.it/ and",
            "trust the certificate.",
            "",
        ]
    else:
        place = shlex.quote(str(data_dir.root))
        lines += [
            f"Record from a mitmproxy of yours: MEGIDO_DATA_DIR={place} mitmdump -s services/capture/addon.py",
            "",
        ]
    if options.runs(API):
        megido = command()
        where = "" if options.api_port == 8000 else f" --api-url {api}"
        lines += [f"See it: {megido} list{where}     one: {megido} show 1{where}     again: {megido} replay 1{where}"]
    return "\n".join(lines)


def command() -> str:
    """How this program is called from a shell: by its path where its name would not be found."""
    program = Path(sys.argv[0])
    found = shutil.which(program.name)
    if program.name != "megido" or (found and Path(found).samefile(program)):
        return "megido"
    try:
        return shlex.quote(str(program.absolute().relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(program.absolute()))


def _line(name: str, value: str) -> str:
    return f"  {name:<13} {value}"


def _curl(options: UpOptions) -> str:
    certificate = shlex.quote(str(options.common.data_dir.ca / "mitmproxy-ca-cert.pem"))
    token = "--auth-required" in options.capture_arguments
    header = " --proxy-header 'Proxy-Authorization: Bearer <your token>'" if token else ""
    return f"curl --proxy http://127.0.0.1:{options.proxy_port}{header} --cacert {certificate} https://example.com/"


def external_database(url: str) -> str:
    return hide_password(url)
