"""The commands of the command line, one file each."""

#: The key of the ledger that a command uses, in `click.Context.meta`: an unexpected error may come from its damage.
LEDGER_META_KEY = "enrich.ledger"
