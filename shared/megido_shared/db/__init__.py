"""The database: tables, codecs, connections, migrations, and the embedded server."""
