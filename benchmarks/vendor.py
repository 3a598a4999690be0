"""The vendor's SDK as users run it on a list: one call per row in a thread pool, or one bulk call for all rows.

`python -m benchmarks.vendor --threads 50 --rows 1000 --base-url http://127.0.0.1:8000/v1`

It polls without a pause unless `--poll-interval` says otherwise. It stores nothing and writes no output. It prints one
JSON object: the number of answered rows, and the seconds this took after the imports.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

from databar import DatabarClient

from benchmarks.leads import ENRICHMENTS, lead_params
from benchmarks.server import API_KEY, WATERFALL


def main() -> None:
    """Enrich the leads and print the result."""
    parser = argparse.ArgumentParser(prog="benchmarks.vendor", description=__doc__)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--threads", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--bulk", action="store_true", help="one POST for all rows, without threads")
    parser.add_argument("--poll-interval", type=float, default=0.0, help="seconds; the SDK's own default is 2")
    options = parser.parse_args()
    leads = [lead_params(number) for number in range(options.rows)]
    began = time.perf_counter()
    with DatabarClient(API_KEY, options.base_url, poll_interval_s=options.poll_interval) as client:
        if options.bulk:
            answers = client.run_waterfall_bulk_sync(WATERFALL, leads, ENRICHMENTS)
        else:
            with ThreadPoolExecutor(options.threads) as pool:
                singles = pool.map(lambda lead: client.run_waterfall_sync(WATERFALL, lead, ENRICHMENTS), leads)
                answers = [answer for single in singles for answer in single]
    rows = sum(bool(answer["result"]["email"]) for answer in answers)
    print(json.dumps({"rows": rows, "elapsed_s": round(time.perf_counter() - began, 3)}))


if __name__ == "__main__":
    main()
