"""The commands of the command line, and what they share. `cli.SECTIONS` names the module of each command."""

#: Key in `click.Context.meta` for the ledger of a command, because damage to it may cause an unexpected error.
LEDGER_META_KEY = "enrich.ledger"
