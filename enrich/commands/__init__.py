"""The commands of the command line, one file each."""

#: Key in `click.Context.meta` for the ledger of a command, because damage to it may cause an unexpected error.
LEDGER_META_KEY = "enrich.ledger"
