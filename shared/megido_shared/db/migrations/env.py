"""Run by Alembic. `megido_shared.db.migrate` hands over the connection that holds the advisory lock."""

from alembic import context
from sqlalchemy import Connection

connection: Connection = context.config.attributes["connection"]
context.configure(connection=connection)
with context.begin_transaction():
    context.run_migrations()
