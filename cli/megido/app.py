"""The commands and their options. Bodies import what they need when they run: help must be quick."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from megido import logs, retention
from megido.main import SERVICES
from megido_shared.errors import ConfigurationError, MegidoError

if TYPE_CHECKING:
    from megido.client import Client

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="megido",
    help="An intercepting proxy whose history is an event stream.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ApiUrl = Annotated[
    str, typer.Option("--api-url", help="MEGIDO_API_URL, PROXY_API_URL or http://localhost:8000 unless given.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON, one document a line.")]
TargetUrl = Annotated[
    str, typer.Option("--target-url", help="Another scheme, host and port; another path too when it has one.")
]
NoVerify = Annotated[bool, typer.Option("--no-verify-ssl", help="Do not verify the server's certificate.")]
DataDirectory = Annotated[
    str, typer.Option("--data-dir", help="MEGIDO_DATA_DIR, /var/lib/megido (root) or the XDG data home unless given.")
]
Kafka = Annotated[str, typer.Option("--kafka", metavar="HOST:PORT", help="Kafka; none: the local bus (MEGIDO_KAFKA).")]
DatabaseUrl = Annotated[
    str, typer.Option("--database-url", help="postgresql://…; none: the embedded Postgres (MEGIDO_DATABASE_URL).")
]


def run(arguments: list[str]) -> int:
    """Raises MegidoError; the caller shows it as one line."""
    command = get_command(app)
    if _show_help(command, arguments):
        return 0
    try:
        code = command.main(arguments, prog_name="megido", standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            return 2
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "megido"
        message = " ".join(error.format_message().split())
        raise ConfigurationError(f"{message[:1].lower()}{message[1:].rstrip('.')}; see: {where} --help") from error
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


def _show_help(group: Any, arguments: list[str]) -> bool:
    """`megido COMMAND … --help` at once: parsing any option makes typer load pydantic, which takes longer than all
    the rest."""
    if len(arguments) < 2 or "--help" not in arguments or arguments[0] not in group.commands:
        return False
    context = group.context_class(group, info_name="megido")
    command = group
    for name in arguments:
        if name not in getattr(command, "commands", {}):
            break
        command = command.commands[name]
        context = command.context_class(command, parent=context, info_name=name)
    typer.echo(command.get_help(context))
    return True


@app.command(context_settings=_PASS_ON, epilog="Any other option is the proxy's; see: megido capture --help")
def up(
    context: typer.Context,
    *,
    data_dir: DataDirectory = "",
    log_dir: Annotated[str, typer.Option(help="JSON logs; PROXY_LOG_DIR or logs/proxy unless given.")] = "",
    proxy_port: Annotated[int, typer.Option(help="Port of the proxy.", min=1, max=65535)] = 8080,
    api_port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8000,
    kafka: Kafka = "",
    database_url: DatabaseUrl = "",
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="SERVICE", help="Leave out capture, ingest, api or replayer. Repeatable."),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-browser", help="Open the API's pages in a browser (on a terminal only).")
    ] = False,
) -> int:
    """Run everything on this machine: proxy, ingest, API, replayer, and a Postgres of its own. Ctrl-C stops it."""
    from megido.launcher.options import UpOptions  # noqa: PLC0415
    from megido.launcher.up import run as run_up  # noqa: PLC0415

    return run_up(
        UpOptions.of(
            data_dir=data_dir,
            log_dir=log_dir,
            proxy_port=proxy_port,
            api_port=api_port,
            kafka=kafka,
            database_url=database_url,
            without=without or [],
            open_browser=open_browser,
            capture_arguments=context.args,
        )
    )


def _add_services() -> None:
    """For `megido --help`; `megido.main` runs them before typer is loaded."""
    helps = {
        "capture": "Run the proxy alone.",
        "ingest": "Run ingest alone: bus to Postgres and JSON logs.",
        "api": "Run the REST API alone.",
        "replayer": "Run the replayer alone.",
    }
    for name in SERVICES:
        app.command(name, help=helps[name], context_settings=_PASS_ON, add_help_option=False)(_service(name))


def _service(name: str) -> Callable[[typer.Context], int]:
    def command(context: typer.Context) -> int:
        from megido.main import run_service  # noqa: PLC0415

        return run_service(name, context.args)

    return command


_add_services()


@app.command()
def migrate(data_dir: DataDirectory = "", database_url: DatabaseUrl = "", kafka: Kafka = "") -> int:
    """Bring the database schema and the topics up to date."""
    from megido.migrating import migrate as bring_up_to_date  # noqa: PLC0415

    return bring_up_to_date(data_dir=data_dir, database_url=database_url, kafka=kafka)


@app.command("list")
def list_command(
    *,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    method: Annotated[str, typer.Option(help="GET, POST, …")] = "",
    url: Annotated[str, typer.Option(help="Part of the URL.")] = "",
    protocol: Annotated[str, typer.Option(help="HTTP, HTTPS, WS or WSS.")] = "",
    source_ip: Annotated[str, typer.Option(help="The client's address.")] = "",
    search: Annotated[str, typer.Option(help="Part of the URL, the host or the user agent.")] = "",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """List captured requests, newest first."""
    from megido.history import list_requests  # noqa: PLC0415

    with _client(api_url) as client:
        return list_requests(
            client,
            limit=limit,
            method=method,
            url=url,
            protocol=protocol,
            source_ip=source_ip,
            search=search,
            as_json=as_json,
        )


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="Part of a URL, a host or a user agent.")],
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Search the captured requests."""
    return list_command(limit=limit, search=text, api_url=api_url, as_json=as_json)


@app.command()
def errors(
    *,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    error_type: Annotated[str, typer.Option("--type", help="SSL_ERROR, TIMEOUT, …")] = "",
    source_ip: Annotated[str, typer.Option(help="The client's address.")] = "",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """List errors, newest first: failed requests, and what failed before there was one."""
    from megido.errors import list_errors  # noqa: PLC0415

    with _client(api_url) as client:
        return list_errors(client, limit=limit, error_type=error_type, source_ip=source_ip, as_json=as_json)


@app.command()
def show(
    request_id: Annotated[str, typer.Argument(help="An id or a flow_id.")],
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Show one request with its response."""
    from megido.history import show as show_request  # noqa: PLC0415

    with _client(api_url) as client:
        return show_request(client, request_id, as_json=as_json)


@app.command()
def replay(
    request_id: Annotated[str, typer.Argument(help="An id or a flow_id.")],
    *,
    target_url: TargetUrl = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Headers and body too.")] = False,
    no_verify_ssl: NoVerify = False,
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Send a captured request again, to its original or another target."""
    from megido.history import replay as replay_request  # noqa: PLC0415

    with _client(api_url) as client:
        return replay_request(
            client, request_id, target_url=target_url, verify_tls=not no_verify_ssl, verbose=verbose, as_json=as_json
        )


@app.command("replay-range")
def replay_range_command(
    first: Annotated[int, typer.Argument(help="The first id.")],
    last: Annotated[int, typer.Argument(help="The last id, included.")],
    *,
    target_url: TargetUrl = "",
    delay: Annotated[float, typer.Option(help="Seconds between two requests.", min=0)] = 0.5,
    no_verify_ssl: NoVerify = False,
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Send a range of captured requests again, one after the other."""
    from megido.history import replay_range  # noqa: PLC0415

    with _client(api_url) as client:
        return replay_range(
            client, first, last, target_url=target_url, delay=delay, verify_tls=not no_verify_ssl, as_json=as_json
        )


config_app = typer.Typer(
    help="Show and change what running proxies apply.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")
rules_app = typer.Typer(help="Look at the payload rules.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rules_app, name="rules")
Scope = Annotated[str, typer.Option("--scope", help="global, app:SOURCE_APP or node:NODE.")]


@config_app.command("show")
def config_show(scope: Scope = "global", api_url: ApiUrl = "", as_json: Json = False) -> int:
    """Show every field, where it is set, and which running nodes decided it at their start."""
    from megido.configuring import show as show_configuration  # noqa: PLC0415

    with _client(api_url) as client:
        return show_configuration(client, scope, as_json=as_json)


@config_app.command("set")
def config_set(
    assignments: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="A secret's NAME alone asks for its value.")
    ],
    scope: Scope = "global",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Change fields; running proxies apply them within two seconds."""
    from megido.configuring import change  # noqa: PLC0415

    with _client(api_url) as client:
        return change(client, scope, assignments, as_json=as_json)


@config_app.command("unset")
def config_unset(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    scope: Scope = "global",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Return fields to what lies below this scope: the global one, or the defaults."""
    from megido.configuring import unset  # noqa: PLC0415

    with _client(api_url) as client:
        return unset(client, scope, names, as_json=as_json)


@config_app.command("history")
def config_history(
    scope: Annotated[str, typer.Option("--scope", help="Of this scope alone.")] = "",
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)] = 20,
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Who changed which field or payload rule, when, and from what to what."""
    from megido.configuring import history  # noqa: PLC0415

    with _client(api_url) as client:
        return history(client, scope, limit=limit, as_json=as_json)


@rules_app.command("list")
def rules_list(api_url: ApiUrl = "", as_json: Json = False) -> int:
    """List the payload rules with their hits."""
    from megido.configuring import rules  # noqa: PLC0415

    with _client(api_url) as client:
        return rules(client, as_json=as_json)


@app.command()
def nodes(
    every: Annotated[bool, typer.Option("--all", help="Those too that stopped or are silent.")] = False,
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """List the running proxies and replayers: what they apply, and what they counted."""
    from megido.configuring import nodes as list_nodes  # noqa: PLC0415

    with _client(api_url) as client:
        return list_nodes(client, every=every, as_json=as_json)


@app.command()
def accounting(api_url: ApiUrl = "", as_json: Json = False) -> int:
    """Prove what became of everything that was captured; exit code 1 when something is lost or unexplained."""
    from megido.accounting import accounting as account_for  # noqa: PLC0415

    with _client(api_url) as client:
        return account_for(client, as_json=as_json)


letters_app = typer.Typer(
    help="Look at records that could not be stored, and put them through again.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(letters_app, name="dead-letters")
LetterIds = Annotated[list[int], typer.Argument(metavar="ID...", min=0)]
Topic = Annotated[str, typer.Option("--topic", help="megido.flows, megido.websocket, …")]
Reason = Annotated[str, typer.Option("--reason", help="Part of the reason.")]


@letters_app.command("list")
def letters_list(
    *,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    topic: Topic = "",
    reason: Reason = "",
    state: Annotated[str, typer.Option(help="new, queued, redriven or discarded.")] = "",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """List dead letters, newest first."""
    from megido.deadletters import list_letters  # noqa: PLC0415

    with _client(api_url) as client:
        return list_letters(client, limit=limit, topic=topic, reason=reason, state=state, as_json=as_json)


@letters_app.command("show")
def letters_show(
    letter_id: Annotated[int, typer.Argument(metavar="ID", min=0)], api_url: ApiUrl = "", as_json: Json = False
) -> int:
    """Show one: why it could not be stored, and what is in it."""
    from megido.deadletters import show as show_letter  # noqa: PLC0415

    with _client(api_url) as client:
        return show_letter(client, letter_id, as_json=as_json)


@letters_app.command("redrive")
def letters_redrive(
    letter_ids: Annotated[list[int] | None, typer.Argument(metavar="[ID...]", min=0)] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that are new.")] = False,
    topic: Topic = "",
    reason: Reason = "",
    state: Annotated[str, typer.Option(help="new (unless given), queued or discarded.")] = "",
    api_url: ApiUrl = "",
    as_json: Json = False,
) -> int:
    """Put dead letters through ingest again: each is stored once, or stays a dead letter with one attempt more."""
    from megido.deadletters import redrive  # noqa: PLC0415

    with _client(api_url) as client:
        return redrive(client, letter_ids or [], every=every, topic=topic, reason=reason, state=state, as_json=as_json)


@letters_app.command("discard")
def letters_discard(letter_ids: LetterIds, api_url: ApiUrl = "") -> int:
    """Mark dead letters as discarded; their records stay."""
    from megido.deadletters import discard  # noqa: PLC0415

    with _client(api_url) as client:
        return discard(client, letter_ids)


app.add_typer(logs.app, name="logs")
app.add_typer(retention.app, name="retention")


def _client(api_url: str) -> "Client":
    from megido.client import Client  # noqa: PLC0415

    return Client(api_url)


__all__ = ["MegidoError", "app", "run"]
