"""`python -m enrich` is `enrich`."""

from databar_enrich import main

main()
